"""What the live plot costs a training: seconds a step, and as a share of the run's time.

    python -m benchmarks.live_overhead [--dry]

Records of a made-up run are shown as they would come. Drawing is done and timed for real, into a
display that takes the picture as a kernel would (as JSON) and shows it to nobody; the training in
between is not done: its seconds are added to the clock that the plot looks at. So a run of an hour
takes a minute, and the plot's own throttle sees what it would see.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.table import format_table, number
from colab_qlora.curves.live import LivePlot
from colab_qlora.curves.log import LossLog


@dataclass(frozen=True)
class Case:
    """A run to show.

    Attributes:
        name: in the table.
        steps: steps that are shown; one record each.
        step_seconds: training time of a step, in s.
        eval_every: steps from one evaluation to the next.
        eval_seconds: time of an evaluation, in s.
        earlier: points that the log holds before the first of these steps.
        plot: False for lines instead of the picture.
    """

    name: str
    steps: int
    step_seconds: float
    eval_every: int
    eval_seconds: float
    earlier: int = 0
    plot: bool = True


CASES = (
    Case("8B on a T4", 1000, 5.0, 100, 60.0),
    Case("135M on a GPU", 1000, 0.3, 100, 3.0),
    Case("135M, evaluated often", 1000, 0.3, 8, 1.0),
    Case("8B, at 10,000 points", 1000, 5.0, 100, 60.0, earlier=9000),
    Case("135M, at 10,000 points", 1000, 0.3, 100, 3.0, earlier=9000),
    Case("135M, lines", 1000, 0.3, 100, 3.0, plot=False),
)
DRY = (
    Case("dry", 60, 5.0, 20, 10.0, earlier=20),
    Case("dry, lines", 60, 5.0, 20, 10.0, plot=False),
)


class Clock:
    """The time that passes here, and the training's that does not."""

    def __init__(self) -> None:
        self.trained_seconds = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.trained_seconds


class Screen:
    """A display that turns what it is given into a message, and counts the bytes."""

    def __init__(self) -> None:
        self.message_bytes = 0

    def __call__(self, bundle: dict[str, str], **options: Any) -> Screen:
        self.update(bundle)
        return self

    def update(self, bundle: dict[str, str], **options: Any) -> None:
        self.message_bytes += len(json.dumps({"data": bundle}))


def records_of(case: Case) -> list[dict[str, Any]]:
    """A run that learns, with the noise of a real one (15 %), evaluated as the case says."""
    noise = np.random.default_rng(0).normal(0, 0.15, case.earlier + case.steps)
    records: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0, "seconds": 0.0}]
    seconds = 0.0
    for step in range(1, case.earlier + case.steps + 1):
        level = 1 + 2 * math.exp(-4 * step / (case.earlier + case.steps))
        seconds += case.step_seconds
        at = {"step": step, "seconds": seconds, "tokens": 2000 * step, "peak_memory_gib": 9.5}
        loss = level * (1 + float(noise[step - 1]))
        records.append({**at, "loss": loss, "learning_rate": 2e-4, "grad_norm": 0.5})
        if step % case.eval_every == 0:
            seconds += case.eval_seconds
            records.append({**at, "seconds": seconds, "eval_loss": 1.02 * level})
    return records


def measure(case: Case) -> dict[str, Any]:
    """Show the run; a row for JSON."""
    records = records_of(case)
    first = next(i for i, r in enumerate(records) if r["step"] > case.earlier)
    clock, screen, log = Clock(), Screen(), LossLog(records[:first])
    live = LivePlot(
        case.earlier + case.steps,
        plot=case.plot,
        display=screen if case.plot else None,
        clock=clock,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        begin_seconds = _timed(lambda: live.begin(log))
        update_seconds = 0.0
        for entry in records[first:]:
            is_eval = "eval_loss" in entry
            clock.trained_seconds += case.eval_seconds if is_eval else case.step_seconds
            log.records.append(entry)
            update_seconds += _timed(lambda: live.update(log))
        finish_seconds = _timed(lambda: live.finish(log))
    redraws = max(0, live.redraws - 1)  # the last one is the end's
    return {
        "case": case.name,
        "steps": case.steps,
        "points": len(records),
        "training_seconds": clock.trained_seconds,
        "redraws": redraws,
        "evals": sum("eval_loss" in entry for entry in records[first:]),
        "seconds_per_redraw": update_seconds / redraws if redraws else None,
        "ms_per_step": 1e3 * update_seconds / case.steps,
        "share": update_seconds / clock.trained_seconds,
        "begin_seconds": begin_seconds,
        "finish_seconds": finish_seconds,
        "kib_per_redraw": screen.message_bytes / 1024 / live.redraws if live.redraws else None,
        "lines": len(printed.getvalue().splitlines()),
    }


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["run", "points", "training s", "evals", "redraws", "s/redraw", "ms/step", "share"]
    head += ["before s", "end s", "KiB/redraw"]
    cells = [
        [
            row["case"],
            f"{row['points']:,}",
            f"{row['training_seconds']:,.0f}",
            str(row["evals"]),
            str(row["redraws"]),
            number(row["seconds_per_redraw"]),
            number(row["ms_per_step"]),
            f"{row['share']:.2%}",
            f"{row['begin_seconds']:.2f}",
            f"{row['finish_seconds']:.2f}",
            number(row["kib_per_redraw"]),
        ]
        for row in rows
    ]
    return format_table(head, cells)


def main() -> None:
    """Measure every case, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="60 steps, to see that it runs")
    options = parser.parse_args()
    rows = [measure(case) for case in (DRY if options.dry else CASES)]
    print(_table(rows))
    name = "live_overhead_dry" if options.dry else "live_overhead"
    print(f"wrote {record.write(name, rows)}")


if __name__ == "__main__":
    main()
