"""Read what a linear layer is made of: base weight, bias, LoRA blocks; or why it cannot be fused.

PEFT may switch, merge or disable adapters between any two passes, so what was read holds as long as
what `watch_linear` watches is as it was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from colab_qlora.layers.watch import Watch
from colab_qlora.quantization.int8_modules import Int8Linear

Kind = Literal["nf4", "fp4", "int8", "dense", "module"]


@dataclass(frozen=True)
class LoraBlock:
    """One adapter of one linear: y += scaling * (dropout(x) A^T) B^T.

    Attributes:
        a: (rank, in_features), b: (out_features, rank); any float dtype.
        scaling: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        dropout: share of x that is dropped in this pass; 0 outside training.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LinearPart:
    """One linear of a group, as this pass has to compute it.

    Attributes:
        kind: "nf4", "fp4" and "int8" are decoded, "dense" is copied beside the LoRA columns,
            "module" is called as it is and differentiated by autograd.
        weight: (out_features, in_features), packed for the 4-bit kinds, an `Int8Weight` for int8.
        blocks: the active adapters; empty for a "module".
        module: what the model calls.
        reason: why it is a "module"; empty otherwise.
    """

    name: str
    kind: Kind
    out_features: int
    in_features: int
    weight: Any
    bias: torch.Tensor | None
    module: torch.nn.Module
    blocks: tuple[LoraBlock, ...] = field(default=())
    reason: str = ""

    @property
    def rank(self) -> int:
        """Ranks of all active adapters together."""
        return sum(block.rank for block in self.blocks)

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters whose gradient the fused layer has to return, in a fixed order."""
        if self.kind == "module":
            return [p for p in self.module.parameters() if p.requires_grad]
        own = [p for block in self.blocks for p in (block.a, block.b)]
        if isinstance(self.bias, torch.nn.Parameter):
            own.append(self.bias)
        return [p for p in own if p.requires_grad]


def read_linear(name: str, module: torch.nn.Module) -> LinearPart:
    """Describe a linear layer, plain or wrapped by PEFT."""
    is_lora = hasattr(module, "lora_A") and hasattr(module, "base_layer")
    base: Any = module.base_layer if is_lora else module
    kind, reason = _base_kind(base)
    blocks: tuple[LoraBlock, ...] = ()
    if is_lora and not reason:
        blocks, reason = _lora_blocks(module)
    if not reason:
        watched = [module, base] if is_lora else [module]
        reason = next((words for m in watched if (words := _hooked(m))), "")
    out_features, in_features = _shape(base)
    return LinearPart(
        name=name,
        kind="module" if reason else kind,
        out_features=out_features,
        in_features=in_features,
        weight=base.int8_weight() if kind == "int8" else getattr(base, "weight", None),
        bias=getattr(base, "bias", None),
        module=module,
        blocks=() if reason else blocks,
        reason=reason,
    )


def watch_linear(module: torch.nn.Module, watch: Watch) -> None:
    """Watch everything that the answer of `read_linear` follows from."""
    watch.module(module)
    inside = module.__dict__["_modules"]
    base = watch.item(inside, "base_layer")
    if base is None:
        base = module
    else:
        watch.module(base)
    watch.parameters(base)
    weight = base.__dict__["_parameters"].get("weight")
    if hasattr(weight, "quant_state"):
        watch.attribute(weight, "quant_state")
        if weight.quant_state is not None:
            watch.attribute(weight.quant_state, "packing_format_for_cpu", "quant_type")
    if "SCB" in base.__dict__["_buffers"]:
        watch.tensor(watch.item(base.__dict__["_buffers"], "SCB"))
    if "lora_A" not in inside:
        return
    peft: Any = module
    watch.attribute(module, "_disable_adapters", "_active_adapter", "merged_adapters")
    watch.contents(peft.merged_adapters)
    active = peft._active_adapter
    if isinstance(active, list):
        watch.contents(active)
    for name in [active] if isinstance(active, str) else active:
        watch.item(peft.scaling, name)
        watch.item(getattr(peft, "lora_variant", {}), name)
        for part in ("lora_A", "lora_B", "lora_dropout"):
            adapter = watch.item(inside[part].__dict__["_modules"], name)
            if adapter is not None:
                watch.module(adapter)
                watch.parameters(adapter)
                watch.attribute(adapter, "training", "p")


def _is_watched(own: dict[str, Any]) -> bool:
    """True if a module with these attributes has hooks, or its forward is replaced."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _shape(base: Any) -> tuple[int, int]:
    return int(base.out_features), int(base.in_features)


def _base_kind(base: Any) -> tuple[Kind, str]:
    """How the base weight is stored, and why it cannot be decoded into a buffer ("" if it can)."""
    if type(base) is torch.nn.Linear:
        if base.weight.requires_grad:
            return "module", "its base weight trains"
        return "dense", ""
    if type(base) is Int8Linear:
        return "int8", ""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    bitsandbytes = sys.modules.get("bitsandbytes")  # imported by whoever made such a layer
    if state is not None and bitsandbytes and type(base) is bitsandbytes.nn.Linear4bit:
        if getattr(state, "packing_format_for_cpu", False):
            return "module", "bitsandbytes has repacked its weight for CPU inference"
        if state.quant_type == "nf4":
            return "nf4", ""
        if state.quant_type == "fp4":
            return "fp4", ""
    return "module", f"its base layer is a {type(base).__name__}"


def _lora_blocks(module: Any) -> tuple[tuple[LoraBlock, ...], str]:
    if module.disable_adapters:
        return (), "" if not module.merged else "adapters are disabled while merged"
    if module.merged:
        return (), ""
    blocks: list[LoraBlock] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b = module.lora_A[name], module.lora_B[name]
        if name in getattr(module, "lora_variant", ()):
            kind = type(module.lora_variant[name]).__name__
            return (), f"its adapter is a variant of LoRA ({kind})"
        if not (isinstance(a, torch.nn.Linear) and isinstance(b, torch.nn.Linear)):
            return (), f"its adapter is no plain LoRA ({type(module).__name__})"
        if a.bias is not None or b.bias is not None:
            return (), "its adapter has a bias"
        dropout = module.lora_dropout[name]
        if words := _hooked(a) or _hooked(b) or _hooked(dropout):
            return (), words
        if not isinstance(dropout, (torch.nn.Identity, torch.nn.Dropout)):
            return (), f"its dropout is a {type(dropout).__name__}"
        share = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        blocks.append(LoraBlock(a.weight, b.weight, float(module.scaling[name]), float(share)))
    return tuple(blocks), ""


def _hooked(module: torch.nn.Module) -> str:
    """Say why the module has to be called itself: someone watches or replaces its forward."""
    if "forward" in module.__dict__:
        return "its forward is replaced"
    return "it has hooks" if _is_watched(module.__dict__) else ""
