"""What an attention is computed over: lengths, heads, documents, and who may see whom.

A query row i may see a key j if all of these hold: i and j are in the same row of the batch (or in
the same document, where documents are packed); j <= i, if causal; i - j < window, if there is one;
and the mask allows it. A row that may see nothing gives zeros and passes no gradient on: that is
what the padding rows of a left-padded batch are.

What is derived from the shape (the additive mask, the index tensors) is made once and kept in it,
since the layers of a model share one shape a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.errors import UserError

# rows of an additive mask start at multiples of 16 elements: 32 bytes in half precision, twice what
# the vector loads of the memory-efficient kernel need, and what torch itself pads to
_MASK_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class AttentionShape:
    """The shape of one attention call; tokens = batch * seq_length.

    Attributes:
        batch: rows of the batch.
        seq_length: tokens a row, padding included.
        q_heads: query heads, a multiple of `kv_heads`.
        kv_heads: key and value heads; query head h reads key head h // (q_heads // kv_heads).
        head_dim: columns a head.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: True if a row sees no later row.
        cu_seqlens: int32 (documents + 1,): where the packed documents start, then `tokens`; None if
            the rows of the batch are not packed.
        documents: the same as (start, end) pairs on the host; asked for below compute capability
            8.0 and on the CPU, where reading `cu_seqlens` back would stop the GPU.
        max_seqlen: tokens of the longest document; taken from `documents` if None.
        mask: (batch, 1 or q_heads, seq_length, seq_length): bool, True where a row may look, or
            floating-point, added to the scores. It comes on top of `causal` and `window`.
        window: tokens that a row sees, itself included; needs `causal`.
        cap: scores s become cap * tanh(s / cap) before the mask, as in Gemma 2; None: as they are.

    Raises:
        UserError: the fields contradict each other.
    """

    batch: int
    seq_length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    cu_seqlens: torch.Tensor | None = None
    documents: tuple[tuple[int, int], ...] | None = None
    max_seqlen: int | None = None
    mask: torch.Tensor | None = None
    window: int | None = None
    cap: float | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.q_heads % self.kv_heads or self.q_heads < 1:
            raise UserError(
                "q_heads is not a multiple of kv_heads",
                got=f"q_heads={self.q_heads}, kv_heads={self.kv_heads}",
                allowed="such as 32 and 8",
            )
        if self.window is not None and (self.window < 1 or not self.causal):
            raise UserError(
                "window is not understood",
                got=f"window={self.window}, causal={self.causal}",
                allowed="1 or more, with causal=True",
            )
        if self.cap is not None and not 0 < self.cap < math.inf:
            raise UserError(
                "cap is not a positive, finite number", got=self.cap, allowed="None, or above 0"
            )
        self._check_mask()
        self._check_documents()

    @property
    def tokens(self) -> int:
        """Rows of q, k and v."""
        return self.batch * self.seq_length

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q_heads // self.kv_heads

    @property
    def packed(self) -> bool:
        """True if the tokens are documents one after the other."""
        return self.cu_seqlens is not None or self.documents is not None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that attends to itself."""
        if not self.packed:
            return self.seq_length
        if self.max_seqlen is not None:
            return self.max_seqlen
        return max((end - start for start, end in self.bounds()), default=0)

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """What a kernel has to know beyond dense and causal: "mask", "packed", "window", "cap"."""
        has = {
            "mask": self.mask is not None,
            "packed": self.packed,
            "window": self.window is not None and self.window < self.longest,
            "cap": self.cap is not None,
        }
        return frozenset(name for name, present in has.items() if present)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of every document; waits for the GPU, once, if only it knows them."""
        if self.documents is not None:
            return self.documents
        assert self.cu_seqlens is not None
        ends = self.kept("ends", self.cu_seqlens.tolist)
        return tuple(zip(ends[:-1], ends[1:], strict=True))

    def boundaries(self, device: torch.device) -> torch.Tensor:
        """int32 (sequences + 1,) on `device`: `cu_seqlens`, or the rows of a batch in that form."""
        return self.kept(("boundaries", device), lambda: self._boundaries(device))

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token its document's number and its place in it, int64 (tokens,) each."""
        return self.kept(("places", device), lambda: self._places(device))

    def runs(self) -> list[tuple[int, int, int]]:
        """The documents as (start, how many, tokens each): neighbours of one length are a batch."""
        found: list[tuple[int, int, int]] = []
        for start, end in self.bounds():
            if found and found[-1][2] == end - start:
                found[-1] = (found[-1][0], found[-1][1] + 1, end - start)
            else:
                found.append((start, 1, end - start))
        return found

    def of_run(self, count: int, length: int) -> AttentionShape:
        """The shape of `count` neighbouring documents of `length` tokens, as a batch of its own."""
        heads = (self.q_heads, self.kv_heads, self.head_dim, self.scale, self.causal)
        return self.kept(
            ("run", count, length),
            lambda: AttentionShape(count, length, *heads, window=self.window, cap=self.cap),
        )

    def bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """What mask, window and causality add to the scores, or None if causality says it all.

        Returns:
            (batch or 1, q_heads or 1, seq_length, seq_length) in `dtype`, each row starting at a
            multiple of 16 elements. What is hidden has the lowest finite number: with -inf a row
            that sees nothing would be NaN.
        """
        if not self.features & {"mask", "window"}:
            return None
        return self.kept(("bias", dtype, device), lambda: self._bias(dtype, device))

    def blind_rows(self, device: torch.device) -> torch.Tensor | None:
        """bool (batch, 1 or q_heads, seq_length): rows that see nothing; None without a mask."""
        if self.mask is None:
            return None
        return self.kept(("blind", device), lambda: self._hidden(device).all(-1))

    def _boundaries(self, device: torch.device) -> torch.Tensor:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.to(device).contiguous()
        if self.documents is not None:
            ends = [0, *(end for _, end in self.documents)]
            return torch.tensor(ends, dtype=torch.int32, device=device)
        return torch.arange(self.batch + 1, dtype=torch.int32, device=device) * self.seq_length

    def _places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        starts = self.boundaries(device).long()
        number = torch.arange(starts.numel() - 1, device=device)
        number = number.repeat_interleave(starts.diff(), output_size=self.tokens)
        return number, torch.arange(self.tokens, device=device) - starts[number]

    def _bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        hidden = self._hidden(device)
        lowest = torch.finfo(dtype).min
        width = -(-self.seq_length // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        wide = torch.zeros((*hidden.shape[:3], width), dtype=dtype, device=device)
        bias = wide[..., : self.seq_length]
        if self.mask is not None and self.mask.is_floating_point():
            bias.copy_(self.mask).clamp_(min=lowest)
        return bias.masked_fill_(hidden, lowest)

    def _hidden(self, device: torch.device) -> torch.Tensor:
        """bool (batch or 1, q_heads or 1, seq_length, seq_length): True where no row may look."""
        place = torch.arange(self.seq_length, device=device)
        hidden = place[:, None] < (place if self.causal else 0)
        if self.window is not None:
            hidden = hidden | (place[:, None] >= place + self.window)
        hidden = hidden.expand(self.seq_length, self.seq_length)[None, None]
        if self.mask is None:
            return hidden
        mask = self.mask.to(device)
        if mask.dtype == torch.bool:
            return hidden | ~mask
        # masks are written with the lowest number of their own dtype, or with -inf
        return hidden | (mask < torch.finfo(mask.dtype).min / 2)

    def _check_mask(self) -> None:
        if self.mask is None:
            return
        if self.packed:
            raise UserError(
                "mask cannot be combined with packed documents",
                got="mask and cu_seqlens",
                allowed="one of the two",
            )
        if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
            raise UserError(
                "mask has an unknown dtype",
                got=self.mask.dtype,
                allowed="torch.bool (True where a row may look) or a floating-point dtype",
            )
        square = (self.seq_length, self.seq_length)
        allowed = [(self.batch, heads, *square) for heads in (1, self.q_heads)]
        if tuple(self.mask.shape) not in allowed:
            raise UserError(
                "mask has the wrong shape",
                got=tuple(self.mask.shape),
                allowed=f"{allowed[0]} or {allowed[1]}",
            )

    def _check_documents(self) -> None:
        starts = self.cu_seqlens
        if starts is not None and (starts.dtype != torch.int32 or starts.dim() != 1):
            raise UserError(
                "cu_seqlens has the wrong dtype or shape",
                got=f"{starts.dtype}, {tuple(starts.shape)}",
                allowed="torch.int32, (documents + 1,)",
            )
        if self.documents is None and (starts is None or starts.device.type != "cpu"):
            return
        bounds = self.bounds()
        ends = [0, *(end for _, end in bounds)]
        tiled = all(
            begin == before < end for before, (begin, end) in zip(ends, bounds, strict=False)
        )
        if not tiled or ends[-1] != self.tokens:
            raise UserError(
                "documents do not follow each other from the first token to the last",
                got=bounds,
                allowed=f"(0, a), (a, b), ..., (c, {self.tokens}), none of them empty",
            )
        if starts is not None and starts.numel() != len(ends):
            raise UserError(
                "cu_seqlens and documents differ",
                got=f"{starts.numel() - 1} and {len(bounds)} documents",
                allowed="the same bounds",
            )
        if self.max_seqlen is not None and any(b - a > self.max_seqlen for a, b in bounds):
            raise UserError(
                "max_seqlen is shorter than a document",
                got=self.max_seqlen,
                allowed=f"{max(b - a for a, b in bounds)} or more",
            )
