"""Repeats a micro-batch that ran out of memory, with a plan for less, as if nothing had happened.

A backward pass that stops halfway has added its part to some parameters' gradients already. The
repeated pass gives the same gradients bit by bit, whatever its plan; so those parameters get zeros
from it, and every other one its part. Random numbers start again where the first try began.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from colab_qlora.models.fuse import state_of
from colab_qlora.models.smart import planner_of
from colab_qlora.training.failures import is_out_of_memory

Result = TypeVar("Result")
# 0.9 to this power is less than half the budget: what fits then would have fitted before
MOST_TRIES = 8


def with_less_memory(model: Any, step: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """Run `step`, a forward and backward pass; out of memory, plan for 10 % less and run it again.

    Args:
        model: whose gradients `step` adds to.
        step: called again from the start, so it may not change its inputs.
        say: takes a line for people at each repetition.

    Raises:
        torch.OutOfMemoryError: nothing plans the model's memory, or the least did not do.
    """
    planner = planner_of(model)
    if planner is None:
        return step()
    before = _Gradients(model)
    randomness = _random_state(planner.device)
    for _ in range(MOST_TRIES):
        try:
            with before.kept_apart():
                return step()
        except Exception as error:
            state = state_of(model)
            has_recordings = state is not None and bool(state.graphs.shapes)
            if not is_out_of_memory(error) or (planner.is_at_floor and not has_recordings):
                raise
            what = str(error).split(". ")[0]
            # its frames hold the tensors of the pass that failed
            traceback.clear_frames(error.__traceback__)
        # recordings hold memory that a pass of another shape may want: first without them
        remedy = "once more without recorded layers" if has_recordings else planner.lower_budget()
        say(f"out of memory ({what}); {remedy}")
        if state is not None:
            state.free()
        gc.collect()
        if planner.device.type == "cuda":
            torch.cuda.empty_cache()
        _restore_random_state(planner.device, randomness)
    return step()


class _Gradients:
    """The gradients before a micro-batch, and which of them have got its part since."""

    def __init__(self, model: Any) -> None:
        self._before = [
            (p, p.grad, None if p.grad is None else p.grad._version)
            for p in model.parameters()
            if p.requires_grad
        ]

    def changed(self) -> list[torch.nn.Parameter]:
        return [
            p
            for p, grad, version in self._before
            if p.grad is not None and (p.grad is not grad or p.grad._version != version)
        ]

    @contextlib.contextmanager
    def kept_apart(self) -> Iterator[None]:
        """In here, what has its part of this micro-batch gets no second one."""
        handles = [p.register_hook(torch.zeros_like) for p in self.changed()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _restore_random_state(
    device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
