"""What a dynamically quantised model does otherwise than its class, set on the instance alone.

`save_pretrained` of a PEFT model writes the map beside the adapter. What PEFT and transformers
would do wrongly on weights of mixed precision, and partly without a word, is refused and the way
that is right is named: merging into rounded weights, and saving them as if all were stock ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.map_file import save_map
from colab_qlora.whole_files import whole_files

_CARD = "README.md"
MERGES = ("merge_and_unload", "merge_adapter", "merge")


class SavesItsMap:
    """A PEFT model's `save_pretrained`, and the map of its base in the same folder, or neither.

    Raises:
        UserError: the disk becomes full, or the folder cannot be written; it is as it was then.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_main_process", True):
            return self.write(save_directory, *args, **kwargs)
        with whole_adapter(save_directory) as partial:
            return self.write(str(partial), *args, **kwargs)

    def write(self, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """The files, one after the other: for a folder that appears when all of them are there."""
        saved = type(self.model).save_pretrained(self.model, folder, *args, **kwargs)
        state = dynamic_state(self.model)
        if state is not None and kwargs.get("is_main_process", True):
            save_map(state, folder)
        return saved


@contextmanager
def whole_adapter(folder: str | PathLike[str]) -> Iterator[Path]:
    """A hidden folder for an adapter's files, which move into `folder` if all of them are written.

    Args:
        folder: is made if it is not there; a file in it is replaced by a new one of its name.

    Raises:
        UserError: the disk becomes full, or the folder cannot be written; it is as it was then.
    """
    target = Path(folder).expanduser()
    with whole_files(target) as partial:
        # PEFT writes into the model card that is there, and so has to find it
        if (target / _CARD).is_file():
            shutil.copyfile(target / _CARD, partial / _CARD)
        yield partial


def write_adapter(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)`, for a folder that is a hidden one already.

    Args:
        model: a `PeftModel`.
        folder: as `whole_adapter` or `whole_files` gives it, whose errors name the folder that the
            user knows.
    """
    save = model.save_pretrained
    (save.write if isinstance(save, SavesItsMap) else save)(str(folder))


class Refuses:
    """Stands where a method would give wrong weights.

    Args:
        problem: what calling it would do.
        do: what to call instead.
    """

    def __init__(self, problem: str, do: str) -> None:
        self.problem, self.do = problem, do

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(self.problem, got="a dynamically quantised model", do=self.do)


class ResizesIfDense:
    """`resize_token_embeddings`, where the table is not held in 8 bits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        table = self.model.get_input_embeddings()
        if hasattr(table, "SCB") and new_num_tokens not in (None, table.num_embeddings):
            raise UserError(
                "an embedding of 8 bits cannot be given more rows",
                got=f"{new_num_tokens} tokens, of which it holds {table.num_embeddings}",
                do='Resize a 16-bit model and save it first, or load with quantization="nf4"',
            )
        resize = type(self.model).resize_token_embeddings
        return resize(self.model, new_num_tokens, *args, **kwargs)


def set_base_methods(model: Any) -> None:
    """Have the base of a dynamic model refuse to be saved as a stock 4-bit checkpoint.

    It also says in words that a table of 8 bits cannot grow.
    """
    model.__dict__["resize_token_embeddings"] = ResizesIfDense(model)
    model.__dict__["save_pretrained"] = Refuses(
        "stock transformers would misread weights of mixed precision",
        "Call save_stock_checkpoint(model, folder) of colab_qlora.quantization",
    )


def set_adapter_methods(model: Any) -> None:
    """Have a PEFT model of a dynamic base save the map, and refuse to merge into rounded weights.

    Args:
        model: a `PeftModel`; one over another base stays as it is.
    """
    if dynamic_state(model) is None:
        return
    model.__dict__["save_pretrained"] = SavesItsMap(model)
    for name in MERGES:
        refusal = Refuses(
            f"{name} would round the merged weights once more, or break those of 8 bits",
            "Call merge_16_bit(model) or save_merged_16_bit(model, folder) of "
            "colab_qlora.quantization, which add the adapters to the 16-bit checkpoint",
        )
        for holder in (model, model.base_model):
            if hasattr(type(holder), name) or holder is model:
                holder.__dict__[name] = refusal
