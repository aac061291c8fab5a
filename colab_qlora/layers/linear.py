"""Read what a linear layer is made of: base weight, bias, LoRA blocks; or why it cannot be fused.

It is read again at every pass, since PEFT may switch, merge or disable adapters in between.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["nf4", "fp4", "dense", "module"]


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
        kind: "nf4" and "fp4" are decoded, "dense" is copied beside the LoRA columns, "module" is
            called as it is and differentiated by autograd.
        weight: (out_features, in_features), packed for the 4-bit kinds.
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
        weight=getattr(base, "weight", None),
        bias=getattr(base, "bias", None),
        module=module,
        blocks=() if reason else blocks,
        reason=reason,
    )


def _shape(base: Any) -> tuple[int, int]:
    return int(base.out_features), int(base.in_features)


def _base_kind(base: Any) -> tuple[Kind, str]:
    """How the base weight is stored, and why it cannot be decoded into a buffer ("" if it can)."""
    if type(base) is torch.nn.Linear:
        if base.weight.requires_grad:
            return "module", "its base weight trains"
        return "dense", ""
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
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "it has hooks" if any(hooks) else ""
