"""Load a PEFT adapter folder together with the base model that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.models.adapters import set_gradient_checkpointing
from colab_qlora.models.fuse import fuse
from colab_qlora.models.loading import load_model_and_tokenizer, padding_note
from colab_qlora.models.quiet_import import import_bitsandbytes, without_rename_warnings
from colab_qlora.models.readable_errors import readable_errors
from colab_qlora.models.saved_tables import let_tables_meet
from colab_qlora.quantization.adapter_starts import belongs_to_quantised
from colab_qlora.quantization.instance_methods import set_adapter_methods
from colab_qlora.quantization.map_file import read_map
from colab_qlora.quantization.merge_checks import loftq_over_16_bit
from colab_qlora.quantization.quantised_weights import is_quantised


def is_adapter_folder(name: str) -> bool:
    """Whether `name` is a local folder that PEFT's save_pretrained wrote."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def load_adapter_folder(name: str, *load_args: Any, **options: Any) -> tuple[Any, Any]:
    """Load the adapter's base model, then the adapter, trainable.

    Args:
        name: the adapter folder.
        *load_args, **options: for the base model, as of `load_model_and_tokenizer`.

    Returns:
        (model, tokenizer): a `PeftModel` and the tokenizer saved beside the adapter, else the
        base's.

    Raises:
        UserError: the adapter's weights are missing, its base model cannot be loaded, or LoftQ
            started it over few bits and the base is to be loaded in 16.
    """
    import_bitsandbytes()
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder} has no adapter weights",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())),
            allowed="adapter_config.json with adapter_model.safetensors",
            do="Give the folder that save_pretrained wrote, or a checkpoint of the trainer",
        )
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}/adapter_config.json names no base model", got=repr(base))
    # trained over these errors of its base, so it gets them again
    options.setdefault("recorded_map", read_map(folder))
    model, tokenizer = load_model_and_tokenizer(base, *load_args, **options)
    with without_rename_warnings(), readable_errors(str(folder)):
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    for adapter, config in model.peft_config.items():
        if belongs_to_quantised(config) and not is_quantised(model):
            raise loftq_over_16_bit(adapter)
    let_tables_meet(model)
    set_adapter_methods(model)
    fuse(model)
    set_gradient_checkpointing(model, "smart")
    if (folder / "tokenizer_config.json").is_file():
        of_base, tokenizer = tokenizer, AutoTokenizer.from_pretrained(str(folder))
        tokenizer.model_max_length = of_base.model_max_length
        # of the base's own it has been said
        if (note := padding_note(tokenizer)) and padding_note(of_base) is None:
            print(f"colab_qlora: {note}")
    return model, tokenizer
