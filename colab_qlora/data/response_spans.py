"""Which tokens of a row belong to an assistant's answer.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                            ---------------

Markers are looked for in the text, and tokens are matched to it by their characters, because the
tokens of a marker depend on what stands beside it: a tokenizer may join a marker's line break with
the answer's first one. An answer begins behind its marker and has the end of its turn in it, so
that the model learns to stop. The line break behind that end is nobody's text.

A token that has characters on both sides of a border is not trained on: a part of it is the
prompt's, and the model meets that part as another token when it is asked.

A user may write a marker too. A marker's special tokens have to be there as such, so one that was
tokenised as plain text is none. A response marker is none inside a user's turn that has not ended,
if the template ends these. Of response markers with no turn's end between them only the last
counts, as the earlier may be a quotation; an answer that quotes one is then learnt in part. What
imitates the end of a turn and a marker token by token cannot be told from a turn, and is trained
on: such text has to be tokenised with split_special_tokens=True.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from colab_qlora.data.response_markers import TurnMarkers

Span = tuple[int, int]
_REPLACEMENT = "\ufffd"
# a character has 4 bytes at most; more tokens than that do not wait for its rest
_MOST_TOKENS_OF_A_CHARACTER = 4


class _Kind(Enum):
    INSTRUCTION = 1
    RESPONSE = 2
    OTHER_TURN = 3
    END = 4
    EOS = 5


@dataclass(frozen=True)
class _Event:
    start: int
    end: int
    kind: _Kind


@dataclass(frozen=True)
class _Spelling:
    """A way in which a marker stands in a row: its text, and (offset, id) of special tokens."""

    text: str
    specials: tuple[tuple[int, int], ...]


class ResponseFinder:
    """Finds the tokens of assistants' answers in tokenised rows.

    Args:
        tokenizer: the Hugging Face tokenizer that the rows were tokenised with.
        markers: what stands before and behind the turns.
        force_match: True: a marker's line breaks have to be there as they are; False: white space
            around a marker is its own, however much of it there is, and may be missing; but the
            space before a word is the word's.
    """

    def __init__(self, tokenizer: Any, markers: TurnMarkers, *, force_match: bool = True) -> None:
        self.tokenizer, self.markers, self.force_match = tokenizer, markers, force_match
        self._spellings = {
            _Kind.END: _spellings(markers.end, tokenizer),
            _Kind.INSTRUCTION: self._marker(markers.instruction),
            _Kind.RESPONSE: self._marker(markers.response),
        }
        # "<|im_start|>" opens the turns of tools too, which have no marker here
        self._openers = _first_specials(self._spellings[_Kind.INSTRUCTION]) & _first_specials(
            self._spellings[_Kind.RESPONSE]
        )

    def mask(self, ids: Sequence[int]) -> list[bool]:
        """Whether each token lies in an answer.

        Args:
            ids: the tokens of one conversation, or of its beginning, shape (tokens,).

        Returns:
            One value a token; the end of the turn and an end-of-sequence token behind it count.
        """
        ids = list(ids)
        text, spans = token_spans(ids, self.tokenizer)
        answers = self._answers(text, self._events(ids, text, spans))
        mask = [False] * len(ids)
        starts = [start for start, _ in spans]
        for first, last in answers:
            for index in range(bisect_left(starts, first), bisect_left(starts, last)):
                mask[index] = spans[index][1] <= last
        return mask

    def _marker(self, marker: str) -> list[_Spelling]:
        return _spellings(marker if self.force_match else marker.strip(), self.tokenizer)

    def _events(self, ids: list[int], text: str, spans: list[Span]) -> list[_Event]:
        """What opens or ends a turn, in order; of several at one place the last found counts."""
        tokens = [(*span, token_id) for span, token_id in zip(spans, ids, strict=True)]
        ids_at = {start: token_id for start, end, token_id in tokens if end > start}
        eos = self.tokenizer.eos_token_id
        found = [_Event(a, b, _Kind.OTHER_TURN) for a, b, i in tokens if i in self._openers]
        found += _occurrences(self._spellings, _Kind.END, text, ids_at)
        found += [_Event(a, b, _Kind.EOS) for a, b, i in tokens if i == eos]
        for kind in (_Kind.INSTRUCTION, _Kind.RESPONSE):
            found += _occurrences(self._spellings, kind, text, ids_at, not self.force_match)
        events = {event.start: event for event in found}
        return sorted(events.values(), key=lambda event: event.start)

    def _answers(self, text: str, events: list[_Event]) -> list[Span]:
        """The characters of the answers, in order."""
        answers: list[Span] = []
        opened: int | None = None
        user_is_writing = False
        previous = _Event(0, 0, _Kind.OTHER_TURN)
        covered = 0
        for event in events:
            if event.start < covered:
                continue
            is_end = event.kind in (_Kind.END, _Kind.EOS)
            if event.kind is _Kind.RESPONSE:
                if user_is_writing and self.markers.ends_every_turn:
                    continue
                opened, user_is_writing, covered = event.end, False, event.end
            elif opened is not None:
                answers.append((opened, event.end if is_end else event.start))
                opened, user_is_writing = None, event.kind is _Kind.INSTRUCTION
            elif event.kind is _Kind.INSTRUCTION:
                user_is_writing = True
            elif is_end:
                if _closes_again(answers, previous, event, text):
                    answers[-1] = (answers[-1][0], event.end)
                user_is_writing = False
            previous = event
        if opened is not None:
            answers.append((opened, len(text)))
        return answers


def token_spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[Span]]:
    """The text of a row and the characters of each token.

    Args:
        ids: token ids, shape (tokens,).
        tokenizer: a Hugging Face tokenizer.

    Returns:
        The text with its special tokens, and (first, behind the last) character of each token.
        Tokens that are parts of one character have that character each.
    """
    ids = list(ids)
    text = _decode(ids, tokenizer)
    spans = _spans_by_encoding(ids, text, tokenizer)
    return _spans_by_decoding(ids, tokenizer) if spans is None else (text, spans)


def _spans_by_encoding(ids: list[int], text: str, tokenizer: Any) -> list[Span] | None:
    """The tokenizer's own offsets; None unless they are those of exactly these tokens."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if list(encoded["input_ids"]) != ids:
        return None
    spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    # some tokenizers leave spaces out of their offsets; then it is not known whose they are
    reached = 0
    for index, (start, end) in enumerate(spans):
        if start != reached and (index == 0 or (start, end) != spans[index - 1]):
            return None
        reached = end
    return spans if reached == len(text) else None


