"""What went through a linear or an embedding in one micro-batch, and what errors of its weight do.

Uses of one weight are measured together where they can wait for each other: its matrix is read and
rounded once then, whatever the number of micro-batches. Each has a product of its own, so that the
sums are those of the single uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from colab_qlora.quantization.first_order import (
    FirstOrder,
    lookup_errors,
    shifted_outputs,
    weight_errors,
)
from colab_qlora.quantization.plain_rungs import Quantize
from colab_qlora.quantization.row_chunks import row_slices


@dataclass(frozen=True, eq=False)
class Use:
    """A module's input and its output's gradient.

    Attributes:
        batch: of the micro-batch.
        is_table: an embedding.
        x: (rows, tokens, in), or token ids (rows, tokens).
        gradient: dY, (rows, tokens, out).
        keep: False on padding, (rows, tokens); None: all tokens count.
    """

    batch: int
    is_table: bool
    x: torch.Tensor
    gradient: torch.Tensor
    keep: torch.Tensor | None

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        batch: int,
        mask: torch.Tensor | None,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
    ) -> Use:
        """From what a backward pass shows; an expert's tokens are one row without padding."""
        is_table = isinstance(module, torch.nn.Embedding)
        outputs = (gradient if gradient.ndim > 2 else gradient[None]).detach()
        lead = outputs.shape[:2]
        x = inputs.detach().reshape(lead if is_table else (*lead, -1))
        keep = mask if mask is not None and lead == mask.shape else None
        return cls(batch, is_table, x, outputs, keep)

    @property
    def nbytes(self) -> int:
        """Held as long as the use is; inputs that modules share count for each of them."""
        return self.x.untyped_storage().nbytes() + self.gradient.untyped_storage().nbytes()

    @property
    def tokens(self) -> torch.Tensor | int:
        """How many count; on the device, if that has to be looked up."""
        return self.gradient[..., 0].numel() if self.keep is None else self.keep.sum()


class Change(NamedTuple):
    """Of a use on a rung: <dY, E x> of each row, |E x|^2 of each token, float64."""

    rung: str
    use: Use
    changes: torch.Tensor
    squares: torch.Tensor


def changes_of(
    uses: Sequence[Use],
    read: Callable[[], torch.Tensor],
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
    low: torch.dtype | None,
) -> Iterator[Change]:
    """What each rung does to each use of one weight.

    Args:
        uses: of one weight; a tied one may be a table in some and a linear in others.
        read: gives W_16.
        rungs: below 16 bit.
        quantize, column_weights: see `plain_rungs.Quantize`.
        low: dtype of E x; None: float32, or float64 if dY is.
    """
    rungs = tuple(rungs)
    if not rungs:
        return
    weight = read().detach()
    linear = [use for use in uses if not use.is_table]
    if linear:
        like = linear[0].gradient
        for rung, errors in weight_errors(weight, rungs, quantize, column_weights, like):
            sums = [FirstOrder(use.gradient) for use in linear]
            most = max(max(use.gradient[..., 0].numel(), use.x.shape[-1]) for use in linear)
            for part in row_slices(like.shape[-1], most):
                outputs = shifted_outputs([use.x for use in linear], errors(part), low)
                for own, moved in zip(sums, outputs, strict=True):
                    own.add_(part, moved)
            for use, own in zip(linear, sums, strict=True):
                yield Change(rung, use, *own.sums(use.keep))
    for use in uses:
        if use.is_table:
            yield from _table_changes(use, weight, rungs, quantize, column_weights)


def _table_changes(
    use: Use,
    weight: torch.Tensor,
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
) -> Iterator[Change]:
    errors = lookup_errors(weight, rungs, quantize, column_weights, use.x, use.gradient)
    for rung, moved in errors:
        sums = FirstOrder(use.gradient)
        for part in row_slices(use.gradient.shape[-1], max(1, use.x.numel())):
            sums.add_(part, moved(part))
        yield Change(rung, use, *sums.sums(use.keep))
