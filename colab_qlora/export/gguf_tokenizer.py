"""A tokenizer as llama.cpp keeps it in a GGUF file.

gpt2     byte-level BPE: tokens, merges, and the name of the way a text is split before
llama    SentencePiece's BPE: tokens with a score each; the pair with the highest is merged first

What transformers has of both is one `tokenizers` model. Its merges are in the order in which they
are made, so that minus the place of a token's first merge is a SentencePiece score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.export.pre_tokenizers import pre_tokenizer_name

# as of gguf's TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = ("bos", "eos", "unk", "pad")
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}


@dataclass(frozen=True)
class Vocabulary:
    """What the `tokenizer.*` keys of a file say.

    Attributes:
        model: "gpt2" or "llama".
        pre: llama.cpp's name of the splitting; "default" for "llama".
        tokens: one for each row of the embedding.
        types: gguf's `TokenType` of each.
        merges: of "gpt2", "left right".
        scores: of "llama".
        special: role -> id.
        flags: add_bos_token and the like.
        chat_template: Jinja text, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | None = None

    def add_to(self, writer: Any) -> None:
        """Set the keys on a `gguf.GGUFWriter`."""
        prefix = "tokenizer.ggml."
        writer.add_string(f"{prefix}model", self.model)
        writer.add_string(f"{prefix}pre", self.pre)
        writer.add_array(f"{prefix}tokens", self.tokens)
        writer.add_array(f"{prefix}token_type", self.types)
        if self.merges:
            writer.add_array(f"{prefix}merges", self.merges)
        if self.scores:
            writer.add_array(f"{prefix}scores", self.scores)
        for role, token_id in self.special.items():
            writer.add_uint32(f"{prefix}{_KEYS[role]}_token_id", token_id)
        for name, value in self.flags.items():
            writer.add_bool(f"{prefix}{name}", value)
        if self.chat_template:
            writer.add_string("tokenizer.chat_template", self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int, generation_config: Any = None) -> Vocabulary:
    """Read a Hugging Face tokenizer.

    Args:
        tokenizer: with a `tokenizers` model inside, as transformers loads them.
        rows: of the model's embedding; those without a token are filled up.
        generation_config: of the model; a second end token of it is the end of a turn.

    Raises:
        UserError: a tokenizer of another kind, or with more tokens than the embedding has rows.
    """
    description = _description(tokenizer)
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            "this tokenizer cannot be written as GGUF here",
            got=model["type"],
            allowed="BPE, byte-level or SentencePiece's",
            do="Save the model with save_pretrained_merged",
        )
    is_sentencepiece = bool(model.get("byte_fallback"))
    replaces_blanks = is_sentencepiece and bool(_steps(description, "normalizer"))
    tokens, types = _tokens(tokenizer, rows, is_sentencepiece, replaces_blanks)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    special = _special_ids(tokenizer, generation_config)
    flags = {f"add_{role}_token": _adds(tokenizer, role) for role in ("bos", "eos")}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if is_sentencepiece:
        flags["add_space_prefix"] = _prefixes_space(description)
        return Vocabulary(
            "llama", "default", tokens, types, scores=_scores(tokens, merges),
            special=special, flags=flags, chat_template=template,
        )  # fmt: skip
    pre = pre_tokenizer_name(description.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    return Vocabulary(
        "gpt2", pre, tokens, types, merges=[" ".join(merge) for merge in merges],
        special=special, flags=flags, chat_template=template,
    )  # fmt: skip


def _description(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "this tokenizer cannot be written as GGUF here",
            got=type(tokenizer).__name__,
            allowed="one that AutoTokenizer gives for a folder with tokenizer.json",
            do="Load the tokenizer with FastLanguageModel.from_pretrained",
        )
    return json.loads(backend.to_str())


def _tokens(
    tokenizer: Any, rows: int, is_sentencepiece: bool, replaces_blanks: bool
) -> tuple[list[str], list[int]]:
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise UserError(
            "the tokenizer has more tokens than the model's embedding has rows",
            got=max(by_id) + 1,
            allowed=f"{rows} at most",
            do="Call model.resize_token_embeddings(len(tokenizer)) before the training, or take "
            "the tokenizer that the model was trained with",
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(rows):
        token = by_id.get(token_id)
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        if token is None:
            types.append(_UNUSED)
        elif token_id == tokenizer.unk_token_id and is_sentencepiece:
            types.append(_UNKNOWN)
        elif is_sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types.append(_BYTE)
        elif token_id in added and added[token_id].special:
            types.append(_CONTROL)
        elif token_id in added:
            types.append(_USER_DEFINED)
            if replaces_blanks:
                # llama.cpp looks for these before blanks become letters, transformers afterwards
                tokens[-1] = token.replace("\u2581", " ")
        else:
            types.append(_NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault("".join(merge), place)
    # single characters are never the outcome of a merge, so their score is not looked at
    return [-float(first.get(token, len(merges))) for token in tokens]


def _special_ids(tokenizer: Any, generation_config: Any) -> dict[str, int]:
    found = {}
    for role in _SPECIAL:
        token_id = getattr(tokenizer, f"{role}_token_id", None)
        if token_id is not None:
            found[role] = int(token_id)
    ends = getattr(generation_config, "eos_token_id", None)
    others = [end for end in ends if end != found.get("eos")] if isinstance(ends, list) else []
    if others:
        found["eot"] = int(others[0])
    return found


def _adds(tokenizer: Any, role: str) -> bool:
    """Whether `tokenizer(text)` begins with bos, or ends with eos, by itself."""
    token_id = getattr(tokenizer, f"{role}_token_id", None)
    ids = list(tokenizer("a")["input_ids"])
    return token_id is not None and (ids[0] if role == "bos" else ids[-1]) == token_id


def _prefixes_space(description: dict[str, Any]) -> bool:
    """Whether a text gets a space in front before it is cut."""
    found = False
    for key in ("normalizer", "pre_tokenizer"):
        for step in _steps(description, key):
            found |= step.get("type") == "Prepend"
            # "first" adds it at the beginning of a text, as llama.cpp does
            found |= step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
    return found


def _steps(description: dict[str, Any], key: str) -> list[dict[str, Any]]:
    part = description.get(key)
    if not part:
        return []
    return part.get("normalizers", part.get("pretokenizers", [part]))
