"""Load a causal language model and its tokenizer, in 4 bit (NF4 with double quantisation) by
default.

The result is a plain transformers model with bitsandbytes `Linear4bit` layers, and with those of
8 and 16 bits beside them where quantization="dynamic". Weights come from
safetensors only: nothing that was downloaded is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colab_qlora.dtypes import resolve_dtype
from colab_qlora.errors import UserError
from colab_qlora.models.dynamic_loading import (
    DEFAULT_BUDGET,
    dynamic_request,
    make_dynamic,
    refuse_quantised,
)
from colab_qlora.models.embedded import EMBEDDED_NAME, FOLDER_NAME, embedded_model_path
from colab_qlora.models.growing_segments import let_segments_grow
from colab_qlora.models.half_range import dtype_with_room
from colab_qlora.models.positions import fit_positions
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.models.readable_errors import readable_errors
from colab_qlora.models.settings import ATTRIBUTE, ModelSettings
from colab_qlora.quantization.map_file import RecordedMap

# 4-bit already (5.7 GB to download), 8 billion parameters, and no token needed
DEFAULT_GPU_MODEL = "unsloth/llama-3-8b-Instruct-bnb-4bit"
_PADS_WITH_EOS = (
    "the pad token is {eos}, the end-of-text token: this checkpoint {why}; padding is hidden from "
    "the loss by its place in a batch, so a text's own {eos} still counts in training; a "
    "data_collator that hides padding by its token would hide it too"
)


def default_model_name() -> str:
    """A 4-bit 8B instruct model where there is a CUDA GPU, the embedded 135M model elsewhere."""
    import torch

    return DEFAULT_GPU_MODEL if torch.cuda.is_available() else EMBEDDED_NAME


def load_model_and_tokenizer(
    model_name: str | None = None,
    max_seq_length: int = 2048,
    dtype: Any = None,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    *,
    token: str | None = None,
    device_map: Any = None,
    rope_scaling: dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    quantization_budget: str | float = DEFAULT_BUDGET,
    calibration_data: Any = None,
    recorded_map: RecordedMap | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load model and tokenizer; see `FastLanguageModel.from_pretrained` for the arguments."""
    import torch

    import_bitsandbytes()
    name = model_name or default_model_name()
    _check_length(max_seq_length)
    _check_bits(load_in_4bit, load_in_8bit)
    dynamic = dynamic_request(
        quantization,
        quantization_budget,
        calibration_data,
        load_in_4bit=load_in_4bit,
        recorded=recorded_map,
    )
    resolved = resolve_dtype(dtype, "cuda" if torch.cuda.is_available() else "cpu")
    let_segments_grow()
    source = locate_checkpoint(name)
    hub = {"token": token, "revision": revision, "trust_remote_code": trust_remote_code}
    config = _load_config(source, name, hub)
    compute_dtype, note = dtype_with_room(config, dtype, *resolved)
    fit_positions(config, rope_scaling, max_seq_length)
    if dynamic is not None:
        refuse_quantised(config)
    bits = _quantization(config, compute_dtype, load_in_4bit, load_in_8bit)
    tokenizer = _load_tokenizer(source, name, hub)
    if dynamic is not None:
        dynamic = dynamic.with_batches(tokenizer, max_seq_length)
    with readable_errors(name):
        model = _load_model(
            source, device_map, bits, config=config, dtype=compute_dtype, **hub, **kwargs
        )
    notes = [note, _prepare_tokenizer(tokenizer, model, max_seq_length)]
    keep_weights_in_place(model)
    _attach_settings(model, name, max_seq_length, compute_dtype, list(filter(None, notes)))
    if dynamic is not None:
        make_dynamic(
            model, dynamic, source, name, max_seq_length, compute_dtype,
            token=token, revision=revision,
        )  # fmt: skip
    return model, tokenizer


def load_tokenizer(model_name: str | None = None, **hub: Any) -> Any:
    """The tokenizer of a model, without the model's weights.

    Args:
        model_name: as for `load_model_and_tokenizer`.
        **hub: token, revision.

    Raises:
        UserError: it cannot be found or read.
    """
    name = model_name or default_model_name()
    return _load_tokenizer(locate_checkpoint(name), name, hub)


def _check_length(max_seq_length: Any) -> None:
    if (
        isinstance(max_seq_length, bool)
        or not isinstance(max_seq_length, int)
        or max_seq_length < 1
    ):
        raise UserError(
            "max_seq_length is not a number of tokens",
            got=repr(max_seq_length),
            allowed="an integer from 1 up",
            do="Pass max_seq_length=2048, or less to save memory",
        )


def _check_bits(load_in_4bit: bool, load_in_8bit: bool) -> None:
    if load_in_8bit and load_in_4bit:
        raise UserError(
            "load_in_4bit and load_in_8bit are both set",
            allowed="one of them",
            do="Pass load_in_4bit=False with load_in_8bit=True",
        )


