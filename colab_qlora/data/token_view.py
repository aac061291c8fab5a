"""Show an example token by token, and which tokens are trained.

Trained tokens are underlined twice and boxed with a solid line; the rest has a dotted box. Colour
comes on top of that and is never the only mark. The colours are translucent, so that the page's
own text and background show through in light and dark themes alike.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from colab_qlora.data.encode import check_max_seq_length, encode
from colab_qlora.data.wording import counted

# an invisible character stays one token's own, so it is drawn as a mark
_SPACE, _LINE_BREAK, _TAB = "\u00b7", "\u21b5", "\u2192"
_REPLACEMENT = "\ufffd"
# the label that losses leave out
_IGNORED = -100
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")

_STYLE = """<style>
.cq-tokens {font-family: monospace; line-height: 2.1; color: inherit; background: transparent}
.cq-tokens span.cq-token, .cq-tokens ins.cq-token {padding: 1px 2px; margin: 0 1px;
 border-radius: 3px; color: inherit; white-space: pre; unicode-bidi: isolate}
.cq-tokens span.cq-token {border: 1px dotted rgba(128, 128, 128, 0.9); text-decoration: none}
.cq-tokens ins.cq-token {border: 2px solid rgba(0, 125, 190, 0.9);
 background: rgba(0, 125, 190, 0.2); text-decoration: underline double}
</style>"""


@dataclass(frozen=True, repr=False)
class TokenView:
    """The tokens of one example; a notebook shows boxes, a terminal shows trained ones in brackets.

    Args:
        rows: (text, token id, trained) of each token that training keeps.
        tokens_cut: tokens behind `max_seq_length`, which training does not see.
    """

    rows: tuple[tuple[str, int, bool], ...]
    tokens_cut: int = 0

    def legend(self) -> str:
        """Say how many tokens are trained, read only and cut."""
        trained = sum(is_trained for _, _, is_trained in self.rows)
        cut = f" {counted(self.tokens_cut, 'token')} cut." if self.tokens_cut else ""
        return (
            f"{trained:,} of {counted(len(self.rows), 'token')} trained, the rest read only.{cut}"
        )

    def __str__(self) -> str:
        parts = [f"[{_marked(text)}]" if t else _marked(text) for text, _, t in self.rows]
        breaks = ["\n" if "\n" in text else "" for text, _, _ in self.rows]
        tokens = "".join(part + end for part, end in zip(parts, breaks, strict=True))
        return f"{self.legend()} Trained tokens are in [brackets].\n{tokens.rstrip()}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        # boxes have no space between them: <wbr> is where a line may break
        boxes = "<wbr>".join(_box(*row) for row in self.rows)
        key = f"{_box('trained', None, True)} {_box('read only', None, False)}"
        return (
            f'{_STYLE}<div class="cq-tokens"><p>{key} {html.escape(self.legend())}</p>{boxes}</div>'
        )


def trained_tokens(row: Mapping[str, Any]) -> list[bool]:
    """Whether each token of a tokenised row is trained on.

    Args:
        row: "input_ids" and, where there are such, "labels" (-100 where not trained on),
            "completion_mask" and "assistant_masks" (0 there).

    Returns:
        One value a token; all of these columns have to agree, and without any it is True.
    """
    trained = [label != _IGNORED for label in row.get("labels") or row["input_ids"]]
    for name in ("completion_mask", "assistant_masks"):
        marks = row.get(name) or [1] * len(trained)
        trained = [t and bool(mark) for t, mark in zip(trained, marks, strict=True)]
    return trained


def token_rows(
    example: Mapping[str, Any], tokenizer: Any, max_seq_length: int | None = None
) -> list[tuple[str, int, bool]]:
    """Tokenise one example as training does.

    Args:
        example: one of what `format_alpaca` or `format_chat` returned (see `encode`), or a row
            that a trainer has tokenised (see `trained_tokens`).
        tokenizer: a Hugging Face tokenizer.
        max_seq_length: tokens that training keeps, from 1 up; None keeps all.

    Returns:
        One (text, token id, trained) a token. Bytes that are only a part of a character are written
        like "<0xF0>".

    Raises:
        UserError: the example is in no known form, or `max_seq_length` is not None and not an
            integer from 1 up.
    """
    if max_seq_length is not None:
        check_max_seq_length(max_seq_length)
    if isinstance(example, Mapping) and "input_ids" in example:
        ids, trained = list(example["input_ids"]), trained_tokens(example)
    else:
        ids, label_start = encode(example, tokenizer)
        trained = [index >= label_start for index in range(len(ids))]
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
    kept = ids[:max_seq_length]
    texts = [_token_text(token_id, anchor, tokenizer) for token_id in kept]
    return list(zip(texts, kept, trained, strict=False))


def show_tokens(
    example: Mapping[str, Any], tokenizer: Any, max_seq_length: int | None = None
) -> TokenView:
    """Show one example token by token; the arguments and errors are those of `token_rows`.

    Returns:
        An object that a notebook draws as boxes and `print` shows as text.
    """
    rows = token_rows(example, tokenizer)
    if max_seq_length is not None:
        check_max_seq_length(max_seq_length)
    kept = rows[:max_seq_length]
    return TokenView(tuple(kept), tokens_cut=len(rows) - len(kept))


def _token_text(token_id: int, anchor: list[int], tokenizer: Any) -> str:
    # decoded behind an anchor, because some tokenizers drop the space in front of the first token
    before, after = (_decoded(ids, tokenizer) for ids in (anchor, [*anchor, token_id]))
    text = after[len(before) :] if after.startswith(before) else _decoded([token_id], tokenizer)
    if text and _REPLACEMENT not in text:
        return text
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if _BYTE_TOKEN.fullmatch(token):  # SentencePiece writes its bytes like this itself
        return token
    alphabet = _byte_of_character()
    if all(character in alphabet for character in token):
        return "".join(f"<0x{alphabet[character]:02X}>" for character in token)
    return token


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The alphabet in which byte-level BPE writes its tokens: printable Latin-1 is itself, the
    other 68 bytes follow from U+0100 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _marked(text: str) -> str:
    marks = {" ": _SPACE, "\n": _LINE_BREAK, "\t": _TAB, "\r": "\\r"}
    return "".join(marks.get(character, character) for character in text)


def _box(text: str, token_id: int | None, trained: bool) -> str:
    tag, state = ("ins", "trained") if trained else ("span", "read only")
    title = "" if token_id is None else f' title="token {token_id}, {state}"'
    shown = html.escape(_marked(text) if token_id is not None else text)
    box = f'<{tag} class="cq-token"{title}>{shown}</{tag}>'
    return box + "<br>" if "\n" in text else box
