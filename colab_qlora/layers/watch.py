"""Notice that something a pass was prepared from is no longer what it was.

What a layer is made of could change between any two passes: PEFT switches, merges and disables
adapters, anyone adds a hook or freezes a weight. Reading 40 modules anew takes the host a quarter
of a millisecond a layer. A `Watch` holds what was read as places and the objects that stood there,
and looks only whether they still do: a few microseconds.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """Places in the dictionaries of modules, and what was found there."""

    def __init__(self) -> None:
        self._same: list[tuple[dict[str, Any], str, Any]] = []
        self._empty: list[Sized] = []
        self._filled: list[tuple[dict[Any, Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[tuple[torch.Tensor, bool, torch.dtype]] = []
        self._kinds: list[tuple[Any, type]] = []

    def holds(self) -> bool:
        """True if everything is as it was when it was added."""
        # hooks are the most, and all of them are looked at in one call
        if any(self._empty):
            return False
        for place, name, expected in self._same:
            if place.get(name) is not expected:
                return False
        for tensor, requires_grad, dtype in self._tensors:
            if tensor.requires_grad is not requires_grad or tensor.dtype is not dtype:
                return False
        for thing, kind in self._kinds:
            if type(thing) is not kind:
                return False
        if any(now != before for now, before in self._lists):
            return False
        return all(list(now.values()) == before for now, before in self._filled)

    def attribute(self, thing: Any, *names: str) -> None:
        """Attributes of a module or another plain object, in its own dictionary or absent there."""
        own = thing.__dict__
        for name in names:
            self._same.append((own, name, own.get(name)))

    def item(self, place: dict[str, Any], name: str) -> Any:
        """An entry of a dictionary, or its absence; returns it."""
        found = place.get(name)
        self._same.append((place, name, found))
        return found

    def contents(self, found: list[Any]) -> None:
        """What a list holds."""
        self._lists.append((found, list(found)))

    def tensor(self, tensor: torch.Tensor | None) -> None:
        """Whether it wants a gradient, and its dtype; its address is nobody's business here."""
        if tensor is not None:
            self._tensors.append((tensor, tensor.requires_grad, tensor.dtype))

    def module(self, module: torch.nn.Module) -> None:
        """Its class, its forward and its hooks."""
        self._kinds.append((module, type(module)))
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
