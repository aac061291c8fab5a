"""Count tokens and labels before training, because truncation eats the answers first.

A trainer keeps the first max_seq_length tokens of a row. The completion stands at the end, so a
long row loses its answer; a row whose prompt alone fills the window has nothing left to learn. TRL
drops such a row or trains on none of its tokens, depending on its version, without an error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.chat_texts import readable_template_errors
from colab_qlora.data.encode import check_max_seq_length, encode
from colab_qlora.data.records import where
from colab_qlora.data.wording import counted, first_few
from colab_qlora.errors import UserError


@dataclass(frozen=True)
class LengthReport:
    """How long the rows are and how much of them is trained.

    Args:
        max_seq_length: the window that was audited, in tokens.
        rows: number of examples.
        tokens_total: tokens of all rows before truncation.
        tokens_p50: median row length before truncation, in tokens (nearest rank).
        tokens_p95: length that 95% of the rows do not exceed, in tokens (nearest rank).
        tokens_max: longest row, in tokens.
        rows_truncated: rows longer than `max_seq_length`.
        share_truncated: `rows_truncated` / `rows`, from 0 to 1.
        rows_without_labels: indexes of the rows with no labelled token left after truncation.
        labelled_share: share of the kept tokens that carry a label, from 0 to 1.
        smallest_max_seq_length: the least window, in tokens, that keeps a label in every row; None
            if some row has no label at any length.
    """

    max_seq_length: int
    rows: int
    tokens_total: int
    tokens_p50: int
    tokens_p95: int
    tokens_max: int
    rows_truncated: int
    share_truncated: float
    rows_without_labels: tuple[int, ...]
    labelled_share: float
    smallest_max_seq_length: int | None

    def __str__(self) -> str:
        lengths = (
            f"{counted(self.rows, 'row')} with {counted(self.tokens_total, 'token')}: "
            f"half of them have at most {self.tokens_p50:,}, 95% at most {self.tokens_p95:,}, "
            f"the longest {self.tokens_max:,}."
        )
        unlabelled = len(self.rows_without_labels)
        left = f"{counted(unlabelled, 'row')} without any" if unlabelled else "some in every row"
        labels = f"{self.labelled_share:.1%} of the kept tokens carry a label, {left}."
        return f"{lengths} {self.truncation()} {labels}"

    def truncation(self) -> str:
        """Say in one sentence how many rows are longer than the window."""
        if not self.rows_truncated:
            return f"None is longer than max_seq_length={self.max_seq_length}."
        verb = "is" if self.rows_truncated == 1 else "are"
        return (
            f"{counted(self.rows_truncated, 'row')} ({self.share_truncated:.1%}) {verb} longer "
            f"than max_seq_length={self.max_seq_length} and cut at the end."
        )


def audit_lengths(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, max_seq_length: int
) -> LengthReport:
    """Tokenise every example and report lengths, truncation and labels.

    Args:
        examples: what `format_alpaca` or `format_chat` returned (see `encode` for all forms).
        tokenizer: a Hugging Face tokenizer.
        max_seq_length: tokens that training keeps of each row, from 1 up.

    Returns:
        The report; print it for the sentences.

    Raises:
        UserError: there is no example, an example is in no known form, or `max_seq_length` is not
            an integer from 1 up.
    """
    check_max_seq_length(max_seq_length)
    return length_report(lengths_and_starts(examples, tokenizer), max_seq_length)


def lengths_and_starts(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any
) -> list[tuple[int, int]]:
    """(tokens, index of the first token that carries a label) of each example, before truncation.

    Args:
        examples, tokenizer: as of `audit_lengths`.

    Raises:
        UserError: an example is in no known form, or its chat template refuses it.
    """
    pairs = []
    for index, example in enumerate(examples):
        with readable_template_errors(where(examples, index)):
            ids, label_start = encode(example, tokenizer)
        pairs.append((len(ids), label_start))
    return pairs


def length_report(pairs: Sequence[tuple[int, int]], max_seq_length: int) -> LengthReport:
    """Report lengths, truncation and labels of rows that are tokenised already.

    Args:
        pairs: of each row, what `lengths_and_starts` gives.
        max_seq_length: tokens that training keeps of each row, from 1 up.

    Raises:
        UserError: there is no row, or `max_seq_length` is not an integer from 1 up.
    """
    check_max_seq_length(max_seq_length)
    if len(pairs) == 0:
        raise UserError(
            "there is no example to audit",
            got="0 examples",
            allowed="at least one",
            do="Pass what format_alpaca or format_chat returned",
        )
    lengths = [length for length, _ in pairs]
    label_starts = [start for _, start in pairs]
    kept = [min(length, max_seq_length) for length in lengths]
    labelled = [max(0, k - start) for k, start in zip(kept, label_starts, strict=True)]
    has_labels = all(s < n for s, n in zip(label_starts, lengths, strict=True))
    rows_truncated = sum(length > max_seq_length for length in lengths)
    ordered = sorted(lengths)
    return LengthReport(
        max_seq_length=max_seq_length,
        rows=len(lengths),
        tokens_total=sum(lengths),
        tokens_p50=_nearest_rank(ordered, 50),
        tokens_p95=_nearest_rank(ordered, 95),
        tokens_max=ordered[-1],
        rows_truncated=rows_truncated,
        share_truncated=rows_truncated / len(lengths),
        rows_without_labels=tuple(i for i, count in enumerate(labelled) if count == 0),
        labelled_share=sum(labelled) / max(1, sum(kept)),
        smallest_max_seq_length=max(label_starts) + 1 if has_labels else None,
    )


def check_labels(report: LengthReport, on: str = "error") -> str:
    """Refuse rows that have nothing left to learn; report rows that are merely cut.

    Args:
        report: what `audit_lengths` returned.
        on: "error" raises for rows without a label, "warn" warns with the same words.

    Returns:
        One sentence: how many rows are longer than the window, and what share.

    Raises:
        UserError: a row has no labelled token left after truncation and `on` is "error"; or `on` is
            neither of the two.
    """
    if on not in ("error", "warn"):
        raise UserError(
            "on is unknown", got=repr(on), allowed="'error' or 'warn'", do="Pass on='error'"
        )
    bare = report.rows_without_labels
    if bare:
        error = _no_labels(report)
        if on == "error":
            raise error
        warnings.warn(str(error), stacklevel=2)
    return report.truncation()


def _no_labels(report: LengthReport) -> UserError:
    bare = report.rows_without_labels
    names = first_few([str(i) for i in bare], separator=", ")
    verb = "has" if len(bare) == 1 else "have"
    smallest = report.smallest_max_seq_length
    if smallest is None:
        allowed = "at least one completion token in every row"
        do = "Fill the empty completions, or set the tokenizer's eos_token"
    else:
        allowed = f"max_seq_length of at least {smallest}, which keeps a label in every row"
        do = f"Set max_seq_length={smallest} or more, or shorten or drop these rows"
    return UserError(
        f"{len(bare):,} of {counted(report.rows, 'row')} ({len(bare) / report.rows:.1%}) {verb} "
        "no labelled token left after truncation",
        got=f"max_seq_length={report.max_seq_length}, rows {names}",
        allowed=allowed,
        do=do,
    )


def _nearest_rank(ordered: Sequence[int], percent: int) -> int:
    return ordered[math.ceil(percent * len(ordered) / 100) - 1]
