"""Documents packed into one batch, and the stand-in for a mask that tells the layers of them.

transformers hands a mask of four dimensions to every layer as it is. The stand-in is such a
tensor of one number that carries the documents, so that each call has those of its own batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_ATTRIBUTE = "colab_qlora_documents"


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents packed into one batch, one after the other over its rows.

    Attributes:
        bounds: (first token, one past the last) of each.
        cu_seqlens: int32 (documents + 1,), the same on the batch's device.
        longest: tokens of the longest.
    """

    bounds: tuple[tuple[int, int], ...]
    cu_seqlens: torch.Tensor
    longest: int

    def mask(self, batch: int, length: int, window: int | None) -> torch.Tensor:
        """bool (batch, 1, length, length) for code that knows masks only; True where visible."""
        device = self.cu_seqlens.device
        place = torch.arange(batch * length, dtype=torch.int32, device=device)
        number = torch.searchsorted(self.cu_seqlens, place, right=True).view(batch, length)
        order = place[:length]
        seen = (number[:, :, None] == number[:, None, :]) & (order[:, None] >= order)
        if window is not None:
            seen &= order[:, None] - order < window
        return seen[:, None]


def stand_in(documents: Documents | None, device: torch.device) -> torch.Tensor:
    """A mask that says: causal, and within these documents if there are any."""
    mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    setattr(mask, _ATTRIBUTE, documents)
    return mask


def is_stand_in(mask: Any) -> bool:
    return hasattr(mask, _ATTRIBUTE)


def documents_of(mask: Any) -> Documents | None:
    """The documents that a stand-in carries; None for any other mask."""
    return getattr(mask, _ATTRIBUTE, None)


def stock_mask(
    documents: Documents | None, hidden: torch.Tensor, window: int | None, kind: str
) -> torch.Tensor | None:
    """What a stand-in means, for the model's own attention code.

    Args:
        hidden: (batch, length, width), the layer's input.
        window: reach of the attention in tokens, or None.
        kind: the model's attention implementation; "eager" adds its mask to the scores, the
            others know without one what causal means, and all but "sdpa" know windows too.
    """
    batch, length = hidden.shape[:2]
    if documents is None:
        knows = kind not in ("eager", "sdpa") or window is None or window >= length
        if kind != "eager" and knows:
            return None
        rows = tuple((i * length, (i + 1) * length) for i in range(batch))
        starts = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        documents = Documents(rows, starts, length)
    seen = documents.mask(batch, length, window)
    if kind != "eager":
        return seen
    added = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
    return added.masked_fill_(~seen, torch.finfo(hidden.dtype).min)
