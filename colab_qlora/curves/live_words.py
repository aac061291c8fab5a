"""What is said of a run while it goes on: its pace, a line of progress, the words under the plot.

All of it is read from the last records of the log, so that a resumed or a recorded run reads like
any other. Nothing here looks at a clock.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.curves.logs.records import number_or_none

__all__ = ["Pace", "Start", "as_html", "eval_line", "pace_of", "progress_line", "status_line"]

Records = Sequence[Mapping[str, Any]]

# enough to average over an evaluation and over rows of different length, few enough to forget the
# first steps, in which kernels are compiled
_WINDOW_RECORDS = 50


@dataclass(frozen=True)
class Start:
    """Where this session began: 0, or what an earlier session of the run had reached.

    Attributes:
        step: the last finished step.
        seconds: training time up to there, in s.
        tokens: tokens trained on up to there.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @classmethod
    def after(cls, records: Records) -> Start:
        """The start of a session that goes on after these records."""
        if not records:
            return cls()
        tokens = (number_or_none(record.get("tokens")) for record in reversed(records))
        return cls(
            int(records[-1]["step"]),
            number_or_none(records[-1].get("seconds")) or 0.0,
            int(next((count for count in tokens if count is not None), 0)),
        )


@dataclass(frozen=True)
class Pace:
    """How fast a run is; what the log does not tell is None.

    Attributes:
        step_seconds: seconds for each step, evaluations included.
        tokens_per_second: tokens trained on for each second, evaluations included.
        seconds_left: until the last step.
    """

    step_seconds: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


def pace_of(records: Records, start: Start, total_steps: int | None) -> Pace:
    """The pace over the last 50 records of this session.

    Args:
        records: the log, oldest first.
        start: where this session began.
        total_steps: steps of the whole run; None if unknown.
    """
    seconds = number_or_none(records[-1].get("seconds")) if records else None
    if seconds is None:
        return Pace()
    first, now = start, Start.after(records[-_WINDOW_RECORDS:])
    if len(records) > _WINDOW_RECORDS:
        # a few records more, because not every one counts tokens
        oldest = Start.after(records[-2 * _WINDOW_RECORDS : -_WINDOW_RECORDS])
        first = oldest if oldest.step > start.step else start
    steps, elapsed = now.step - first.step, seconds - first.seconds
    if steps <= 0 or elapsed <= 0:
        return Pace()
    step_seconds = elapsed / steps
    tokens = now.tokens - first.tokens
    return Pace(
        step_seconds,
        tokens / elapsed if tokens > 0 else None,
        None if not total_steps else step_seconds * max(0, total_steps - now.step),
    )


def progress_line(records: Records, start: Start, total_steps: int | None) -> str:
    """The last train record as "step 12/96 | loss 1.8300 | 0.5 s/step | 42 s left | ..."."""
    last = records[-1]
    parts = [_step(last["step"], total_steps), f"loss {last['loss']:.4f}"]
    pace = pace_of(records, start, total_steps)
    if pace.step_seconds is not None:
        parts.append(f"{pace.step_seconds:.1f} s/step")
    if pace.seconds_left is not None:
        parts.append(f"{_duration(pace.seconds_left)} left")
    if (peak := _latest(records, "peak_memory_gib")) is not None:
        parts.append(f"peak {peak[1]:.1f} GiB")
    return " | ".join(parts)


def eval_line(eval_loss: float, step: int, total_steps: int | None) -> str:
    """An evaluation as "step 12/96 | eval loss 1.9000"; without a step where no run goes on."""
    at = f"{_step(step, total_steps)} | " if total_steps else ""
    return f"{at}eval loss {eval_loss:.4f}"


def status_line(
    records: Records, start: Start, total_steps: int | None, *, is_finished: bool = False
) -> str:
    """Step, tokens/s, time left, memory and current losses in one line, for under the plot."""
    step = int(records[-1]["step"])
    parts = [f"step {step:,}" + (f" of {total_steps:,}" if total_steps else "")]
    pace = pace_of(records, start, total_steps)
    if pace.tokens_per_second is not None:
        parts.append(f"{pace.tokens_per_second:,.0f} tokens/s")
    if pace.seconds_left and not is_finished:
        parts.append(f"{_duration(pace.seconds_left)} left")
    if (peak := _latest(records, "peak_memory_gib")) is not None:
        parts.append(f"peak memory {peak[1]:.1f} GiB")
    if (train := _latest(records, "loss")) is not None:
        parts.append(f"train loss {train[1]:.4f}")
    if (evaluated := _latest(records, "eval_loss")) is not None:
        at = "" if evaluated[0] == step else f" (step {evaluated[0]:,})"
        parts.append(f"eval loss {evaluated[1]:.4f}{at}")
    return " | ".join(parts)


def as_html(lines: Sequence[str]) -> str:
    """Lines of text as paragraphs that take the notebook's own font and colours."""
    paragraphs = (f'<p style="margin: 0 0 0.3em 0">{html.escape(line)}</p>' for line in lines)
    return f"<div>{''.join(paragraphs)}</div>"


def _latest(records: Records, key: str) -> tuple[int, float] | None:
    """Step and value of the last record that has the key, or None."""
    for record in reversed(records):
        value = number_or_none(record.get(key))
        if value is not None:
            return int(record["step"]), value
    return None


def _step(step: int, total_steps: int | None) -> str:
    return f"step {step}/{total_steps}" if total_steps else f"step {step}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
