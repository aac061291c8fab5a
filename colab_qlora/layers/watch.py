"""Notice that something a pass was prepared from is no longer what it was.

What a layer is made of could change between any two passes: PEFT switches, merges and disables
adapters, anyone adds a hook or freezes a weight. Reading 40 modules anew takes the host a quarter
of a millisecond a layer. A `Watch` holds what was read as places and the objects that stood there,
and looks only whether they still do: a few microseconds.
"""

from __future__ import annotations

import operator
from collections.abc import Sized
from typing import Any

import torch

_FLAGS = operator.attrgetter("requires_grad", "dtype")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Places in the dictionaries of modules, and what was found there."""

    def __init__(self) -> None:
        # entries of dictionaries: places, names and what was found, as long as each other
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []
        self._empty: list[Sized] = []
        self._filled: list[tuple[dict[Any, Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[torch.Tensor] = []
        self._flags: list[tuple[bool, torch.dtype]] = []
        self._things: list[Any] = []
        self._kinds: list[type] = []

    def holds(self) -> bool:
        """True if everything is as it was when it was added."""
        # 300 looks a layer and pass: the loops run inside of Python's own functions
        # bitsandbytes' weights are a subclass of torch's that would be asked at every look
        with torch._C.DisableTorchFunctionSubclass():
            return (
                not any(self._empty)
                and all(map(operator.is_, map(dict.get, self._places, self._names), self._found))
                and all(map(operator.is_, map(type, self._things), self._kinds))
                and list(map(_FLAGS, self._tensors)) == self._flags
                and all(now == before for now, before in self._lists)
                and all(list(now.values()) == before for now, before in self._filled)
            )

    def attribute(self, thing: Any, *names: str) -> None:
        """Attributes of a module or another plain object, in its own dictionary or absent there."""
        own = thing.__dict__
        for name in names:
            self.item(own, name)

    def item(self, place: dict[str, Any], name: str) -> Any:
        """An entry of a dictionary, or its absence; returns it."""
        found = place.get(name)
        self._places.append(place)
        self._names.append(name)
        self._found.append(found)
        return found

    def contents(self, found: list[Any]) -> None:
        """What a list holds."""
        self._lists.append((found, list(found)))

    def tensor(self, tensor: torch.Tensor | None) -> None:
        """Whether it wants a gradient, and its dtype; its address is nobody's business here."""
        if tensor is not None:
            self._tensors.append(tensor)
            self._flags.append(_FLAGS(tensor))

    def module(self, module: torch.nn.Module) -> None:
        """Its class, its forward and its hooks."""
        self._things.append(module)
        self._kinds.append(type(module))
        self.attribute(module, "forward")
        for name in _HOOKS:
            hooks = module.__dict__[name]
            if hooks:
                self._filled.append((hooks, list(hooks.values())))
            else:
                self._empty.append(hooks)

    def parameters(self, module: torch.nn.Module) -> None:
        """Its weight and its bias, as objects."""
        place = module.__dict__["_parameters"]
        for name in ("weight", "bias"):
            self.tensor(self.item(place, name))
