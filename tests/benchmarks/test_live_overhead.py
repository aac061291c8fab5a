"""The benchmark of the live plot runs at a small size, and its figures belong together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import live_overhead  # noqa: E402


def test_it_runs_dry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["live_overhead", "--dry"])
    live_overhead.main()
    result = json.loads((tmp_path / "live_overhead_dry.json").read_text("utf-8"))
    assert result["machine"] and result["versions"]
    drawn, lines = result["rows"]
    for row in (drawn, lines):
        assert row["training_seconds"] == pytest.approx(60 * 5.0 + 3 * 10.0)
        total = row["share"] * row["training_seconds"]
        assert row["ms_per_step"] == pytest.approx(1e3 * total / 60)
        assert row["evals"] == 3
    # the first record, the evaluations, and whatever the time allows
    assert drawn["redraws"] >= 4
    assert drawn["lines"] == 0
    assert lines["redraws"] == 0
    # every step took longer than 2 s, so each has a line, and so has each evaluation
    assert lines["lines"] >= 63
    printed = capsys.readouterr().out
    assert "ms/step" in printed
    assert "dry, lines" in printed


def test_the_made_up_run_is_what_the_case_says() -> None:
    case = live_overhead.Case("a", 50, 2.0, 10, 5.0, earlier=30)
    records = live_overhead.records_of(case)
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert sum("loss" in r for r in records) == 80
    assert records[-1]["seconds"] == 80 * 2.0 + 8 * 5.0
