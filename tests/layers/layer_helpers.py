"""Tiny models of every family, and what their loss and gradients are in true float64."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import transformers
from peft import LoraConfig, get_peft_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# factors of positions, for half of each head: short sequences, and those beyond the original 8
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 5.0],
    "partial_rotary_factor": 0.5,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
}
PHI = {**SIZES, "hidden_size": 48, "pad_token_id": 0}
# two kinds of layers; the head's size is not hidden / heads, nor is the scale that of the head
GEMMA = {
    **SIZES,
    "head_dim": 16,
    "query_pre_attn_scalar": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "final_logit_softcapping": 3.0,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_3_1": transformers.LlamaConfig(**SIZES, rope_scaling=LLAMA_3_1),
    "llama_biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral_window": transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "phi3": transformers.Phi3Config(**PHI),
    "phi4_mini": transformers.Phi3Config(**PHI, rope_parameters=LONG_ROPE, sliding_window=6),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """A PEFT model in training mode whose adapters are not at their zero start."""
    torch.manual_seed(1)
    config = copy.deepcopy(FAMILIES[family])  # what a test changes stays in its own model
    # transformers refuses sdpa for Gemma 2, whose scores are bounded
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    # transformers starts biases and norms at 0 and 1, where a mistake in them would not show
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    options = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    } | lora
    return get_peft_model(model, LoraConfig(**options)).to(DEVICE, dtype).train()


def batch(padding: str = "none", rows: int = 2, length: int = 11) -> dict[str, Any]:
    """Random tokens with labels; `padding` is "none", "right" or "left"."""
    torch.manual_seed(2)
    ids = torch.randint(3, 101, (rows, length)).to(DEVICE)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[-1, length // 2 :] = 0
    elif padding == "left":
        mask[-1, : length // 2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    found: dict[str, Any] = {"input_ids": ids, "labels": labels, "num_items_in_batch": 13}
    return found if padding == "none" else found | {"attention_mask": mask}


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same in one table, with the loss as "loss", to compare bit by bit."""
    loss, found = loss_and_gradients(model, inputs)
    return {"loss": loss, **found}


def true_loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same from the model's own code, with its casts to float32 taken out.

    transformers casts to float32 in every norm and in the loss, also where all else is float64.
    """
    handles = []

    def norm_in_float64(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        (x,) = args
        is_gemma = hasattr(module, "eps")
        eps = module.eps if is_gemma else module.variance_epsilon
        return (module.weight + is_gemma) * x * torch.rsqrt(x.square().mean(-1, True) + eps)

    def softmax_in_float64(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return x.softmax(dim)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            handles.append(module.register_forward_hook(norm_in_float64))
    try:
        model.zero_grad()
        inputs = dict(inputs)
        labels, items = inputs.pop("labels"), inputs.pop("num_items_in_batch")
        with mock.patch("torch.nn.functional.softmax", softmax_in_float64):
            logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        loss = loss / items
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def largest_error(got: dict[str, Any], truth: dict[str, Any]) -> float:
    """Largest relative error (norm) of any gradient; both must have the same names.

    A gradient that is zero but for roundings is measured against the largest of all.
    """
    assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
    assert got
    floor = 1e-6 * max(float(gradient.norm()) for gradient in truth.values())
    return max(float((got[n] - truth[n]).norm()) / max(float(truth[n].norm()), floor) for n in got)
