"""The ways to hold a base model in few bits that `benchmarks.quantization` compares."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora import FastLanguageModel
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import INT8, NF4_64, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.ladder import choose_rungs
from colab_qlora.quantization.placing import place, shape_of
from colab_qlora.quantization.plain_rungs import rungs_of
from colab_qlora.quantization.precision_map import LadderItem
from colab_qlora.quantization.prices import ladder_items
from colab_qlora.quantization.weight_source import WeightSource

SETTINGS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "use_gradient_checkpointing": False}


@dataclass(frozen=True)
class Request:
    """What all methods share."""

    model_name: str
    max_seq_length: int
    dtype: str | None
    calibration: list[Any]
    seed: int


@dataclass
class Built:
    """A model with adapters.

    Attributes:
        model, tokenizer: ready to train.
        weight_bytes: of all linears, embedding and head.
        load_s: seconds from nothing to the model without adapters; of the list of 16-bit modules
            only what it takes to measure by, not to place.
        has_schedule: whether precision changes while it trains.
    """

    model: Any
    tokenizer: Any
    weight_bytes: int
    load_s: float
    has_schedule: bool = False


def _load(request: Request, **options: Any) -> tuple[Any, Any, float]:
    began = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(
        request.model_name, request.max_seq_length, request.dtype, **options
    )
    return model, tokenizer, time.perf_counter() - began


def _adapted(model: Any, request: Request, **options: Any) -> Any:
    return FastLanguageModel.get_peft_model(
        model, random_state=request.seed, **{**SETTINGS, **options}
    )


def _sixteen_bit(request: Request) -> Built:
    model, tokenizer, seconds = _load(request, load_in_4bit=False)
    return Built(_adapted(model, request), tokenizer, weight_bytes(model), seconds)


def _nf4(request: Request) -> Built:
    model, tokenizer, seconds = _load(request)
    return Built(_adapted(model, request), tokenizer, weight_bytes(model), seconds)


def _dynamic(budget: str, *, has_schedule: bool = False) -> Callable[[Request], Built]:
    def build(request: Request) -> Built:
        model, tokenizer, seconds = _load(
            request,
            quantization="dynamic",
            quantization_budget=budget,
            calibration_data=request.calibration,
        )
        size = weight_bytes(model)
        return Built(_adapted(model, request), tokenizer, size, seconds, has_schedule)

    return build


def _skip_list(budget: str) -> Callable[[Request], Built]:
    """Plain NF4 with some modules left in 16 bit: the best such list by our own prices."""

    def build(request: Request) -> Built:
        model, tokenizer, seconds = _load(
            request,
            quantization="dynamic",
            quantization_budget=budget,
            calibration_data=request.calibration,
        )
        state = dynamic_state(model)
        assert state is not None
        items = [_only(item) for item in ladder_items(model, state.prices)]
        chosen = choose_rungs(items, state.cap_bytes)
        for item in weight_items(model):
            place(
                model,
                item,
                chosen[item.name].rung,
                state.source(item.name),
                compute_dtype=state.compute_dtype,
                search=False,
            )
        state.map = chosen
        size = weight_bytes(model)
        return Built(_adapted(model, request), tokenizer, size, seconds)

    return build


def _only(item: LadderItem) -> LadderItem:
    kept = tuple(o for o in item.options if o.rung in (item.plain_rung, SIXTEEN_BIT))
    return LadderItem(item.name, kept, item.plain_rung)


@torch.no_grad()
def _loftq(request: Request) -> Built:
    """One step of LoftQ (arXiv 2310.08659) on plain NF4: adapters start as the error's best r.

    As PEFT's `replace_lora_weights_loftq`, which runs on CUDA only.
    """
    from colab_qlora.models.loading import locate_checkpoint

    model, tokenizer, seconds = _load(request)
    size = weight_bytes(model)
    began = time.perf_counter()
    source = WeightSource.of_checkpoint(locate_checkpoint(request.model_name))
    adapted = _adapted(model, request)
    functional = import_bitsandbytes().functional
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        weight = module.base_layer.weight
        held = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        true = source(name.removeprefix("base_model.model.")).to(held)
        u, sizes, v = torch.linalg.svd(true - held, full_matrices=False)
        rank = module.r["default"]
        root = (sizes[:rank] / module.scaling["default"]).sqrt()
        module.lora_A["default"].weight.copy_(root[:, None] * v[:rank])
        module.lora_B["default"].weight.copy_(u[:, :rank] * root)
    return Built(adapted, tokenizer, size, seconds + time.perf_counter() - began)


def _pissa(request: Request) -> Built:
    """PEFT's PiSSA: the largest directions train, plain NF4 of what is left stays."""
    model, tokenizer, seconds = _load(request, load_in_4bit=False)
    began = time.perf_counter()
    adapted = _adapted(model, request, init_lora_weights="pissa_niter_4", use_fused_layers=False)
    base = adapted.get_base_model()
    head = base.get_output_embeddings()
    dtype = next(base.parameters()).dtype
    for item in weight_items(base):
        if NF4_64 in rungs_of(base, item) and item.modules[0] is not head:
            rest = item.weight.detach().clone()
            place(base, item, NF4_64, rest, compute_dtype=dtype, search=False)
    return Built(adapted, tokenizer, weight_bytes(base), seconds + time.perf_counter() - began)


METHODS: Mapping[str, Callable[[Request], Built]] = {
    "16bit": _sixteen_bit,
    "nf4": _nf4,
    "dynamic +0%": _dynamic("+0%"),
    "dynamic +5%": _dynamic("+5%"),
    "dynamic +10%": _dynamic("+10%"),
    "dynamic +10% schedule": _dynamic("+10%", has_schedule=True),
    "16-bit skips +10%": _skip_list("+10%"),
    "loftq": _loftq,
    "pissa": _pissa,
}


def weight_bytes(model: Any) -> int:
    """Of all linears, embedding and head, 16 bit as 2 bytes on any machine; tied tensors once."""
    total = 0
    for item in weight_items(model):
        module: Any = item.modules[0]
        state = getattr(item.weight, "quant_state", None)
        if state is not None:
            total += rung_bytes(shape_of(item), f"nf4_{state.blocksize}")
        elif hasattr(module, "SCB"):
            total += rung_bytes(shape_of(item), INT8)
        else:
            total += rung_bytes(shape_of(item), SIXTEEN_BIT)
    return total


__all__ = ["METHODS", "Built", "Request", "weight_bytes"]
