"""Keyword arguments that tutorials pass to from_pretrained and get_peft_model, one by one.

Those of the saving functions are in `export/options.py`.

`TABLE` says of each whether it is honoured, comes about by itself (so that nothing is left to set),
or is refused, which `check_peer_arguments` does in one sentence. Arguments of transformers and PEFT
that are not here are passed on to them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError

HONOURED, BY_ITSELF, REFUSED = "honoured", "by itself", "refused"
LOAD, ADAPT = "from_pretrained", "get_peft_model"


@dataclass(frozen=True)
class PeerArgument:
    """One keyword argument.

    Attributes:
        name: as it is passed.
        where: the functions that take it.
        verdict: "honoured", "by itself" or "refused"; of the saving functions "without effect" too.
        what: what it does here; of a refused one, why it is not to be had.
        harmless: of a refused one, the values that ask for nothing.
        do: of a refused one, the next step.
    """

    name: str
    where: tuple[str, ...]
    verdict: str
    what: str
    harmless: tuple[Any, ...] = (None, False)
    do: str = "Leave it out"


def _honoured(where: tuple[str, ...], rows: dict[str, str]) -> Iterator[PeerArgument]:
    return (PeerArgument(name, where, HONOURED, what) for name, what in rows.items())


def _by_itself(where: tuple[str, ...], rows: dict[str, str]) -> Iterator[PeerArgument]:
    return (PeerArgument(name, where, BY_ITSELF, what) for name, what in rows.items())


_VLLM = "generation runs in this process, without vLLM"
_TEXT = "only models that write text are loaded"
TABLE: tuple[PeerArgument, ...] = (
    *_honoured(
        (LOAD,),
        {
            "model_name": "a hub id, a folder, an adapter folder, or `embedded`",
            "max_seq_length": "the trainer truncates to it",
            "dtype": "compute dtype; one that the hardware lacks is replaced, and said",
            "torch_dtype": "older name of dtype",
            "load_in_4bit": "NF4 with double quantisation",
            "load_in_8bit": "LLM.int8; with load_in_4bit=False",
            "load_in_16bit": "no quantisation, whatever load_in_4bit says",
            "full_finetuning": "no quantisation, every weight is trained, in bfloat16 or float32",
            "float32_mixed_precision": "with full_finetuning: weights in float32",
            "quantization_config": "in place of load_in_4bit and load_in_8bit",
            "token": "for this call; it is stored nowhere",
            "use_auth_token": "older name of token",
            "revision": "branch, tag or commit",
            "trust_remote_code": "off unless asked for",
            "device_map": "as in transformers",
            "rope_scaling": "linear or yarn",
            "attn_implementation": "for layers that run the model's own code",
        },
    ),
    *_by_itself(
        (LOAD,),
        {
            "use_exact_model_name": "no name is ever swapped for another",
            "fix_tokenizer": "end and padding tokens are checked at every load",
            "use_gradient_checkpointing": "get_peft_model sets it; it holds with full_finetuning",
            "offload_embedding": "the planner moves the table to the host where that pays",
            "unsloth_tiled_mlp": "the planner cuts the MLP into chunks where memory asks for it",
            "random_state": "loading draws no random numbers",
            "max_lora_rank": "r of get_peft_model may be any",
            "gpu_memory_utilization": f"nothing is set aside: {_VLLM}",
            "disable_log_stats": f"there are none: {_VLLM}",
            "fullgraph": "nothing is compiled",
            "unsloth_force_compile": "nothing is compiled",
            "low_cpu_mem_usage": "transformers always loads so now",
            "return_logits": "logits are there whenever a metric asks for them",
        },
    ),
    PeerArgument("load_in_fp8", (LOAD,), REFUSED, "a T4 has no 8-bit floating point"),
    PeerArgument("fast_inference", (LOAD,), REFUSED, _VLLM, do="Pass fast_inference=False"),
    PeerArgument("float8_kv_cache", (LOAD,), REFUSED, _VLLM),
    PeerArgument("unsloth_vllm_standby", (LOAD,), REFUSED, _VLLM),
    PeerArgument(
        "resize_model_vocab",
        (LOAD,),
        REFUSED,
        "a table of another size would not fit the checkpoint's adapters",
        do="Call model.resize_token_embeddings(n) after loading",
    ),
    PeerArgument(
        "use_flash_attention_2",
        (LOAD,),
        REFUSED,
        "transformers dropped it, and fused layers choose their attention",
        do="Pass attn_implementation='flash_attention_2' if it is installed",
    ),
    PeerArgument("use_safetensors", (LOAD,), REFUSED, "pickled weights can run code", (None, True)),
    PeerArgument("auto_model", (LOAD,), REFUSED, _TEXT),
    PeerArgument("num_labels", (LOAD,), REFUSED, _TEXT),
    PeerArgument("whisper_language", (LOAD,), REFUSED, _TEXT),
    PeerArgument("whisper_task", (LOAD,), REFUSED, _TEXT),
    PeerArgument(
        "qat_scheme", (LOAD, ADAPT), REFUSED, "training does not imitate another quantisation"
    ),
    *_honoured(
        (ADAPT,),
        {
            "r": "rank",
            "target_modules": "embed_tokens and lm_head in it go to modules_to_save",
            "lora_alpha": "scale",
            "lora_dropout": "in the fused layers too",
            "bias": "as in PEFT",
            "use_gradient_checkpointing": "`unsloth` is another name of `smart`",
            "random_state": "seed of the adapters' start",
            "use_rslora": "scale lora_alpha / sqrt(r)",
            "init_lora_weights": (
                "as in PEFT; pissa, corda, olora, lora_ga, orthogonal and mica over 16-bit "
                "weights only"
            ),
            "loftq_config": (
                'with init_lora_weights="loftq"; over 4 bits it starts from the checkpoint, and is '
                "merged into the 4-bit weights"
            ),
            "modules_to_save": "trained whole, beside the adapters",
            "layers_to_transform": "as in PEFT",
            "layers_pattern": "as in PEFT",
            "use_dora": "as in PEFT; not over 8 bits",
            "finetune_attention_modules": "False leaves q, k, v and o without adapters",
            "finetune_mlp_modules": "False leaves gate, up and down without adapters",
            "finetune_last_n_layers": "adapters in the last n layers only",
        },
    ),
    *_by_itself(
        (ADAPT,),
        {
            "max_seq_length": "fixed when the model was loaded; another value is said",
            "temporary_location": "nothing is written to disk meanwhile",
            "task_type": "causal language modelling",
            "finetune_vision_layers": "a text model has none",
        },
    ),
    PeerArgument(
        "finetune_language_layers",
        (ADAPT,),
        REFUSED,
        "a text model has no other layers to train",
        (None, True),
    ),
)

_REFUSED = {(where, row.name): row for row in TABLE for where in row.where}


def check_peer_arguments(where: str, given: dict[str, Any]) -> None:
    """Take out of `given` what has nothing to set here, and what is not to be had.

    Args:
        where: "from_pretrained" or "get_peft_model".
        given: keyword arguments; those that come about by themselves or are refused are removed.

    Raises:
        UserError: a refused argument with a value that asks for something.
    """
    for name in list(given):
        row = _REFUSED.get((where, name))
        if row is None or row.verdict == HONOURED:
            continue
        value = given.pop(name)
        is_harmless = any(value is each or value == each for each in row.harmless)
        if row.verdict == REFUSED and not is_harmless:
            raise UserError(f"{name} is not to be had here: {row.what}", got=repr(value), do=row.do)


@contextmanager
def unknown_arguments_named(given: Collection[str]) -> Iterator[None]:
    """Turn a model class's word on a keyword argument that nobody knows into one sentence.

    Args:
        given: names of the arguments that were passed on to transformers.

    Raises:
        UserError: one of them is unknown; the message says what it may have been meant to be.
    """
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in given:
            raise
        names = [row.name for row in TABLE if LOAD in row.where and row.verdict != REFUSED]
        close = difflib.get_close_matches(found[1], names)
        raise UserError(
            "from_pretrained has no such argument",
            got=found[1],
            allowed=f"such as {', '.join(close)}" if close else None,
            do="Check the spelling, or leave it out",
        ) from error


def as_markdown(table: Sequence[PeerArgument] = TABLE) -> str:
    """The table for docs/coming_from_unsloth.md, in its own order."""
    functions = {name for row in table for name in row.where}
    lines = ["| argument of | name | here | what it does |", "|---|---|---|---|"]
    for row in table:
        is_long = len(row.where) > 3 and set(row.where) == functions
        where = f"all {len(functions)}" if is_long else ", ".join(f"`{n}`" for n in row.where)
        lines.append(f"| {where} | `{row.name}` | {row.verdict} | {row.what} |")
    return "\n".join(lines) + "\n"
