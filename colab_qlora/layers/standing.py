"""Where the tensors that kernels read stand, and whether anybody wrote into them.

Asked once a layer and pass, of 60 tensors: so the loops run inside of Python's own functions.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from colab_qlora.layers.linear import LinearPart

_NESTED = operator.attrgetter("absmax", "code", "offset", "state2.absmax", "state2.code")
_PLAIN = operator.attrgetter("absmax", "code")
_VERSION = operator.attrgetter("_version")


class BaseTensors:
    """All that the decoded weights of some linears follow from.

    Args:
        parts: the linears; of quantised ones what a state holds is asked anew, as `.to()` may have
            replaced it.
    """

    def __init__(self, parts: Iterable[LinearPart]) -> None:
        self._weights: list[torch.Tensor] = []
        self._nested: list[Any] = []
        self._plain: list[Any] = []
        for part in parts:
            if part.kind == "int8":
                self._weights += [part.weight.codes, part.weight.absmax]
                continue
            if part.weight is None:  # a module of another kind, which has no such thing
                continue
            self._weights.append(part.weight)
            state = getattr(part.weight, "quant_state", None)
            if state is not None:
                (self._plain if state.state2 is None else self._nested).append(state)

    def now(self) -> list[torch.Tensor]:
        """The tensors as they are now, in a fixed order."""
        states = chain(map(_NESTED, self._nested), map(_PLAIN, self._plain))
        return [*self._weights, *chain.from_iterable(states)]


class Signature:
    """Tensors as they were: the same ones, where they stood, and how often they were written."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # weakly: what is replaced shall be free
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._addresses, self._versions = addresses(tensors), _versions(tensors)

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if it would be the same of these tensors now."""
        return (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, [tensor() for tensor in self._tensors], tensors))
            and self._addresses == addresses(tensors)
            and self._versions == _versions(tensors)
        )


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Where each of them stands."""
    # bitsandbytes' weights are a subclass of torch's that would be asked at every look
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(torch.Tensor.data_ptr, tensors))


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return list(map(_VERSION, tensors))
        except RuntimeError:
            # tensors made in inference mode have no counter; outside of it nobody can write to them
            return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
