"""Logits of exported models on the same positions, and how far two models' are apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colab_qlora.models.loading import keep_weights_in_place

Logits = list[np.ndarray]


@dataclass(frozen=True)
class Prompts:
    """Token ids, and the first position that counts: those before are the same in all prompts."""

    ids: list[list[int]]
    first: int

    @classmethod
    def of(cls, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Prompts:
        """Prompts of formatted chat rows, up to where the answer would begin."""
        texts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        # the last shared token has the same logits in all prompts too
        return cls(ids, len(os.path.commonprefix(ids)) if len(ids) > 1 else 0)

    @property
    def positions(self) -> int:
        """How many count, in all prompts together."""
        return sum(len(ids) - self.first for ids in self.ids)


@torch.no_grad()
def model_logits(model: Any, prompts: Prompts) -> Logits:
    """Of every position that counts, float32, by prompt (positions, vocabulary)."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for ids in prompts.ids:
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        found.append(logits[0, prompts.first :].float().cpu().numpy())
    return found


def load_float32(folder: str | Path, **options: Any) -> Any:
    """A folder by plain transformers, computed in float32 whatever its weights are held in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "gguf_file" not in options:
        config = AutoConfig.from_pretrained(folder)
        quantised = getattr(config, "quantization_config", None)
        if quantised:
            quantised["bnb_4bit_compute_dtype"] = "float32"
        options["config"] = config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": device}, **options
    )
    keep_weights_in_place(model)
    return model


def compare(truth: Logits, other: Logits) -> dict[str, float]:
    """How far `other` is from `truth`, over all positions.

    Returns:
        mean_kl, max_kl: KL(truth || other) in nat; prompt_kl: the largest mean of one prompt;
        mean_logit, max_logit: absolute difference of a logit; same_first: share of positions with
        the same most probable token.
    """
    kls, means, largest, same = [], [], [], []
    for ours, theirs in zip(truth, other, strict=True):
        p, q = (torch.from_numpy(part).double() for part in (ours, theirs))
        gap = (p - q).abs()
        means.append(gap.mean(-1))
        largest.append(gap.amax(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(kls)
    return {
        "mean_kl": float(kl.mean()),
        "prompt_kl": max(float(part.mean()) for part in kls),
        "max_kl": float(kl.max()),
        "mean_logit": float(torch.cat(means).mean()),
        "max_logit": float(torch.cat(largest).max()),
        "same_first": float(torch.cat(same).mean()),
    }