def locate_checkpoint(name: str) -> str:
    """The embedded model's folder, a local folder that was checked, or a hub id as it is."""
    path = Path(name).expanduser()
    if name == EMBEDDED_NAME or (path.name == FOLDER_NAME and not path.exists()):
        return str(embedded_model_path())
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
            raise UserError(
                f"{path} is not a model folder: it has no config.json",
                got=f"a folder with {inside}",
                allowed="a folder with config.json and *.safetensors, a hub id, or 'embedded'",
                do="Give the folder that save_pretrained wrote",
            )
        weights = [
            entry.name for entry in path.iterdir() if entry.suffix in {".bin", ".pt", ".pth"}
        ]
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"{path} holds no safetensors weights",
                got=", ".join(sorted(weights)) or "no weights at all",
                allowed="*.safetensors (pickled weights can run code when they are loaded)",
                do="Convert them where you trust them: model.save_pretrained(folder)",
            )
        return str(path)
    if path.exists() or path.is_absolute() or name.count("/") > 1 or name.startswith("."):
        what = "a file" if path.is_file() else "nothing at that path"
        raise UserError(
            f"{name} is not a model folder",
            got=what,
            allowed="a folder with config.json and *.safetensors, a hub id, or 'embedded'",
            do="Check the path",
        )
    return name


def _load_tokenizer(source: str, name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with readable_errors(name):
        return AutoTokenizer.from_pretrained(source, **hub)


def _load_config(source: str, name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    with readable_errors(name):
        return AutoConfig.from_pretrained(source, **hub)


def _quantization(config: Any, compute_dtype: Any, four_bit: bool, eight_bit: bool) -> Any:
    """A BitsAndBytesConfig, or None where the checkpoint brings its own or none is wanted."""
    from transformers import BitsAndBytesConfig

    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        # checkpoints are written with bfloat16 as compute dtype, which a T4 does not have
        if isinstance(stored, dict):
            if "bnb_4bit_compute_dtype" in stored or stored.get("load_in_4bit"):
                stored["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
        elif hasattr(stored, "bnb_4bit_compute_dtype"):
            stored.bnb_4bit_compute_dtype = compute_dtype
        return None
    if eight_bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not four_bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _load_model(source: str, device_map: Any, quantization: Any, /, **options: Any) -> Any:
    """The model itself; `options` are transformers' own."""
    import torch
    from transformers import AutoModelForCausalLM

    if device_map is None:
        # device 0, and not "auto": training with layers on two devices is not what anyone means
        device_map = {"": 0 if torch.cuda.is_available() else "cpu"}
    # Gemma 2 bounds its attention's scores, which sdpa cannot: transformers has only eager for it
    is_bounded = getattr(options.get("config"), "model_type", "") == "gemma2"
    attention = options.pop("attn_implementation", "eager" if is_bounded else "sdpa")
    return AutoModelForCausalLM.from_pretrained(
        source,
        device_map=device_map,
        use_safetensors=True,
        attn_implementation=attention,
        **({"quantization_config": quantization} if quantization is not None else {}),
        **options,
    )


def keep_weights_in_place(model: Any) -> None:
    """Stop 4-bit layers from repacking their weights when they are evaluated on a CPU.

    On a CPU with AVX-512 bfloat16 bitsandbytes (0.49 and 0.50) repacks a layer's weights for good
    at its first forward in evaluation mode. The repacked layer gives no gradient to its input, so a
    training that is evaluated before or between its steps learns almost nothing, silently. The
    switch is an attribute of each layer; the library itself stays as it is.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _prepare_tokenizer(tokenizer: Any, model: Any, max_seq_length: int) -> str | None:
    """Set padding and length; what is to be said of the pad token, if anything is."""
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_seq_length
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so the model could not learn to stop",
            do="Set tokenizer.eos_token in the model folder's tokenizer_config.json",
        )
    was_missing = tokenizer.pad_token is None
    if was_missing:
        # prefer a reserved token of the vocabulary: padding with EOS hides where texts end
        vocabulary = tokenizer.get_vocab()
        reserved = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "<unk>")
        choices = [t for t in (*reserved, tokenizer.unk_token) if t and t in vocabulary]
        tokenizer.pad_token = choices[0] if choices else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return padding_note(tokenizer, was_missing)


def padding_note(tokenizer: Any, was_missing: bool = False) -> str | None:
    """What is to be said of a pad token that is the end-of-text token; None for any other.

    Args:
        tokenizer: with both tokens.
        was_missing: its checkpoint had no pad token.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    why = "has no spare token to pad with" if was_missing else "has it so"
    return _PADS_WITH_EOS.format(eos=tokenizer.eos_token, why=why)


def _attach_settings(
    model: Any, name: str, max_seq_length: int, compute_dtype: Any, notes: list[str]
) -> None:
    settings = ModelSettings(name, max_seq_length, str(compute_dtype).removeprefix("torch."))
    for note in notes:
        settings.notes.append(note)
        print(f"colab_qlora: {note}")
    setattr(model, ATTRIBUTE, settings)
    setattr(model, "max_seq_length", max_seq_length)  # noqa: B010  # the name that tutorials read
