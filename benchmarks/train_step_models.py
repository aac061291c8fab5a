"""The implementations whose training step is timed: how each loads a model and attaches LoRA.

All of them: NF4 with double quantisation, LoRA of rank 16 on the seven linears of a layer, no
dropout, adapters in float32, scaled dot product attention.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks import record

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, SEED = 16, 32, 42
CALIBRATION_TEXTS, CALIBRATION_WORDS = 16, 256


@dataclass(frozen=True)
class Request:
    """What to load, and for which rows."""

    folder: str
    dtype: torch.dtype
    longest: int
    is_lean: bool = False
    memory_budget_gib: float | None = None
    host_budget_gib: float | None = None
    records: bool = True


def _stock(request: Request, *, checkpointing: bool, uses_liger: bool = False) -> Any:
    """transformers, PEFT and bitsandbytes as they are, or with Liger's kernels patched in."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if uses_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True,
            rms_norm=True,
            swiglu=True,
            fused_linear_cross_entropy=True,
            cross_entropy=False,
        )
    model = AutoModelForCausalLM.from_pretrained(
        request.folder,
        dtype=request.dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=request.dtype,
        ),
    )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    return model


def _unsloth(request: Request, *, checkpointing: bool | str) -> Any:
    from unsloth import FastLanguageModel

    return _fast(FastLanguageModel, request, checkpointing)


def _ours(request: Request, *, checkpointing: bool | str) -> Any:
    from colab_qlora import FastLanguageModel
    from colab_qlora.models.fuse import state_of

    budgets = {}
    if checkpointing == "smart":
        budgets["memory_budget_gib"] = request.memory_budget_gib
        budgets["host_budget_gib"] = request.host_budget_gib
    model = _fast(FastLanguageModel, request, checkpointing, **budgets)
    state = state_of(model)
    assert state is not None
    if request.is_lean:
        state.mlp_tokens, state.holds_gate_up, state.max_weight_bytes = 1024, False, 1
    state.graphs.is_on = request.records
    return model


def _ours_dynamic(request: Request) -> Any:
    """Everything kept, weights on the rungs of +10 %; calibrated on random words of the tokenizer.

    What it loads is also drawn, as `quantization_<model>.png` beside the results.
    """
    from colab_qlora import FastLanguageModel, quantization_report
    from colab_qlora.models.fuse import causal_model, state_of

    options = {
        "quantization": "dynamic",
        "quantization_budget": "+10%",
        "calibration_data": _random_texts(request.folder),
    }
    model = _fast(FastLanguageModel, request, False, load_options=options)
    record.folder().mkdir(parents=True, exist_ok=True)
    target = record.folder() / f"quantization_{Path(request.folder).name}.png"
    quantization_report(causal_model(model)).draw().savefig(target, dpi=110)
    state = state_of(model)
    assert state is not None
    state.graphs.is_on = request.records
    return model


def _random_texts(folder: str) -> list[str]:
    from transformers import AutoTokenizer

    words = sorted(AutoTokenizer.from_pretrained(folder).get_vocab())
    draw = random.Random(SEED)
    return [" ".join(draw.choices(words, k=CALIBRATION_WORDS)) for _ in range(CALIBRATION_TEXTS)]


def _fast(
    face: Any,
    request: Request,
    checkpointing: bool | str,
    *,
    load_options: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Any:
    """Through a `FastLanguageModel`, Unsloth's or ours."""
    model, _ = face.from_pretrained(
        request.folder,
        max_seq_length=request.longest,
        dtype=request.dtype,
        load_in_4bit=True,
        **load_options,
    )
    return face.get_peft_model(
        model,
        r=RANK,
        target_modules=list(TARGETS),
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=SEED,
        **more,
    )


IMPLEMENTATIONS: dict[str, Callable[[Request], Any]] = {
    "hf": lambda request: _stock(request, checkpointing=True),
    "hf_nockpt": lambda request: _stock(request, checkpointing=False),
    "hf_liger": lambda request: _stock(request, checkpointing=True, uses_liger=True),
    "unsloth": lambda request: _unsloth(request, checkpointing="unsloth"),
    "unsloth_nockpt": lambda request: _unsloth(request, checkpointing=False),
    "ours": lambda request: _ours(request, checkpointing=True),
    "ours_smart": lambda request: _ours(request, checkpointing="smart"),
    "ours_nockpt": lambda request: _ours(request, checkpointing=False),
    "ours_dynamic": _ours_dynamic,
}


def make_optimizer(name: str, model: Any) -> torch.optim.Optimizer:
    """8-bit AdamW over the LoRA weights: "flat" is ours, "bnb" bitsandbytes'."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "flat":
        from colab_qlora.training.optimizer import FlatAdamW

        return FlatAdamW(parameters, lr=2e-4, weight_decay=0.01, bits=8)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=2e-4, weight_decay=0.01)
