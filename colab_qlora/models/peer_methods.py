"""Methods that tutorials call on a model, beside those that save it; `export/methods.py` sets them.

transformers 5 made `tokenizer.apply_chat_template(..., return_tensors="pt")` return ids and mask
where it returned the ids alone, and tutorials pass what they get as `input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, NoReturn

from colab_qlora.errors import UserError
from colab_qlora.quantization.instance_methods import whole_adapter, write_adapter


def generate(model: Any, *inputs: Any, **options: Any) -> Any:
    """The model's own `generate`, which takes ids and mask together as well.

    Args:
        model: whose class has it.
        *inputs: as of transformers' generate: token ids (rows, length), then a generation config.
            A tokenizer's output may stand for the ids, here and as `input_ids` or `inputs`.
        **options: as of transformers' generate; they go before what a tokenizer's output holds.

    Returns:
        As transformers' generate.
    """
    if inputs and isinstance(inputs[0], Mapping):
        options = {**inputs[0], **options}
        inputs = (None, *inputs[1:])
    for name in ("inputs", "input_ids"):
        if isinstance(options.get(name), Mapping):
            found = options.pop(name)
            options = {**found, **options}
    return type(model).generate(model, *inputs, **options)


def save_lora(model: Any, save_directory: str | PathLike[str]) -> None:
    """Write the adapter into a folder, as `save_pretrained` does; all of its files or none.

    Args:
        model: what `get_peft_model` gave.
        save_directory: is made if it is not there; a file of the same name is replaced.

    Raises:
        UserError: the model has no adapter, the disk becomes full, or the folder cannot be written.
    """
    if not getattr(model, "peft_config", None):
        raise UserError("the model has no adapter to save", do="Call save_pretrained instead")
    with whole_adapter(save_directory) as partial:
        write_adapter(model, partial)


def load_lora(model: Any, *args: Any, **options: Any) -> NoReturn:
    """Refused: it makes what vLLM takes as lora_request, and there is no vLLM here."""
    raise UserError(
        "load_lora is not to be had here: generation runs in this process, without vLLM",
        do="Pass the folder to FastLanguageModel.from_pretrained, which loads adapters",
    )


def fast_generate(model: Any, *args: Any, **options: Any) -> NoReturn:
    """Refused: it is vLLM's generate, and there is no vLLM here."""
    raise UserError(
        "fast_generate is not to be had here: generation runs in this process, without vLLM",
        do="Call model.generate(**inputs), or ask(model, tokenizer, question) of "
        "colab_qlora.generation",
    )
