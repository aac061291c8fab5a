"""The saving functions as methods of one model, as tutorials call them.

They are set on the instance, which holds no copy of anything; no class is changed, and a model that
was not passed to `bind_export_methods` has none of them. Nothing heavy is imported before a method
is called.
"""

from __future__ import annotations

import importlib
from typing import Any

# name of the method and of the function -> its module
METHODS = {
    "save_pretrained_merged": "merged",
    "save_pretrained_gguf": "save_gguf",
    "push_to_hub": "hub",
    "push_to_hub_merged": "hub",
    "push_to_hub_gguf": "hub",
}


class ExportMethod:
    """One of the functions, called with the model in front.

    Args:
        model: whose method it is.
        name: of the function.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._function().__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(self.model, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<colab_qlora.export {self.name} of a {type(self.model).__name__}>"

    def _function(self) -> Any:
        module = importlib.import_module(f"colab_qlora.export.{METHODS[self.name]}")
        return getattr(module, self.name)


def bind_export_methods(model: Any) -> Any:
    """Give one model `save_pretrained_merged`, `save_pretrained_gguf` and `push_to_hub*`.

    Args:
        model: a transformers model or a `PeftModel`. Each of the two needs its own: what a
            PeftModel does not have is looked up in the model inside, which knows no adapters.

    Returns:
        The model.
    """
    for name in METHODS:
        model.__dict__[name] = ExportMethod(model, name)
    return model
