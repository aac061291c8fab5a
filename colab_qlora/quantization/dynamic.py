"""Dynamic quantisation of one model: what was measured, what stands where, and what has changed.

A model is loaded as plain NF4. Then, with the user's own rows,

    E[x_j^2] of every linear's input      activation_statistics.py
    prices of all rungs                   prices.py, on the NF4 model, errors against the source
    a rung for each weight under the cap  ladder.py
    every weight made anew                placing.py, from the 16-bit source, scales searched for

weights that shrink first, so that it never takes more memory than the cap, two matrices, and the
activations of a few rows; a GPU's memory that is free beside that saves time (memory_room.py).
Without rows there are no prices: the scales are searched for unweighted, and weights are ranked by
the squared error of their numbers, which says little about the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import (
    WeightItem,
    collect_statistics,
    weight_items,
)
from colab_qlora.quantization.budget import SIXTEEN_BIT, Budget, rung_bytes
from colab_qlora.quantization.first_order import product_dtype
from colab_qlora.quantization.ladder import choose_rungs
from colab_qlora.quantization.memory_room import Room, larger_chunks
from colab_qlora.quantization.placing import place, rung_of, shape_of
from colab_qlora.quantization.plain_rungs import rounded_rows, rungs_of
from colab_qlora.quantization.precision_map import PrecisionMap
from colab_qlora.quantization.prices import Prices, RungPrice, ladder_items, measure_prices
from colab_qlora.quantization.weight_reader import Source, WeightReader

ATTRIBUTE = "colab_qlora_quantization"


@dataclass(frozen=True)
class MapChange:
    """A weight that changed its rung during training.

    Attributes:
        step: optimiser step after which it did.
        name: of the weight.
        before, after: rungs.
        added_bytes: below 0 for a demotion.
        why: one clause.
    """

    step: int
    name: str
    before: str
    after: str
    added_bytes: int
    why: str


@dataclass
class DynamicQuantization:
    """What a dynamically quantised model carries along.

    Attributes:
        map: the rung of every weight, with bytes and prices, in use now.
        prices: by weight and rung, as measured last.
        cap_bytes: what all weights of the ladder may have together.
        column_weights: E[x_j^2] of each linear's input, (columns,), float32; empty without data.
        source: reads 16-bit matrices by name.
        compute_dtype: what weights are decoded to.
        budget: the words of the user.
        has_data: whether prices come from the user's rows.
        history: changes during training, in their order.
        source_name: the checkpoint, as it was asked for.
    """

    map: PrecisionMap
    prices: Prices
    cap_bytes: int
    column_weights: dict[str, torch.Tensor]
    source: Source
    compute_dtype: torch.dtype
    budget: str
    has_data: bool
    history: list[MapChange] = field(default_factory=list)
    source_name: str = ""

    @property
    def plain_bytes(self) -> int:
        """Of the same weights as plain NF4 has them."""
        return sum(placement.plain_bytes for placement in self.map.placements.values())

    @property
    def plain_linear_bytes(self) -> int:
        """Of what plain NF4 quantises: what a budget in percent is counted from."""
        placements = self.map.placements.values()
        return sum(p.plain_bytes for p in placements if p.plain_rung != SIXTEEN_BIT)


def dynamic_state(model: Any) -> DynamicQuantization | None:
    """What `quantize_dynamically` left on a model, also through a PEFT wrapper; else None."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, DynamicQuantization) else None


def quantize_dynamically(
    model: Any,
    source: Source,
    batches: Sequence[Mapping[str, Any]],
    budget: Budget,
    compute_dtype: torch.dtype,
    *,
    spare_bytes: int = 0,
    words: str = "",
    say: Callable[[str], None] = print,
) -> DynamicQuantization:
    """Measure, choose and make all weights of a model anew.

    Args:
        model: loaded as plain NF4 (linears on nf4_64, embedding and head in 16 bit), no adapters.
        source: gives the 16-bit matrix of a module by name.
        batches: micro-batches with labels, on the model's device; may be empty.
        budget: parsed.
        compute_dtype: what weights are decoded to.
        spare_bytes: for an "auto" budget.
        words: the budget as the user gave it, for reports.
        say: takes one line for people.

    Returns:
        The state, which is also left on the model.

    Raises:
        UserError: a format that is not known, a budget below plain NF4, broken calibration data.
    """
    items = weight_items(model)
    for item in items:
        rung_of(item)  # a format that it does not know is refused before anything is measured
    # a budget that is too small is refused before as well
    cap = budget.cap_bytes(*_plain_bytes(model, items), spare_bytes)
    columns: dict[str, torch.Tensor] = {}
    device, room = _device_of(model), Room.of(_device_of(model))
    with WeightReader(source, device, room) as reader:
        if batches:
            say(f"measuring what errors cost on {_tokens(batches):,} tokens of your data")
            # about the order of a backward pass
            reader.expect(item.name for item in reversed(items))
            columns, prices = _measured(model, reader, batches, room)
        else:
            reader.expect(item.name for item in items)
            prices = prices_without_data(model, items, reader)
        found = choose_rungs(ladder_items(model, prices), cap)
        state = DynamicQuantization(
            found, prices, cap, columns, source, compute_dtype, words, bool(batches)
        )
        apply_rungs(model, items, found.rungs, state, say, reader)
    setattr(model, ATTRIBUTE, state)
    return state


