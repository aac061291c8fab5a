"""Sizes of well-known models, so that planning for them asks no network.

From the config.json that each model's authors publish.
"""

from __future__ import annotations

import re
from typing import Any

from colab_qlora.activations.model_shape import ModelShape

_LLAMA_VOCAB, _QWEN_VOCAB, _GEMMA_2_VOCAB = 128_256, 151_936, 256_000
_GEMMA_2: dict[str, Any] = {
    "is_tied": True,
    "has_branch_norms": True,
    "has_score_cap": True,
    "local_window": 4096,
}

RECORDED_SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 1536, 9, 3, 64, 49_152, is_tied=True),
    "smollm2-360m": ModelShape(32, 960, 2560, 15, 5, 64, 49_152, is_tied=True),
    "smollm2-1.7b": ModelShape(24, 2048, 8192, 32, 32, 64, 49_152, is_tied=True),
    "smollm3-3b": ModelShape(36, 2048, 11_008, 16, 4, 128, _LLAMA_VOCAB, is_tied=True),
    "llama-3-8b": ModelShape(32, 4096, 14_336, 32, 8, 128, _LLAMA_VOCAB),
    "llama-3.1-8b": ModelShape(32, 4096, 14_336, 32, 8, 128, _LLAMA_VOCAB),
    "llama-3.2-1b": ModelShape(16, 2048, 8192, 32, 8, 64, _LLAMA_VOCAB, is_tied=True),
    "llama-3.2-3b": ModelShape(28, 3072, 8192, 24, 8, 128, _LLAMA_VOCAB, is_tied=True),
    "mistral-7b-v0.3": ModelShape(32, 4096, 14_336, 32, 8, 128, 32_768),
    "qwen2.5-0.5b": ModelShape(
        24, 896, 4864, 14, 2, 64, _QWEN_VOCAB, is_tied=True, has_qkv_bias=True
    ),
    "qwen2.5-1.5b": ModelShape(
        28, 1536, 8960, 12, 2, 128, _QWEN_VOCAB, is_tied=True, has_qkv_bias=True
    ),
    "qwen2.5-3b": ModelShape(
        36, 2048, 11_008, 16, 2, 128, _QWEN_VOCAB, is_tied=True, has_qkv_bias=True
    ),
    "qwen2.5-7b": ModelShape(28, 3584, 18_944, 28, 4, 128, 152_064, has_qkv_bias=True),
    "qwen3-0.6b": ModelShape(
        28, 1024, 3072, 16, 8, 128, _QWEN_VOCAB, is_tied=True, has_head_norms=True
    ),
    "qwen3-1.7b": ModelShape(
        28, 2048, 6144, 16, 8, 128, _QWEN_VOCAB, is_tied=True, has_head_norms=True
    ),
    "qwen3-4b": ModelShape(
        36, 2560, 9728, 32, 8, 128, _QWEN_VOCAB, is_tied=True, has_head_norms=True
    ),
    "qwen3-8b": ModelShape(36, 4096, 12_288, 32, 8, 128, _QWEN_VOCAB, has_head_norms=True),
    "phi-3-mini-4k": ModelShape(
        32, 3072, 8192, 32, 32, 96, 32_064, window=2047, has_fused_projections=True
    ),
    "gemma-2-2b": ModelShape(26, 2304, 9216, 8, 4, 256, _GEMMA_2_VOCAB, **_GEMMA_2),
    "gemma-2-9b": ModelShape(42, 3584, 14_336, 16, 8, 256, _GEMMA_2_VOCAB, **_GEMMA_2),
}
# what publishers add to the name of the same sizes
_ENDINGS = r"(-(instruct|base|it|bnb|4bit|nf4|unsloth|bf16))+$"


def recorded_shape(name: str) -> ModelShape | None:
    """The sizes of a model by its short name or its name on the hub; None if not recorded."""
    short = re.sub(_ENDINGS, "", name.rsplit("/", 1)[-1].lower())
    return RECORDED_SHAPES.get(short.removeprefix("meta-"))
