"""The saving functions, and a few others that tutorials call, as methods of one model.

They are set on the instance; no class is changed, and a model that was not passed to `bind_methods`
has none of them. A method knows its model by a weak reference: with a strong one, model -> method
-> model, `del model` would free nothing before Python's garbage collector runs. (bitsandbytes'
4-bit linears and their weights are such a circle by themselves: of a model in 4 bits, gc.collect()
frees those.) Nothing heavy is imported before a method is called.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from colab_qlora.errors import UserError

# name of the method and of the function -> its module
METHODS = {
    "save_pretrained_merged": "export.merged",
    "save_pretrained_gguf": "export.save_gguf",
    "push_to_hub": "export.hub",
    "push_to_hub_merged": "export.hub",
    "push_to_hub_gguf": "export.hub",
    "generate": "models.peer_methods",
    "save_lora": "models.peer_methods",
    "load_lora": "models.peer_methods",
    "fast_generate": "models.peer_methods",
}


class ModelMethod:
    """One of the functions, called with the model in front.

    A copy or a pickle of the model gets methods of its own.

    Args:
        model: whose method it is; it is not kept alive.
        name: of the function.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model, self.name = weakref.ref(model), name

    @property
    def model(self) -> Any:
        """Whose method it is.

        Raises:
            UserError: it was deleted.
        """
        model = self._model()
        if model is None:
            raise UserError(
                f"the model that {self.name} belongs to was deleted",
                do="Keep the model in a variable, as in model = ..., and call the method of that",
            )
        return model

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._function().__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(self.model, *args, **kwargs)

    def __repr__(self) -> str:
        model = self._model()
        owner = "deleted model" if model is None else type(model).__name__
        return f"<colab_qlora {self.name} of a {owner}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelMethod:
        # the copy of the model is in the memo if that is what is being copied
        model = self.model
        return ModelMethod(memo.get(id(model), model), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # inside a pickled model, a reference to the model that is being rebuilt
        return ModelMethod, (self.model, self.name)

    def _function(self) -> Any:
        module = importlib.import_module(f"colab_qlora.{METHODS[self.name]}")
        return getattr(module, self.name)


def bind_methods(model: Any) -> Any:
    """Give one model the methods of `METHODS`: `save_pretrained_merged`, `generate` and so on.

    Args:
        model: a transformers model or a `PeftModel`. Each of the two needs its own: what a
            PeftModel does not have is looked up in the model inside, which knows no adapters.

    Returns:
        The model.
    """
    for name in METHODS:
        model.__dict__[name] = ModelMethod(model, name)
    return model
