"""Measure what each rung of precision would cost each weight in loss: directional Fisher.

    dL_b = sum over tokens t of <dY_t, E x_t>,   E = W_rung - W_16

dY is the gradient of micro-batch b's mean loss with respect to the weight's output. dL_b is the
loss's Taylor term <G_b, E> with G_b the weight's gradient, which is neither computed nor stored: x
and dY are met in the backward pass, and E x costs a GEMM a rung. Near a minimum dL averages out and
its square does not: its mean is vec(E)' F vec(E) with F the empirical Fisher, and half of that, for
one token's loss, is the second-order term of the KL to the 16-bit model (F in place of the Hessian,
as after Optimal Brain Surgeon; bits chosen by it: LQ-LoRA, arXiv 2311.12023; what the empirical
Fisher misses: arXiv 1905.12558). With the user's labels it also counts a mean gradient that is not
0, which is the first-order change itself.

Where a GPU's memory is free, x and dY wait until the last micro-batch, so that each weight is read
and rounded once.

How the changes become a price, and what guards it, is in `rung_prices.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import BatchWindow, WeightItem, weight_items
from colab_qlora.quantization.budget import SIXTEEN_BIT
from colab_qlora.quantization.memory_room import Room, larger_chunks
from colab_qlora.quantization.module_use import Use, changes_of
from colab_qlora.quantization.plain_rungs import Quantize, plain_quantize, rungs_of
from colab_qlora.quantization.price_sums import PriceSums
from colab_qlora.quantization.rung_prices import Prices, RungPrice, ladder_items

__all__ = [
    "BrokenNumbers",
    "PriceMeter",
    "Prices",
    "RungPrice",
    "ladder_items",
    "measure_prices",
    "plain_quantize",
    "rungs_of",
]

# a mean loss's gradients underflow in float16; where the first scale overflows the next is tried
_FLOAT16_LOSS_SCALES = (2.0**13, 2.0**8, 2.0**3)


class BrokenNumbers(UserError):
    """Prices are infinite or NaN."""


class PriceMeter:
    """Measures while it is entered, in whatever forward and backward passes of the model run.

    Each forward pass of the model is a micro-batch. No weight gets a gradient that it would not
    have had; with activation checkpointing, what the meter saves is recomputed like all the rest.

    Args:
        model: a causal language model, with or without adapters, 16-bit or quantised.
        source: gives a weight's 16-bit matrix by name; None: the model's own weights, which have to
            be 16-bit or more.
        quantize: see `Quantize`.
        column_weights: E[x_j^2] by name (`ActivationStatistics.mean_square`), for `quantize`.
        gemm_dtype: of E x (`product_dtype`); None: float32, or float64 in a float64 model.
        loss_scale: what the loss is multiplied by before backward (1 / accumulation steps, or more
            for float16); prices are of the loss itself.
        room: for x and dY of micro-batches that wait for later ones; None: none of them does.

    Attributes:
        anchors: embeddings' outputs in the latest pass: all that needs a gradient lies above them.
        is_waiting: whether another micro-batch follows the present one; whoever knows sets it.
    """

    def __init__(
        self,
        model: Any,
        source: Callable[[str], torch.Tensor] | None = None,
        quantize: Quantize = plain_quantize,
        column_weights: Mapping[str, torch.Tensor] | None = None,
        *,
        gemm_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
        room: Room | None = None,
    ) -> None:
        self.anchors: list[torch.Tensor] = []
        self.is_waiting = False
        self._anchored = 0
        self._model, self._hooks, self._window = model, ExitStack(), BatchWindow()
        self._items = {item.name: item for item in weight_items(model)}
        self._rungs = {name: rungs_of(model, item) for name, item in self._items.items()}
        self._source = source or functools.partial(_own_weight, self._items)
        self._quantize, self._column_weights = quantize, column_weights or {}
        self._gemm_dtype, self._room = gemm_dtype, room or Room()
        self._sums = PriceSums(loss_scale)
        # by weight: uses, with what each has claimed
        self._waiting: dict[str, list[tuple[Use, int]]] = defaultdict(list)

    def __enter__(self) -> PriceMeter:
        with ExitStack() as hooks:
            self._window.hook(self._model, hooks)
            hooks.callback(self.anchors.clear)
            for name, item in self._items.items():
                for module in item.modules:
                    hook = functools.partial(self._watch, name)
                    hooks.callback(module.register_forward_hook(hook).remove)
            # kept only if all of them could be registered
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def _watch(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Put a probe behind the module; a forward hook."""
        if not torch.is_grad_enabled():
            return None
        if isinstance(module, torch.nn.Embedding) and self._window.is_open:
            # below a frozen embedding nothing would require a gradient
            if not output.requires_grad:
                output.requires_grad_()
            # those of earlier passes would be kept alive for nothing
            if self._anchored != self._window.passes:
                self.anchors.clear()
            self._anchored = self._window.passes
            self.anchors.append(output)
        if not output.requires_grad:
            return None
        seen = functools.partial(
            self._measure, name, module, self._window.passes, self._window.mask
        )
        return _Probe.apply(output, args[0], seen)

    def _measure(
        self,
        name: str,
        module: torch.nn.Module,
        batch: int,
        mask: torch.Tensor | None,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """Keep what x and dY say about each rung of a weight; runs in the backward pass."""
        use = Use.of(module, batch, mask, inputs, gradient)
        waits = self.is_waiting and self._room.claim(use.nbytes)
        self._waiting[name].append((use, use.nbytes if waits else 0))
        if not waits:
            self._add_up(name)

    @torch.no_grad()
    def _add_up(self, name: str) -> None:
        """Add what the uses of a weight say that wait."""
        uses, claimed = zip(*self._waiting.pop(name), strict=True)
        rungs = [rung for rung in self._rungs[name] if rung != SIXTEEN_BIT]
        with larger_chunks(uses[0].gradient.device):
            self._sums.add(
                name,
                uses,
                changes_of(
                    uses,
                    functools.partial(self._source, name),
                    rungs,
                    self._quantize,
                    self._column_weights.get(name),
                    self._gemm_dtype,
                ),
            )
        self._room.give_back(sum(claimed))

    def prices(self) -> Prices:
        """What was measured so far, by weight and rung; 16 bit costs nothing.

        Raises:
            UserError: no backward pass came by.
            BrokenNumbers: some are infinite or NaN.
        """
        # weights that the last micro-batch did not use, such as an expert's
        for name in list(self._waiting):
            self._add_up(name)
        if not self._sums.tokens:
            raise UserError(
                "no price was measured",
                got="no backward pass",
                allowed="a few micro-batches with labels, forward and backward",
            )
        found: Prices = {}
        for name, rungs in self._rungs.items():
            if not self._sums.tokens.get(name):
                continue
            found[name] = {}
            for rung in rungs:
                price = self._sums.price(name, rung)
                if not math.isfinite(price.price + price.output_error):
                    raise BrokenNumbers(
                        f"the price of {name} on {rung} is infinite or NaN",
                        do="Look whether the loss of the calibration data is, or use bfloat16",
                    )
                found[name][rung] = price
        return found


class _Probe(torch.autograd.Function):
    """Passes its input on, and shows `seen` the module's input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Any, inputs: Any, seen: Any) -> Any:
        # saved this way, activation checkpointing drops and recomputes it
        ctx.save_for_backward(inputs)
        ctx.seen = seen
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        with torch.no_grad():
            ctx.seen(*ctx.saved_tensors, gradient)
        return gradient, None, None


def measure_prices(model: Any, batches: Iterable[Mapping[str, Any]], **options: Any) -> Prices:
    """Prices of all weights and rungs from a forward and backward pass over each of `batches`.

    Gradients go to the embedding's output and nowhere else: no parameter's `grad` or
    `requires_grad` changes. The model stays in the mode it is in; dropout would be noise. A model
    that computes in float16 gets a loss scale, and is measured again if that was too much.

    Args:
        model: as for `PriceMeter`, like `options`, of which `loss_scale` is chosen here.
        batches: keyword arguments of the model's forward, labels among them.

    Raises:
        UserError: a batch without labels, a loss that is infinite or NaN, no batch.
    """
    given = list(batches)
    if _computes_in_float16(model):
        for scale in _FLOAT16_LOSS_SCALES:
            with contextlib.suppress(BrokenNumbers):
                return _measured(model, given, loss_scale=scale, **options)
    return _measured(model, given, **options)


def _measured(
    model: Any, batches: Sequence[Mapping[str, Any]], loss_scale: float = 1.0, **options: Any
) -> Prices:
    meter = PriceMeter(model, loss_scale=loss_scale, **options)
    with meter, torch.enable_grad():
        for index, batch in enumerate(batches):
            meter.is_waiting = index + 1 < len(batches)
            loss = model(**{"use_cache": False, **batch}).loss
            if loss is None or not torch.isfinite(loss):
                raise UserError(
                    f"micro-batch {index} has no loss to measure prices by",
                    got="no labels" if loss is None else f"a loss of {loss.item()}",
                    allowed="labels on some tokens, and a finite loss",
                    do="Look at the calibration data with show_tokens",
                )
            # a loss in float16 would overflow
            scaled = loss.float() * loss_scale if loss_scale != 1.0 else loss
            torch.autograd.grad(scaled, meter.anchors, allow_unused=True)
    return meter.prices()


def _computes_in_float16(model: torch.nn.Module) -> bool:
    """Also where the weights are packed and only modules say what they are decoded to."""
    return any(parameter.dtype == torch.float16 for parameter in model.parameters()) or any(
        getattr(module, "compute_dtype", None) == torch.float16 for module in model.modules()
    )


def _own_weight(items: Mapping[str, WeightItem], name: str) -> torch.Tensor:
    weight = items[name].weight
    if not weight.is_floating_point() or weight.ndim != 2:
        raise UserError(
            f"{name} is quantised already, so its error cannot be measured",
            got=f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}",
            allowed="a 16-bit checkpoint as the source",
            do="Load the model's 16-bit checkpoint",
        )
    return weight
