"""What the classes that are made at run time have in common: their stock class, and pickling.

Pickle cannot find such a class by name. What it stores instead is the stock class and the function
that makes the fused one from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def stock_class(fused: Any) -> Any:
    """The class that a fused one was made from."""
    return fused.__mro__[1]


def reduce_by(make: Callable[[Any], Any]) -> Callable[[Any, Any], tuple[Any, ...]]:
    """The `__reduce_ex__` of the classes that `make` makes.

    Args:
        make: stock class -> fused class; a function at the top of its module, so that pickle
            finds it, and the same class comes out for the same stock class.
    """

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        stock_way: Any = object.__reduce_ex__(self, protocol)
        return (_rebuild, (make, stock_class(type(self))), *stock_way[2:])

    return reduce_ex


def _rebuild(make: Callable[[Any], Any], stock: Any) -> Any:
    fused = make(stock)
    return fused.__new__(fused)
