"""How often the diagnosis is right, on curves whose cause is known.

    python -m benchmarks.curve_corpus [--draws 10]

The generated curves are drawn several times with other noise; the first draw is the one that the
tests use. Real runs are those in tests/curves/corpus/. A hit names the cause; "watched" counts the
hits that are only a suspicion. A false alarm claims, as more than a suspicion, one of non-finite,
unstable, overfitting or suspected leakage that is not the cause.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import generated_curves, record
from benchmarks.table import format_table
from colab_qlora import read_log
from colab_qlora.curves import diagnose
from colab_qlora.curves.verdicts import NAMES

REAL = Path(__file__).resolve().parent.parent / "tests" / "curves" / "corpus"


def generated(draws: int) -> list[tuple[str, str, Any, Any]]:
    """Cause, name, records and run of each generated curve."""
    found = []
    shapes, slow_shapes = list(generated_curves.SHAPES), list(generated_curves.SLOW_SHAPES)
    for draw in range(draws):
        generated_curves.SHAPES[:] = [replace(s, seed=s.seed + 100 * draw) for s in shapes]
        generated_curves.SLOW_SHAPES[:] = [
            replace(s, seed=s.seed + 100 * draw) for s in slow_shapes
        ]
        found += [(c.cause, c.name, c.records, c.run) for c in generated_curves.corpus()]
    generated_curves.SHAPES[:], generated_curves.SLOW_SHAPES[:] = shapes, slow_shapes
    return found


def real() -> list[tuple[str, str, Any, Any]]:
    """The same of each recorded run."""
    logs = [(path.stem, read_log(path)) for path in sorted(REAL.glob("*.jsonl"))]
    return [(log.run["cause"], name, log.records, log.run) for name, log in logs]


def judge(curves: list[tuple[str, str, Any, Any]], source: str) -> list[dict[str, Any]]:
    """One row a cause: curves, hits, misses by name, false alarms."""
    rows: dict[str, dict[str, Any]] = {}
    confused: dict[str, list[str]] = defaultdict(list)
    for cause, name, records, run in curves:
        row = rows.setdefault(
            cause,
            {
                "source": source,
                "cause": cause,
                "curves": 0,
                "hits": 0,
                "watched": 0,
                "false_alarms": 0,
            },
        )
        found = diagnose(records, run=run)
        row["curves"] += 1
        row["hits"] += cause in found.names
        row["watched"] += (v := found.get(cause)) is not None and v.confidence == "watch"
        row["false_alarms"] += any(v.is_alarm and v.name != cause for v in found.verdicts)
        if cause not in found.names:
            confused[cause].append(f"{name}: {found.main.name}")
    order = [cause for cause in NAMES if cause in rows]
    return [rows[cause] | {"missed": confused[cause]} for cause in order]


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    began = time.perf_counter()
    rows = judge(generated(options.draws), "generated") + judge(real(), "real")
    seconds = time.perf_counter() - began
    columns = ("source", "cause", "curves", "hits", "watched", "false_alarms")
    print(format_table(columns, [[str(row[c]) for c in columns] for row in rows], ["cause"]))
    for row in rows:
        for missed in row["missed"]:
            print(f"missed {row['cause']} ({row['source']}): {missed}")
    curves, hits = sum(r["curves"] for r in rows), sum(r["hits"] for r in rows)
    print(f"{hits} of {curves} causes named ({hits / curves:.1%}) in {seconds:.0f} s")
    print(f"wrote {record.write('curve_corpus', rows, draws=options.draws)}")


if __name__ == "__main__":
    main()
