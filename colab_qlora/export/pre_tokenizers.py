"""llama.cpp's name of the way in which a byte-level BPE splits a text into words.

The name decides the regular expression that llama.cpp uses, so a wrong one gives other tokens
without a word. It is read off the tokenizer's own splitter, and refused if that is not known.

Each expression is that of the authors' tokenizer.json, and the name is the one under which
llama.cpp (src/llama-vocab.cpp) has the same.
"""

from __future__ import annotations

from typing import Any

from colab_qlora.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

LLAMA_3 = _WORD + r"|\p{N}{1,3}" + _TAIL
QWEN_2 = _WORD + r"|\p{N}" + _TAIL
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2, SMOLLM = "byte level", "digits, byte level"

# (what splits, whether a word that is a token is taken whole) -> name
_NAMES = {
    (LLAMA_3, True): "llama-bpe",
    (LLAMA_3, False): "dbrx",
    (QWEN_2, False): "qwen2",
    (TEKKEN, True): "tekken",
    (GPT_4O, False): "gpt-4o",
    (GPT_2, False): "gpt-2",
    (SMOLLM, False): "smollm",
}


def pre_tokenizer_name(pre_tokenizer: dict[str, Any] | None, ignores_merges: bool) -> str:
    """The value of `tokenizer.ggml.pre`.

    Args:
        pre_tokenizer: the part of tokenizer.json of that name.
        ignores_merges: whether a word that is a token is taken whole, as Llama 3 does.

    Raises:
        UserError: a splitter that is not known here.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    name = _NAMES.get((_splitter(steps) or "", ignores_merges))
    if name is None:
        raise UserError(
            "the tokenizer splits text in a way whose name in llama.cpp is not known here",
            got=" then ".join(_shown(step) for step in steps) or "no splitter",
            allowed="that of " + ", ".join(sorted(_NAMES.values())),
            do="Save the model with save_pretrained_merged, and convert that folder with "
            "llama.cpp's convert_hf_to_gguf.py",
        )
    return name


def _splitter(steps: list[dict[str, Any]]) -> str | None:
    """The regular expression of a split before the byte level, or one of the two named forms."""
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    uses_own = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_own:
        return GPT_2
    if kinds == ["Digits", "ByteLevel"] and uses_own and steps[0].get("individual_digits"):
        return SMOLLM
    is_split = kinds == ["Split", "ByteLevel"] and not uses_own
    if is_split and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return steps[0]["pattern"].get("Regex")
    return None


def _shown(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {}).get("Regex", "")
    return f"{step.get('type')}({pattern})" if pattern else str(step.get("type"))
