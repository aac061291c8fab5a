"""Call a linear that cannot be fused as the model would, and differentiate it by autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from colab_qlora.layers.gradients import Gradients


class ModuleCall:
    """One forward call of a module; its backward pass repeats it with the same random numbers."""

    def __init__(self, autocast: tuple[bool, torch.dtype]) -> None:
        self._autocast = autocast
        self._cpu_state: torch.Tensor | None = None
        self._cuda_state: torch.Tensor | None = None

    def forward(
        self, module: torch.nn.Module, x: torch.Tensor, lead: tuple[int, ...] | None
    ) -> torch.Tensor:
        """module(x) without a graph; x and the result are (tokens, features)."""
        first = self._cpu_state is None
        if first:
            self._cpu_state = torch.get_rng_state()
            self._cuda_state = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        with torch.no_grad(), contextlib.nullcontext() if first else self._same_numbers(x):
            return self._call(module, x, lead)

    def backward(
        self,
        module: torch.nn.Module,
        x: torch.Tensor,
        dy: torch.Tensor,
        dx: torch.Tensor | None,
        lead: tuple[int, ...] | None,
        gradients: Gradients,
    ) -> None:
        """Add the input's gradient to `dx`, and the parameters' to `gradients`."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        with torch.enable_grad(), self._same_numbers(x):
            seen = x.detach().clone().requires_grad_(dx is not None)
            y = self._call(module, seen, lead)
        wanted = [*([seen] if dx is not None else []), *parameters]
        if not wanted or not y.requires_grad:
            return
        found = list(torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True))
        if dx is not None:
            down = found.pop(0)
            if down is not None:
                dx += down.to(dx.dtype)
        gradients.add_all(parameters, found)

    @contextlib.contextmanager
    def _same_numbers(self, x: torch.Tensor) -> Iterator[None]:
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):
            if self._cpu_state is not None:
                torch.set_rng_state(self._cpu_state)
            if self._cuda_state is not None:
                torch.cuda.set_rng_state(self._cuda_state, x.device)
            yield

    def _call(
        self, module: torch.nn.Module, x: torch.Tensor, lead: tuple[int, ...] | None
    ) -> torch.Tensor:
        shaped = x if lead is None else x.reshape(*lead, x.shape[-1])
        enabled, dtype = self._autocast
        with torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
            y = module(shaped)
        return y.reshape(-1, y.shape[-1])
