"""Start a Triton kernel again without working out again which compiled one it is.

`kernel[grid](...)` looks at every argument (dtype, alignment, divisibility), builds a key of text
and finds the compiled kernel by it: 30 to 60 us of the host for a kernel with 20 to 40 arguments,
more than a small kernel takes on the GPU. What the choice depends on is known to the op: dtypes,
shapes, strides and alignments of its tensors. So an op keeps, by these, what its first launch found
(`ReadyLaunches`), and hands over nothing but addresses from then on. Its checks of shapes and
dtypes need not be repeated either: they depend on the same key.

Hooks that a profiler sets on Triton's launches see the first launch only; the GPU's own profile
has all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from colab_qlora.kernels.backend import HAS_TRITON, triton

# bytes that addresses are divisible by where Triton compiles wide loads and stores
ALIGNMENT_BYTES = 16

# batches of ever new lengths add keys; a launch that was forgotten is only found again
MOST_KEPT = 4096

# what a launch is made of is Triton's own affair: 3.6 was run so on a GPU, 3.7's way was read
_KNOWN_VERSIONS = ("3.6.", "3.7.")
_CAN_REPEAT = HAS_TRITON and triton.__version__.startswith(_KNOWN_VERSIONS)


class Launch:
    """One compiled kernel with its grid and all arguments but the addresses that lead them."""

    __slots__ = ("_constants", "_device", "_function", "_metadata", "_run", "grid")

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], constants: tuple[Any, ...], device: int
    ) -> None:
        self._run = compiled.run
        self._function = compiled.function
        self._metadata = compiled.packed_metadata
        self.grid = (*grid, 1, 1)[:3]
        self._constants = constants
        self._device = device

    def __call__(self, *addresses: int | None) -> None:
        """Launch on the current stream with these leading arguments: `data_ptr()`s, or None."""
        self._run(
            *self.grid,
            torch._C._cuda_getCurrentRawStream(self._device),
            self._function,
            self._metadata,
            None,
            None,
            None,
            *addresses,
            *self._constants,
        )


class ReadyLaunches:
    """The launches of one op, by what the choice of the compiled kernel depends on."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Launch] = {}
        self.get = self._by_key.get

    def start(
        self,
        key: Hashable,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: tuple[torch.Tensor | None, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Launch as Triton does, unless the grid is empty; keep under `key` what repeats it.

        Args:
            key: everything that grid, constants, options and the tensors' dtypes and alignments
                follow from; `layout` of each tensor as a rule.
            tensors: the kernel's leading arguments.
            constants: all its other arguments, `tl.constexpr` ones included, in their order.
        """
        # what has no rows has no programs, and Triton would compile for it all the same
        if 0 in grid:
            return
        compiled = kernel[grid](*tensors, *constants, **options)
        if not _can_repeat(compiled):
            return
        if len(self._by_key) >= MOST_KEPT:
            self._by_key.clear()
        self._by_key[key] = Launch(compiled, grid, constants, _device_of(tensors))


def start_repeatable(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **options: Any
) -> Launch | None:
    """Launch as Triton does, and return what does it again with the very same addresses."""
    compiled = kernel[grid](*arguments, **options)
    if not _can_repeat(compiled):
        return None
    plain = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    return Launch(compiled, grid, plain, _device_of(arguments))


def _can_repeat(compiled: Any) -> bool:
    # the interpreter returns nothing
    return _CAN_REPEAT and hasattr(compiled, "packed_metadata")


def _device_of(arguments: Iterable[Any]) -> int:
    return next(a.get_device() for a in arguments if isinstance(a, torch.Tensor))


def layout(tensor: torch.Tensor | None) -> Hashable:
    """What the code that is compiled for a tensor depends on, and where it may be launched."""
    if tensor is None:
        return None
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.data_ptr() % ALIGNMENT_BYTES,
        tensor.get_device(),
    )


def address(tensor: torch.Tensor | None) -> int | None:
    """What a `Launch` is given for a tensor."""
    return None if tensor is None else tensor.data_ptr()
