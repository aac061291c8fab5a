"""LoRA's dropout from a seed: y += s * ((x * mask / (1 - p)) A^T) B^T.

The mask is not kept (it would cost a byte for every number of x); the seed is, and the backward
pass draws the same mask again.
"""

from __future__ import annotations

import torch


def _mask(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return kept.bernoulli_(1.0 - share, generator=generator)


def drop(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """x (tokens, features) with a `share` of its numbers at zero and the rest scaled up."""
    if share >= 1.0:
        return torch.zeros_like(x)
    return x * _mask(x, share, seed) * (1.0 / (1.0 - share))


def dropped_gradient_(
    dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, share: float, seed: int
) -> None:
    """Add the adapter's part of the input's gradient, (ds A) * mask / (1 - p), to dx."""
    dx += drop(ds @ a.detach().to(ds.dtype), share, seed)