def _spans_by_decoding(ids: list[int], tokenizer: Any) -> tuple[str, list[Span]]:
    """Decode token by token, each behind the ones before it; slower, and right for any tokens."""
    text, spans, start = "", [], 0
    special = _special_ids(tokenizer)
    anchor = 0
    for index in range(len(ids)):
        # decoded behind an anchor, because some tokenizers drop the space before the first token
        before = _decode(ids[anchor:start], tokenizer)
        after = _decode(ids[anchor : index + 1], tokenizer)
        waits = after.endswith(_REPLACEMENT) and index + 1 - start < _MOST_TOKENS_OF_A_CHARACTER
        if waits and index + 1 < len(ids) and ids[index + 1] not in special:
            continue
        alone = _decode(ids[start : index + 1], tokenizer)
        piece = after[len(before) :] if after.startswith(before) else alone
        spans += [(len(text), len(text) + len(piece))] * (index + 1 - start)
        text += piece
        anchor, start = start, index + 1
    return text, spans


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _special_ids(tokenizer: Any) -> set[int]:
    return set(getattr(tokenizer, "added_tokens_decoder", ())) | set(tokenizer.all_special_ids)


def _first_specials(spellings: list[_Spelling]) -> set[int]:
    """The special tokens that a marker begins with."""
    return {token_id for s in spellings for offset, token_id in s.specials if offset == 0}


def _spellings(marker: str, tokenizer: Any) -> list[_Spelling]:
    """The marker as it is, and as it comes back from the tokenizer, which may drop a line break."""
    if not marker.strip():
        return []
    ids = list(tokenizer(marker, add_special_tokens=False)["input_ids"])
    special = _special_ids(tokenizer)
    texts = [marker]
    decoded = _decode(ids, tokenizer)
    if decoded != marker and decoded.split() == marker.split():
        texts.append(decoded)
    found = []
    for text in texts:
        specials, position = [], 0
        for token_id in ids:
            content = str(tokenizer.convert_ids_to_tokens(token_id))
            if token_id in special and (at := text.find(content, position)) >= 0:
                specials.append((at, token_id))
                position = at + len(content)
        found.append(_Spelling(text, tuple(specials)))
    return found


def _occurrences(
    spellings: Mapping[_Kind, list[_Spelling]],
    kind: _Kind,
    text: str,
    ids_at: Mapping[int, int],
    with_white_space: bool = False,
) -> Iterator[_Event]:
    """Where a marker stands with its special tokens, the longer spelling last."""
    before = r"\s*" if with_white_space else ""
    # a space is a part of the answer's first token
    after = r"(?:\s*[^\S ])?" if with_white_space else ""
    for spelling in sorted(spellings[kind], key=lambda spelling: len(spelling.text)):
        pattern = f"{before}({re.escape(spelling.text)}){after}"
        for match in re.finditer(pattern, text):
            at = match.start(1)
            if all(ids_at.get(at + offset) == token_id for offset, token_id in spelling.specials):
                yield _Event(match.start(), match.end(), kind)


def _closes_again(answers: list[Span], previous: _Event, event: _Event, text: str) -> bool:
    """Whether this is the row's end-of-sequence token right behind the end of an answer."""
    return (
        event.kind is _Kind.EOS
        and previous.kind is _Kind.END
        and bool(answers)
        and answers[-1][1] == previous.end
        and not text[previous.end : event.start].strip()
    )
