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

How the changes become a price, and what guards it, is in `rung_prices.py`.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import BatchWindow, WeightItem, weight_items
from colab_qlora.quantization.budget import SIXTEEN_BIT
from colab_qlora.quantization.plain_rungs import Quantize, plain_quantize, rungs_of
from colab_qlora.quantization.rung_prices import Prices, RungPrice, ladder_items

__all__ = [
    "PriceMeter",
    "Prices",
    "RungPrice",
    "ladder_items",
    "measure_prices",
    "plain_quantize",
    "rungs_of",
]

# numbers of E x at a time; a head's would be tokens times vocabulary
_CHUNK = 2**24


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
        gemm_dtype: of E x (bfloat16 on a GPU); None: float32, or float64 in a float64 model.
        loss_scale: what the loss was multiplied by before backward (1 / accumulation steps).
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
    ) -> None:
        # embeddings' outputs in the latest pass: all that needs a gradient lies above them
        self.anchors: list[torch.Tensor] = []
        self._anchored = 0
        self._model, self._hooks, self._window = model, ExitStack(), BatchWindow()
        self._items = {item.name: item for item in weight_items(model)}
        self._rungs = {name: rungs_of(model, item) for name, item in self._items.items()}
        self._source = source or functools.partial(_own_weight, self._items)
        self._quantize, self._column_weights = quantize, column_weights or {}
        self._gemm_dtype, self._loss_scale = gemm_dtype, loss_scale
        # by weight and rung, then by micro-batch
        self._changes: dict[tuple[str, str], dict[int, torch.Tensor]] = defaultdict(dict)
        self._guards: dict[tuple[str, str], torch.Tensor] = {}
        self._squares: dict[tuple[str, str], torch.Tensor] = {}
        self._tokens: dict[str, int] = defaultdict(int)

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
        """Add what x and dY say about each rung of a weight; runs in the backward pass."""
        is_table = isinstance(module, torch.nn.Embedding)
        outputs = gradient if gradient.ndim > 2 else gradient[None]
        keep = mask if mask is not None and outputs.shape[:2] == mask.shape else None
        x = inputs.detach().reshape(outputs.shape[:2] if is_table else (*outputs.shape[:2], -1))
        outputs = outputs.detach() / self._loss_scale
        steepness = outputs.double().square().mean(-1)
        for rung, error in self._errors(name, outputs):
            changes, squares = _first_order(error, x, outputs, keep, is_table)
            key, before = (name, rung), self._changes[name, rung].get(batch)
            # a tied tensor has one change: that of all its uses
            self._changes[key][batch] = changes if before is None else _both(before, changes)
            for sums, value in (
                (self._guards, (steepness * squares).sum()),
                (self._squares, squares.sum()),
            ):
                sums[key] = sums[key] + value if key in sums else value
        self._tokens[name] += int(keep.sum()) if keep is not None else outputs[..., 0].numel()

    def _errors(self, name: str, like: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        weight = self._source(name).detach().to(like.device)
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        for rung in self._rungs[name]:
            if rung != SIXTEEN_BIT:
                rounded = self._quantize(weight, rung, self._column_weights.get(name))
                yield rung, (rounded.to(wide) - weight.to(wide)).to(self._gemm_dtype or wide)

    def prices(self) -> Prices:
        """What was measured so far, by weight and rung; 16 bit costs nothing.

        Raises:
            UserError: no backward pass came by, or some numbers are infinite or NaN.
        """
        if not self._changes:
            raise UserError(
                "no price was measured",
                got="no backward pass",
                allowed="a few micro-batches with labels, forward and backward",
            )
        found: Prices = {}
        for name, rungs in self._rungs.items():
            if not self._tokens[name]:
                continue
            found[name] = {}
            for rung in rungs:
                price = self._price(name, rung)
                if not math.isfinite(price.price + price.output_error):
                    raise UserError(
                        f"the price of {name} on {rung} is infinite or NaN",
                        do="Look whether the loss of the calibration data is, or use bfloat16",
                    )
                found[name][rung] = price
        return found

    def _price(self, name: str, rung: str) -> RungPrice:
        key = name, rung
        if key not in self._changes:
            return RungPrice()
        changes = tuple(tuple(rows.tolist()) for _, rows in sorted(self._changes[key].items()))
        guard = float(self._guards[key]) / len(changes)
        return RungPrice(changes, guard, float(self._squares[key]) / self._tokens[name])


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
    `requires_grad` changes. The model stays in the mode it is in; dropout would be noise.

    Args:
        model: as for `PriceMeter`, like `options`.
        batches: keyword arguments of the model's forward, labels among them.

    Raises:
        UserError: a batch without labels, a loss that is infinite or NaN, no batch.
    """
    with PriceMeter(model, **options) as meter, torch.enable_grad():
        for index, batch in enumerate(batches):
            loss = model(**{"use_cache": False, **batch}).loss
            if loss is None or not torch.isfinite(loss):
                raise UserError(
                    f"micro-batch {index} has no loss to measure prices by",
                    got="no labels" if loss is None else f"a loss of {loss.item()}",
                    allowed="labels on some tokens, and a finite loss",
                    do="Look at the calibration data with show_tokens",
                )
            torch.autograd.grad(loss, meter.anchors, allow_unused=True)
    return meter.prices()


def _first_order(
    error: torch.Tensor,
    x: torch.Tensor,
    gradient: torch.Tensor,
    keep: torch.Tensor | None,
    is_table: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(<dY, E x> of each row, |E x|^2 of each token: 0 where `keep` is False), in float64.

    Args:
        error: E, shape (out, in), or (vocabulary, out) of a table.
        x: shape (rows, tokens, in), or token ids of shape (rows, tokens).
        gradient: dY, shape (rows, tokens, out).
        keep: False on padding, shape (rows, tokens).
    """
    changes = gradient.new_zeros(gradient.shape[0], dtype=torch.float64)
    squares = gradient.new_zeros(gradient.shape[:2], dtype=torch.float64)
    width = gradient.shape[-1]
    step = max(1, _CHUNK // max(1, gradient[..., 0].numel()))
    for start in range(0, width, step):
        part = slice(start, min(start + step, width))
        shifted = error[x, part] if is_table else x.to(error.dtype) @ error[part].T
        if shifted.dtype not in (torch.float32, torch.float64):
            shifted = shifted.float()
        if keep is not None:
            shifted = shifted.masked_fill(~keep.to(shifted.device)[..., None], 0.0)
        met = shifted * gradient[..., part].to(shifted.dtype)
        changes += met.sum((1, 2), dtype=torch.float64)
        squares += shifted.square().sum(-1, dtype=torch.float64)
    return changes, squares


def _both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    # uses that are laid out differently agree in their sums only
    return first + second if first.shape == second.shape else (first.sum() + second.sum())[None]


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
