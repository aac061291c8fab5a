"""What LoRA adds to a model, counted from the model itself.

LoRA leaves a weight W (out, in) as it is and learns a change B A beside it, with A (rank, in) and
B (out, rank): rank * (in + out) parameters instead of in * out.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.models.adapters import count_parameters


@dataclass(frozen=True)
class LoraRow:
    """The adapted layers of one name and shape.

    Attributes:
        module: last part of their names, e.g. "q_proj".
        count: how many there are.
        in_features: numbers that one takes for a token.
        out_features: numbers that one gives.
        rank: rank of its adapter.
        base_parameters: weights in all `count` base layers; a 4-bit code counts as one.
        lora_parameters: parameters that LoRA adds to all `count` of them.
    """

    module: str
    count: int
    in_features: int
    out_features: int
    rank: int
    base_parameters: int
    lora_parameters: int


def lora_table(model: Any) -> list[LoraRow]:
    """Count what the active adapters add, layer name by layer name.

    Args:
        model: a `PeftModel` with LoRA adapters.

    Returns:
        One row for each layer name and shape, in the order in which the model uses them.

    Raises:
        UserError: the model has no LoRA adapters.
    """
    counts: Counter[tuple[str, int, int, int]] = Counter()
    base: Counter[tuple[str, int, int, int]] = Counter()
    added: Counter[tuple[str, int, int, int]] = Counter()
    for name, layer in lora_layers(model):
        rank = sum(layer.r.get(adapter, 0) for adapter in layer.active_adapters)
        key = (name.rsplit(".", 1)[-1], layer.in_features, layer.out_features, rank)
        counts[key] += 1
        base[key] += layer.in_features * layer.out_features
        added[key] += sum(
            parameter.numel()
            for name, parameter in layer.named_parameters()
            if name.startswith("lora_") and set(name.split(".")) & set(layer.active_adapters)
        )
    if not counts:
        raise UserError(
            "the model has no LoRA adapters",
            got=type(model).__name__,
            allowed="a PeftModel",
            do="Attach them first: model = FastLanguageModel.get_peft_model(model)",
        )
    return [LoraRow(key[0], counts[key], *key[1:], base[key], added[key]) for key in counts]


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of each layer that has an active LoRA adapter."""
    for name, module in model.named_modules():
        adapters = getattr(module, "active_adapters", None)
        # a PeftModel has active adapters too, but only a LoRA layer has a rank for each
        ranks = getattr(module, "r", None)
        if isinstance(ranks, dict) and isinstance(adapters, list) and set(adapters) & set(ranks):
            yield name, module


def format_lora_table(rows: Sequence[LoraRow], model: Any = None) -> str:
    """Lay the rows out as a table.

    Args:
        rows: from `lora_table`.
        model: the model that they come from; with it, the last line gives the trainable share of
            all its parameters, which is what PEFT's print_trainable_parameters calls trainable%.

    Returns:
        Lines of text of equal width: a head, the rows, the totals; then the share.
    """
    head = ("module", "layers", "in", "out", "rank", "base weights", "LoRA adds", "share")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        numbers = (row.count, row.in_features, row.out_features, row.rank)
        cells.append((row.module, *(f"{n:,}" for n in numbers), *_sums(row.base_parameters, row)))
    base = sum(row.base_parameters for row in rows)
    layers, added = sum(row.count for row in rows), sum(row.lora_parameters for row in rows)
    cells.append(("all", f"{layers:,}", "", "", "", f"{base:,}", f"{added:,}", _share(added, base)))
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    if model is None:
        lines.append(f"trainable: {added:,} beside {base:,} frozen weights, {_share(added, base)}")
    else:
        trainable, total = count_parameters(model)
        lines.append(
            f"trainable: {trainable:,} of all {total:,} parameters, {_share(trainable, total)}"
        )
    return "\n".join(lines)


def _sums(base: int, row: LoraRow) -> tuple[str, str, str]:
    return f"{base:,}", f"{row.lora_parameters:,}", _share(row.lora_parameters, base)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"
