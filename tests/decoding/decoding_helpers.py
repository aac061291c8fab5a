"""Small random models of each family, prompts, and what transformers' generate makes of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from colab_qlora.decoding import decode, eager_on_cpu

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite", "Gemma")
WORDS = 97
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    # wide enough for answers that are no single word
    "initializer_range": 0.3,
    "sliding_window": None,
    # a layer of SmolLM3 without positions
    "no_rope_layers": [1, 0, 1],
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_model(family: str, **fields: Any) -> Any:
    """A random model of three layers in float32, in evaluation mode."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | fields))
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    torch.manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(3, WORDS, (len(lengths), longest))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def greedy(new_tokens: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0} | more


def generated(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """New tokens by transformers' generate."""
    found = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return found.cpu()


def decoded(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """New tokens by the package, which must not hand them over."""
    with eager_on_cpu():
        found = decode(model, inputs, options)
    assert found is not None
    return found.cpu()
