"""The benchmark of TRL's preference and reinforcement trainers runs dry, on both sides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")

from benchmarks import preference  # noqa: E402


def test_fused_layers_train_as_the_models_own_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["preference", "--dry"])
    preference.main()
    rows = json.loads((tmp_path / "preference_dry.json").read_text("utf-8"))["rows"]
    if any("skipped" in row for row in rows):
        # TRL moved ORPO more than once
        assert [row["trainer"] for row in rows if "skipped" in row] == ["orpo"]
    done = [row for row in rows if "skipped" not in row]
    assert {row["trainer"] for row in done} >= {"dpo", "grpo"}
    for row in done:
        assert row["fused_layers"] == 2 and row["stock_passes"] == {}
        assert len(row["losses"]) == len(row["stock_losses"]) == 3
        assert row["loss_difference"] <= 1e-5 * max(map(abs, row["losses"])) + 1e-6
        assert row["norm_difference"] <= 1e-4
        assert row["weight_difference"] <= 2e-4
        assert len({round(loss, 9) for loss in row["losses"]}) == 3, "nothing was learnt"
    assert "gradient norm" in capsys.readouterr().out


def test_pairs_prefer_the_rows_own_answer() -> None:
    pairs = preference.sample_pairs()
    assert len(pairs) == preference.PAIRS
    for pair, following in zip(pairs, pairs[1:], strict=False):
        assert pair["rejected"] == following["chosen"] != pair["chosen"]


def test_an_unknown_trainer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preference", "--trainers", "dpo,kto"])
    with pytest.raises(SystemExit):
        preference.main()
    assert "unknown: kto; there are dpo, orpo, grpo" in capsys.readouterr().err
