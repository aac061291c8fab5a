"""`save_pretrained_merged`: an adapter alone, or merged into 16 or 4-bit weights, as a folder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.export.base_weights import merged_weights
from colab_qlora.export.merged_4bit import planned_4bit, quantization_config
from colab_qlora.export.options import MEMORY_SHARE, check_options, shard_bytes
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.checkpoint_parts import plain_config
from colab_qlora.quantization.instance_methods import write_adapter
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.quantization.shard_writer import OTHER_FILES_BYTES, write_checkpoint
from colab_qlora.whole_files import folder_to_write, whole_files

SAVE_METHODS = ("lora", "merged_16bit", "merged_4bit", "merged_4bit_forced")
_4BIT_COSTS = (
    "colab_qlora: merged_4bit quantises the merged weights anew, which costs accuracy that "
    "merged_16bit keeps; make GGUF files from the model, not from this folder."
)


def save_pretrained_merged(
    model: Any,
    save_directory: str | PathLike[str],
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    maximum_memory_usage: float = MEMORY_SHARE,
    max_shard_size: str | int | None = None,
    push_to_hub: bool = False,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> Path:
    """Write the trained model as a folder, whole or not at all.

    Args:
        model: what `get_peft_model` gave, or a base without adapters; it stays as it is.
        save_directory: does not exist yet, or is empty, unless `overwrite` is set. With
            push_to_hub, the repository's name as well.
        tokenizer: is saved with its chat template beside the weights.
        save_method: "lora" writes the adapter (MB); "merged_16bit" the 16-bit checkpoint with the
            adapters added, shard by shard, in the dtype that the model computes in (2 bytes a
            weight; 4 where a CPU computes in float32); "merged_4bit" that in bitsandbytes' NF4
            (0.52 bytes a weight), which costs accuracy. "merged_4bit_forced" is its other name.
        base_model: folder or hub id of the 16-bit checkpoint to add the adapters to; None for the
            one that the model was loaded from. Of "...-bnb-4bit" the hub's checkpoint without that
            ending is fetched.
        overwrite: replace a folder of a model or an adapter that is there, once the new one is
            whole: until then the disk holds both, and if anything fails the old one stays.
        maximum_memory_usage: share of the free host memory, above 0 and at most 1.
        max_shard_size: of a file, as in "5GB"; None for 2 GiB or what the memory allows.
        push_to_hub: upload the folder too.
        token: for push_to_hub, as of `hub.push_to_hub`, and for a base_model that is gated.
        private: for push_to_hub.
        **options: of transformers' save_pretrained; which of them have no effect is said.

    Returns:
        The folder. transformers, and PEFT for "lora", load it without this package.

    Raises:
        UserError: an unknown method, no 16-bit weights, or a folder or disk that cannot take it.
            Nothing that was written remains then.

    Example:
        >>> save_pretrained_merged(model, "merged", tokenizer, save_method="merged_16bit")
    """
    method = check_save_method(save_method)
    repository = None
    if push_to_hub:
        from colab_qlora.export.hub import open_repository

        repository, options = open_repository(str(save_directory), token, private, options)
    check_options(options)
    limit = shard_bytes(maximum_memory_usage, max_shard_size)
    if overwrite:
        _check_not_source(model, save_directory, base_model)
    with folder_to_write(save_directory, overwrite) as folder:
        if method == "lora":
            _save_lora(model, folder, tokenizer)
        else:
            merge = merged_weights(model, base_model, token)
            _save_merged(merge, folder, tokenizer, limit, method != "merged_16bit")
    target = Path(save_directory).expanduser()
    if repository is not None:
        repository.upload(target)
    return target


def check_save_method(save_method: Any) -> str:
    """The method's name in lower case.

    Raises:
        UserError: there is none of that name; the message has the list.
    """
    method = save_method.lower().replace("-", "_") if isinstance(save_method, str) else save_method
    if method not in SAVE_METHODS:
        raise UserError(
            "save_method is unknown",
            got=repr(save_method),
            allowed=", ".join(SAVE_METHODS),
            do='Pass save_method="merged_16bit"; GGUF files come from save_pretrained_gguf',
        )
    return method


def _check_not_source(model: Any, folder: str | PathLike[str], base_model: str | None) -> None:
    """Raise UserError where `folder` holds the checkpoint that the model's weights are read from.

    A later merge would find merged weights there and add the adapters to them once more.
    """
    settings = settings_of(model)
    names = [base_model, causal_model(model).config._name_or_path]
    names += [] if settings is None else [settings.model_name]
    target = Path(folder).expanduser().resolve()
    sources = [Path(name).expanduser().resolve() for name in names if name]
    if any(target in (source, *source.parents) for source in sources):
        raise UserError(
            f"{folder} is not replaced: the model's own weights are read from it",
            got="overwrite=True",
            allowed="any other folder",
            do="Choose another folder",
        )


def _save_lora(model: Any, folder: Path, tokenizer: Any) -> None:
    if not getattr(model, "peft_config", None):
        raise UserError(
            "the model has no adapter to save",
            got=type(model).__name__,
            allowed="what get_peft_model gave",
            do='Pass save_method="merged_16bit"',
        )
    adapters = [p for name, p in model.named_parameters() if "lora_" in name or p.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in adapters)
    with whole_files(folder, size + OTHER_FILES_BYTES) as partial:
        write_adapter(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def _save_merged(
    merge: MergedWeights,
    folder: Path,
    tokenizer: Any,
    max_shard_bytes: int,
    is_4bit: bool,
) -> None:
    config = plain_config(merge.causal, merge.parts, merge.dtype)
    if is_4bit:
        print(_4BIT_COSTS)
        config.quantization_config = quantization_config(merge)
    write_checkpoint(
        folder,
        planned_4bit(merge) if is_4bit else merge.planned(),
        config=config,
        generation_config=getattr(merge.causal, "generation_config", None),
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )
