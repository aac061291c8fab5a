"""Prices of all rungs in the middle of a training, on its own micro-batches, without disturbing it.

The model is measured as it is then: adapters active, weights on their present rungs, errors against
the 16-bit source. E[x_j^2] comes from the same forward passes. What the training would notice is
put back: modes of modules, checkpointing flags, random numbers, fused layers and their plans.
Gradients go to the embedding's output, and to no parameter.

A training step's units are not a calibration's: batches have other sizes, and gradients shrink as
the loss falls, which moves all prices by a common factor. `smoothed` takes that factor out before
it averages (the median over the weights, which one outlier does not move) and leaves the new units.

The average is exponential, half earlier and half new. A price from a few rows is a mean of squares
with few degrees of freedom: its noise is of its own size, and a map that followed it would move
weights for nothing. Halves leave a third of one measurement's variance in the long run, and after
three points an eighth of the weight to the calibration, which knew nothing of the training.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import unfused
from colab_qlora.models.host_embedding import compute_device
from colab_qlora.models.stock_checkpointing import checkpointed_layers
from colab_qlora.quantization.activation_statistics import ActivationCollector
from colab_qlora.quantization.first_order import product_dtype
from colab_qlora.quantization.prices import PriceMeter
from colab_qlora.quantization.rung_prices import Prices, RungPrice

__all__ = ["BrokenPrices", "LivePrices", "measure_live", "smoothed"]

_ABSENT = object()
_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")


class BrokenPrices(UserError):
    """Prices, activations or the loss were infinite or NaN, or there was nothing to measure."""


@dataclass(frozen=True)
class LivePrices:
    """What was measured at one point of a training.

    Attributes:
        prices: by weight and rung, in units of the passes' own losses; without single rows.
        mean_square: E[x_j^2] of linears by name, (columns,), float32, on the CPU.
    """

    prices: Prices
    mean_square: dict[str, torch.Tensor]


def measure_live(
    model: Any,
    source: Callable[[str], torch.Tensor],
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_scale: float = 1.0,
) -> LivePrices:
    """Measure prices and E[x_j^2] with a forward and backward pass over each micro-batch.

    Every decoder layer is recomputed in the backward pass, whatever the training does, since the
    model's own code keeps more than fused layers do.

    Args:
        model: in training, with or without fused layers.
        source: gives a weight's 16-bit matrix by name.
        batches: keyword arguments of the model's forward, labels among them.
        loss_scale: what the loss is multiplied by, for gradients in float16.

    Raises:
        BrokenPrices: no labels, or numbers that are infinite or NaN.
        SourceGone: the source cannot be read, as it says so itself.
    """
    device = compute_device(model)
    meter = PriceMeter(model, source, gemm_dtype=product_dtype(device), loss_scale=loss_scale)
    collector = ActivationCollector(model)
    passes = 0
    with unfused(model), _measuring(model, device), collector, meter, torch.enable_grad():
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items()}
            if not _has_labels(given):
                continue
            loss = model(**{"use_cache": False, **given}).loss
            if not torch.isfinite(loss):
                raise BrokenPrices("the loss is not finite", got=loss.item())
            torch.autograd.grad(loss * loss_scale, meter.anchors, allow_unused=True)
            passes += 1
    if not passes:
        raise BrokenPrices("no row of the last micro-batches has labels")
    try:
        prices, columns = meter.prices(), collector.statistics().mean_square
    except UserError as error:  # both say this of numbers that are infinite or NaN
        raise BrokenPrices(error.problem, got=error.got) from error
    return LivePrices(_without_rows(prices), columns)


def smoothed(earlier: Prices, now: Prices, share: float) -> Prices:
    """The average of earlier and new prices, in the units of the new ones.

    Args:
        earlier: of the same weights, from other batches; may lack some, or all.
        now: measured just now; a weight that it lacks (an expert that no token went to) keeps its
            earlier prices.
        share: of the earlier ones, 0 to below 1.
    """
    factor = _common_factor(earlier, now)
    found: Prices = {}
    for name in {**earlier, **now}:
        before, measured = earlier.get(name, {}), now.get(name, {})
        found[name] = {}
        for rung in {**before, **measured}:
            old, new = before.get(rung), measured.get(rung)
            if old is not None and new is not None:
                price = share * factor * old.price + (1 - share) * new.price
                error = share * old.output_error + (1 - share) * new.output_error
            else:
                one = new or old
                assert one is not None
                price = one.price * (1.0 if new is not None else factor)
                error = one.output_error
            found[name][rung] = _price_of(price, error)
    return found


def _common_factor(earlier: Prices, now: Prices) -> float:
    """How many times dearer weights are now, by the median over their dearest rungs."""
    pairs = [(_dearest(earlier[name]), _dearest(now[name])) for name in earlier if name in now]
    ratios = [new / old for old, new in pairs if old > 0 and new > 0]
    return statistics.median(ratios) if ratios else 1.0


def _dearest(rungs: Mapping[str, RungPrice]) -> float:
    return max((price.price for price in rungs.values()), default=0.0)


def _price_of(price: float, output_error: float) -> RungPrice:
    # an average is no sum over rows any more; the guard alone makes the price then
    return RungPrice((), price, output_error)


def _without_rows(prices: Prices) -> Prices:
    return {
        name: {rung: _price_of(price.price, price.output_error) for rung, price in rungs.items()}
        for name, rungs in prices.items()
    }


def _has_labels(batch: Mapping[str, torch.Tensor]) -> bool:
    labels = batch.get("labels")
    return labels is not None and bool((labels[..., 1:] != -100).any())


@contextlib.contextmanager
def _measuring(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """No dropout, every layer recomputed; all as it was afterwards, random numbers too."""
    modes = [(module, module.training) for module in model.modules()]
    layers = checkpointed_layers(model)
    places = [(layer.__dict__, name) for layer in layers for name in _FLAGS]
    flags = [(place, name, place.get(name, _ABSENT)) for place, name in places]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for module, _ in modes:
                module.training = False
            for layer in layers:
                # a layer checkpoints in training mode only; what drops out is further inside
                layer.training = layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(
                    checkpoint, use_reentrant=False
                )
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training
            for place, name, before in flags:
                if before is _ABSENT:
                    place.pop(name, None)
                else:
                    place[name] = before
