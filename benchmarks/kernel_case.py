"""One op at one size, by several implementations: how long, how much memory, how far off.

The error of an implementation is the largest over its results of ||got - truth|| / ||truth||, with
the truth computed in float64 from the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Timer

Tensors = dict[str, Any]
Call = Callable[[], Sequence[Tensor]]
Build = Callable[[Tensors], Call]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: name, such as "rms_norm forward".
        size: as text, such as "4096x14336".
        make: device, dtype -> the inputs, always the same numbers.
        sides: implementation -> builder; it is given the inputs (copies of its own) and returns the
            call to be timed. What the first call returns is compared with the truth.
        truth: inputs -> results in float64, in the order of the calls' results.
        bytes_moved: as the op's module states them; 0 if memory is not what bounds it.
        operations: floating-point operations, where those are what bounds it.
    """

    op: str
    size: str
    make: Callable[[torch.device, torch.dtype], Tensors]
    sides: dict[str, Build]
    truth: Callable[[Tensors], Sequence[Tensor]] | None = None
    bytes_moved: int = 0
    operations: int = 0
    notes: Callable[[Tensors], str] = field(default=lambda tensors: "")


def randoms(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    """Normally distributed tensors of these shapes, the same at every call on a device."""
    generator = torch.Generator(device).manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, device=device).to(dtype)
        for name, shape in shapes.items()
    }


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
    """A call that runs autograd's backward pass, again and again."""
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def differentiable(tensors: Tensors, *names: str) -> list[Tensor]:
    """These inputs, from now on with gradients."""
    return [tensors[name].requires_grad_(True) for name in names]


def measure(case: Case, sides: Iterable[str], timer: Timer, dtype: torch.dtype) -> dict[str, Any]:
    """Time those of the named implementations that the case has; a row for JSON."""
    tensors = case.make(timer.device, dtype)
    truth = None
    if case.truth is not None:
        try:
            truth = list(case.truth(tensors))
        except torch.OutOfMemoryError:  # float64 takes four times the memory
            truth = None
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_moved": case.bytes_moved,
        "operations": case.operations,
        "notes": case.notes(tensors),
        "sides": {},
    }
    for name in sides:
        if name in case.sides:
            row["sides"][name] = _measure_side(case.sides[name], tensors, truth, timer)
            if timer.is_gpu:  # the next one finds the memory as this one did
                torch.cuda.empty_cache()
    return row


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest relative error (norm) over all results."""
    errors = []
    for result, true in zip(got, truth, strict=True):
        difference = result.detach().double().sub_(true)
        errors.append(float(difference.norm() / true.norm()))
    return max(errors)


def _measure_side(
    build: Build,
    tensors: Tensors,
    truth: Sequence[Tensor] | None,
    timer: Timer,
) -> dict[str, Any]:
    own = {name: _copied(tensor) for name, tensor in tensors.items()}
    try:
        call = build(own)
        first, peak = _first_call(call, timer)
        error = None if truth is None else largest_error(first, truth)
        del first
        timing = timer.time(call)
    # a peer may fail in ways of its own; the other rows are still wanted
    except Exception as problem:
        reason = str(problem).strip().splitlines() or [""]
        return {"failed": f"{type(problem).__name__}: {reason[0]}"[:200]}
    return {
        "ms": timing.ms,
        "fastest_ms": timing.fastest_ms,
        "runs": timing.runs,
        "error": error,
        "peak_mib": peak,
    }


def _first_call(call: Call, timer: Timer) -> tuple[list[Tensor], float | None]:
    """The results, and the most memory that was held beyond what was there before."""
    if not timer.is_gpu:
        return list(call()), None
    before = torch.cuda.memory_allocated(timer.device)
    torch.cuda.reset_peak_memory_stats(timer.device)
    found = list(call())
    return found, (torch.cuda.max_memory_allocated(timer.device) - before) / 2**20


def _copied(tensor: Any) -> Any:
    # a 4-bit weight is only read
    return tensor.clone() if type(tensor) is Tensor else tensor