def apply_rungs(
    model: Any,
    items: Iterable[WeightItem],
    rungs: Mapping[str, str],
    state: DynamicQuantization,
    say: Callable[[str], None] | None = None,
    reader: WeightReader | None = None,
) -> None:
    """Make these weights anew on their rungs; those already in 16 bit and to stay so are left.

    Args:
        model, items, rungs, state: what is where, and what is to be.
        say: takes one line for people.
        reader: of the state's source, where one is open already.
    """
    todo = []
    for item in sorted(items, key=lambda item: _added_bytes(item, rungs)):
        rung = rungs.get(item.name)
        if rung is not None and not rung == rung_of(item) == SIXTEEN_BIT:
            todo.append((item, rung))
    device = _device_of(model)
    with contextlib.ExitStack() as stack:
        if reader is None:
            reader = stack.enter_context(WeightReader(state.source, device))
        reader.expect(item.name for item, _ in todo)
        for item, rung in todo:
            with larger_chunks(device):
                place(
                    model,
                    item,
                    rung,
                    reader.take(item.name),
                    column_weights=state.column_weights.get(item.name),
                    compute_dtype=state.compute_dtype,
                )
    if say is not None:
        share = (state.map.bytes - state.plain_bytes) / max(1, state.plain_linear_bytes)
        counts = {r: sum(v == r for v in rungs.values()) for r in sorted(set(rungs.values()))}
        said = ", ".join(f"{count} on {rung}" for rung, count in counts.items())
        say(f"dynamic quantisation: {said}; {share:+.1%} of its linears' bytes")


def _measured(
    model: Any, source: Source, batches: Sequence[Mapping[str, Any]], room: Room
) -> tuple[dict[str, torch.Tensor], Prices]:
    was_training, was_cached = model.training, model.config.use_cache
    model.eval()
    try:
        columns = collect_statistics(model, batches).mean_square
        with _checkpointed(model):
            low = product_dtype(_device_of(model))
            prices = measure_prices(model, batches, source=source, gemm_dtype=low, room=room)
    finally:
        model.train(was_training)
        model.config.use_cache = was_cached
    return columns, prices


class _checkpointed:  # noqa: N801  # used as a function
    """Recompute activations on a GPU, whose memory is what the user has too little of."""

    def __init__(self, model: Any) -> None:
        on_gpu = _device_of(model).type == "cuda"
        self.model = model if on_gpu and model.supports_gradient_checkpointing else None

    def __enter__(self) -> None:
        if self.model is not None:
            # layers checkpoint in training mode only; dropout of the base model is 0 in all of them
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()

    def __exit__(self, *_: object) -> None:
        if self.model is not None:
            self.model.gradient_checkpointing_disable()
            self.model.eval()


def prices_without_data(model: Any, items: Iterable[WeightItem], source: Source) -> Prices:
    """The squared error of the numbers in place of a price: it ranks rungs, and weights hardly."""
    found: Prices = {}
    for item in items:
        weight = source(item.name).detach().to(item.weight.device)
        found[item.name] = {}
        for rung in rungs_of(model, item):
            squares = 0.0 if rung == SIXTEEN_BIT else _squared_error(weight, rung)
            # by output, so that large matrices do not win by their size alone
            by_number, by_output = squares / max(1, weight.numel()), squares / max(1, len(weight))
            found[item.name][rung] = RungPrice((), by_number, by_output)
    return found


def _squared_error(weight: torch.Tensor, rung: str) -> float:
    """Of all numbers together, decoded to float32."""
    found = torch.zeros((), dtype=torch.float64, device=weight.device)
    with larger_chunks(weight.device):
        for part, rounded in rounded_rows(weight, rung, torch.float32):
            squares = (rounded - weight[part].float()).square_()
            found += squares.sum(1).sum(dtype=torch.float64)
    return float(found)


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _added_bytes(item: WeightItem, rungs: Mapping[str, str]) -> int:
    now, shape = rung_of(item), shape_of(item)
    return rung_bytes(shape, rungs.get(item.name, now)) - rung_bytes(shape, now)


def _plain_bytes(model: Any, items: Iterable[WeightItem]) -> tuple[int, int]:
    """Bytes of what plain NF4 quantises, and of what it leaves in 16 bit."""
    nf4, sixteen = 0, 0
    for item in items:
        first = rungs_of(model, item)[0]
        if first.startswith("nf4"):
            nf4 += rung_bytes(shape_of(item), first)
        else:
            sixteen += rung_bytes(shape_of(item), SIXTEEN_BIT)
    return nf4, sixteen


def _tokens(batches: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def needs_16_bit(error: str) -> UserError:
    """The error for a checkpoint that is quantised already."""
    return UserError(
        "this checkpoint is quantised already, so its 16-bit weights are not there to measure "
        "errors against",
        got=error,
        allowed="a 16-bit checkpoint",
        do='Name the 16-bit model, or load this one as it is with quantization="nf4": scale '
        "search, precision ladder and changes during training are then not possible",
    )
