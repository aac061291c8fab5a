"""What follows from the keyword arguments that tutorials pass; `peer_arguments.py` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colab_qlora.dtypes import pick_compute_dtype, resolve_dtype
from colab_qlora.errors import UserError
from colab_qlora.models.adapters import DEFAULT_TARGETS
from colab_qlora.models.peer_arguments import ADAPT, LOAD, check_peer_arguments
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.adapter_starts import changes_base, needs_dense_base
from colab_qlora.quantization.quantised_weights import is_quantised

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}
_TABLES = ("embed_tokens", "lm_head")


def loading_options(
    dtype: Any,
    load_in_4bit: bool,
    load_in_8bit: bool,
    kwargs: dict[str, Any],
    quantization: str | None = None,
) -> tuple[tuple[Any, bool, bool], bool | str | None]:
    """Read the arguments of from_pretrained that are not its own.

    Args:
        dtype, load_in_4bit, load_in_8bit: as they were given.
        kwargs: the others; what is dealt with here is taken out, and older names are renamed.
        quantization: as it was given.

    Returns:
        (dtype, load_in_4bit, load_in_8bit) to load with, and for full fine-tuning the value of
        use_gradient_checkpointing (True if it was not given), else None.

    Raises:
        UserError: an argument that is refused, or weights to be trained that are in float16 or
            asked for in fewer bits.
    """
    checkpointing = kwargs.get("use_gradient_checkpointing")
    check_peer_arguments(LOAD, kwargs)
    if kwargs.get("use_auth_token") is not None:
        kwargs["token"] = kwargs["use_auth_token"]
    kwargs.pop("use_auth_token", None)
    older_dtype = kwargs.pop("torch_dtype", None)
    dtype = older_dtype if dtype is None else dtype
    full = bool(kwargs.pop("full_finetuning", False))
    wide = kwargs.pop("float32_mixed_precision", None)
    is_16bit = bool(kwargs.pop("load_in_16bit", False))
    if is_16bit or full or kwargs.get("quantization_config") is not None:
        load_in_4bit = load_in_8bit = False
    if kwargs.get("quantization_config", 0) is None:
        del kwargs["quantization_config"]
    if not full:
        return (dtype, load_in_4bit, load_in_8bit), None
    _check_unquantised(quantization, kwargs)
    keeps = checkpointing is None or bool(checkpointing)
    return (_trained_dtype("float32" if wide else dtype), False, False), keeps


def _check_unquantised(quantization: str | None, kwargs: dict[str, Any]) -> None:
    config = kwargs.get("quantization_config")
    if quantization is None and config is None:
        return
    asked = f"quantization={quantization!r}"
    if config is not None:
        asked = f"quantization_config={type(config).__name__}(...)"
    raise UserError(
        "full_finetuning=True trains every weight, and weights in few bits cannot be trained",
        got=f"full_finetuning=True with {asked}",
        allowed="one of the two",
        do="Leave full_finetuning out to train adapters, or leave the other out",
    )


def _trained_dtype(dtype: Any) -> Any:
    import torch

    if dtype is None or dtype == "auto":
        best = pick_compute_dtype()
        return best if best == torch.bfloat16 else torch.float32
    asked, _ = resolve_dtype(dtype, "cuda" if torch.cuda.is_available() else "cpu")
    if asked == torch.float16:
        raise UserError(
            "weights in float16 cannot be trained whole: most updates round to nothing",
            got=f"full_finetuning=True with dtype={dtype}",
            allowed="float32, and bfloat16 where the GPU has it",
            do="Pass dtype=None, or train adapters instead",
        )
    return asked


def adapter_options(
    model: Any, targets: Sequence[str] | str | None, options: dict[str, Any]
) -> tuple[Sequence[str] | str | None, dict[str, Any], list[str]]:
    """Read the arguments of get_peft_model that PEFT does not take as they are.

    Args:
        model: the model that adapters will be attached to.
        targets: target_modules.
        options: the further arguments.

    Returns:
        Targets and options for `attach_lora`, and lines to say.

    Raises:
        UserError: an argument that is refused, or that the model's precision rules out.
    """
    options, said = dict(options), []
    # tutorials repeat the length here; it was fixed when the model was loaded
    length, settings = options.get("max_seq_length"), settings_of(model)
    if length is not None and settings is not None and length != settings.max_seq_length:
        loaded = settings.max_seq_length
        said.append(f"max_seq_length={length} is ignored; it was loaded with {loaded}")
    check_peer_arguments(ADAPT, options)
    targets = _without_left_out(targets, options)
    targets, moved = _without_tables(targets, options)
    if moved:
        said.append(f"{' and '.join(moved)} will be trained whole (modules_to_save)")
    last = options.pop("finetune_last_n_layers", None)
    if last is not None:
        options["layers_to_transform"] = _last_layers(model, last)
    _check_start(model, options)
    return targets, options, said


def _without_left_out(
    targets: Sequence[str] | str | None, options: dict[str, Any]
) -> Sequence[str] | str | None:
    left_out: set[str] = set()
    for switch, modules in (
        ("finetune_attention_modules", _ATTENTION),
        ("finetune_mlp_modules", _MLP),
    ):
        if options.pop(switch, True) is False:
            left_out |= modules
    if not left_out:
        return targets
    names = DEFAULT_TARGETS if targets is None or targets == "all-linear" else targets
    kept = [name for name in ([names] if isinstance(names, str) else names) if name not in left_out]
    if not kept:
        raise UserError(
            "no module is left to train",
            got="finetune_attention_modules=False and finetune_mlp_modules=False",
            do="Leave one of them out",
        )
    return kept


def _without_tables(
    targets: Sequence[str] | str | None, options: dict[str, Any]
) -> tuple[Sequence[str] | str | None, list[str]]:
    """Embedding and head among the targets are to be trained whole, not by an adapter."""
    if targets is None or isinstance(targets, str):
        return targets, []
    moved = [name for name in targets if name in _TABLES]
    if moved:
        saved = options.get("modules_to_save") or []
        saved = [saved] if isinstance(saved, str) else list(saved)
        options["modules_to_save"] = [*saved, *(name for name in moved if name not in saved)]
    return [name for name in targets if name not in _TABLES], moved


def _last_layers(model: Any, count: Any) -> list[int]:
    layers = model.config.num_hidden_layers
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= layers:
        raise UserError(
            "finetune_last_n_layers is not a number of layers",
            got=count,
            allowed=f"an integer from 1 to {layers}",
        )
    return list(range(layers - count, layers))


def _check_start(model: Any, options: dict[str, Any]) -> None:
    start = options.get("init_lora_weights", True)
    if not options.get("loftq_config"):
        options.pop("loftq_config", None)
    if needs_dense_base(start) and is_quantised(model):
        does = "changes" if changes_base(start) else "needs"
        raise UserError(
            f"init_lora_weights={start!r} {does} the base's weights, which are quantised",
            do="Load the model with load_in_4bit=False, or leave init_lora_weights out",
        )
