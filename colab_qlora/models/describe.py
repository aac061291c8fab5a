"""Say what of a model is fused, what is not, and why: `describe(model)`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from colab_qlora.models.architectures import layer_linears, why_not_fusable, why_stock_now
from colab_qlora.models.fuse import causal_model, state_of
from colab_qlora.models.fused_head import is_fused_head, why_head_not_fusable
from colab_qlora.models.fused_layer import is_fused
from colab_qlora.models.fused_norm import is_fused_norm
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear


@dataclass(frozen=True)
class Swap:
    """One line of the description.

    Attributes:
        name: where in the model; layers that are alike share a line.
        count: how many modules the line stands for.
        was: class of the model's own module.
        now: what computes in its place.
        reason: why, or why not.
    """

    name: str
    count: int
    was: str
    now: str
    reason: str


@dataclass(frozen=True)
class Description:
    """All lines; `str()` gives a table."""

    swaps: tuple[Swap, ...]
    stock_passes: dict[str, int]

    def __str__(self) -> str:
        head = ("where", "modules", "was", "now", "why")
        rows = [(s.name, str(s.count), s.was, s.now, s.reason) for s in self.swaps]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
        lines = [
            "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]))
            for row in (head, *rows)
        ]
        for reason, count in self.stock_passes.items():
            lines.append(f"{count} layer passes ran the model's own code: {reason}")
        return "\n".join(line.rstrip() for line in lines)


def describe(model: Any) -> Description:
    """List what `get_peft_model` swapped in a model, with the reason for each line.

    Args:
        model: a causal language model or a PEFT model around one, fused or not.

    Returns:
        A `Description`; print it for a table. It changes nothing and runs nothing.

    Example:
        >>> print(describe(model))  # doctest: +SKIP
    """
    causal = causal_model(model)
    state = state_of(model)
    lines: Counter[tuple[str, str, str, str]] = Counter()
    for layer in _layers_of(causal):
        for line in _layer_lines(layer):
            lines[line] += 1
    swaps = [Swap(name, count, *rest) for (name, *rest), count in lines.items()]
    norms = Counter(type(m).__name__ for m in causal.modules() if is_fused_norm(m))
    swaps += [
        Swap("norms", count, kind, "fused norm", "one kernel forward, one backward")
        for kind, count in norms.items()
    ]
    swaps += _int8_lines(causal)
    swaps.append(_head_line(causal))
    return Description(tuple(swaps), dict(state.stock_passes) if state else {})


def _layer_lines(layer: Any) -> list[tuple[str, str, str, str]]:
    was = type(layer).__name__.removeprefix("Fused")
    if not is_fused(layer):
        reason = why_not_fusable(layer) or "not swapped"
        return [("model.layers", was, "its own code", reason)]
    stock = why_stock_now(layer)
    if stock:
        return [("model.layers", was, "its own code", stock)]
    lines = [("model.layers", was, "fused layer", "one autograd node, keeps what a plan names")]
    for group, linears in layer_linears(layer).items():
        for part in linears:
            name = f"model.layers.*.{_owner(group)}.{part.name}"
            kind = type(part.module).__name__
            if part.kind == "module":
                lines.append((name, kind, "called as it is", part.reason))
            else:
                rank = f"LoRA rank {part.rank} inside" if part.blocks else "no adapter"
                lines.append((name, kind, "in the fused GEMM", f"{part.kind} weight, {rank}"))
    return lines


def _owner(group: str) -> str:
    return "self_attn" if group in ("qkv", "o") else "mlp"


def _int8_lines(causal: Any) -> list[Swap]:
    """The int8 modules outside of the decoder layers: a table, a head."""
    layers = {id(m) for layer in _layers_of(causal) for m in layer.modules()}
    found = []
    for name, module in causal.named_modules():
        if id(module) in layers or not isinstance(module, Int8Linear | Int8Embedding):
            continue
        if isinstance(module, Int8Embedding):
            now, reason = "called as it is", "int8 table, one float32 scale a row"
        elif type(module) is Int8Linear and name == "lm_head" and is_fused_head(causal):
            now, reason = "in the fused loss", "int8 weight, decoded a tile at a time"
        else:
            now, reason = "called as it is", "int8 weight, decoded for each call"
        found.append(Swap(name, 1, type(module).__name__, now, reason))
    return found


def _layers_of(causal: Any) -> list[Any]:
    return list(getattr(getattr(causal, "model", None), "layers", None) or [])


def _head_line(causal: Any) -> Swap:
    was = type(causal).__name__
    if is_fused_head(causal):
        return Swap("loss", 1, was, "fused loss", "labelled rows only, no logits in training")
    reason = why_head_not_fusable(causal) or "not swapped"
    return Swap("loss", 1, was, "its own code", reason)
