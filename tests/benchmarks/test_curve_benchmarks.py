"""The commands that make curves of known cause and judge the diagnosis by them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_hits_misses_and_false_alarms_are_counted() -> None:
    from benchmarks.curve_corpus import judge

    falling = [{"step": i, "loss": 1 + 2 / i} for i in range(1, 101)]
    broken = [r | {"loss": float("nan")} if r["step"] == 50 else r for r in falling]
    curves = [
        ("healthy", "sound", falling, {}),
        ("healthy", "called healthy, and is not", broken, {}),
        ("overfitting", "not seen", falling, {}),
    ]
    overfitting, healthy = judge(curves, "made up")
    assert (healthy["curves"], healthy["hits"], healthy["false_alarms"]) == (2, 1, 1)
    assert healthy["missed"] == ["called healthy, and is not: non-finite"]
    assert (overfitting["curves"], overfitting["hits"], overfitting["false_alarms"]) == (1, 0, 0)


def test_every_draw_is_another_one_and_leaves_the_first_as_it_was() -> None:
    from benchmarks import curve_corpus, generated_curves

    shapes = list(generated_curves.SHAPES)
    one, two = curve_corpus.generated(1), curve_corpus.generated(2)
    assert len(two) == 2 * len(one)
    # as text, since nan is no equal of itself
    assert repr(two[: len(one)]) == repr(one)
    assert shapes == generated_curves.SHAPES
    assert not {name for _, name, _, _ in one} & {name for _, name, _, _ in two[len(one) :]}


@pytest.mark.model
def test_a_run_of_known_cause_is_made(tiny_model_folder: Path, tmp_path: Path) -> None:
    from benchmarks.record_corpus import SMALL, make_run
    from colab_qlora import diagnose, read_log

    run = replace(SMALL["frozen"], rows=96, evals=3)
    made = make_run("frozen", run, str(tiny_model_folder), tmp_path)
    log = read_log(made)
    assert (log.run["cause"], log.run["made_by"]["rows"]) == ("not learning", 96)
    assert {r["grad_norm"] for r in log if "grad_norm" in r} == {0.0}
    assert diagnose(log).names == ("not learning",)
    assert "trainable parameters" in diagnose(log).main.action


@pytest.mark.model
def test_early_stopping_keeps_what_the_plain_run_loses(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from benchmarks.early_stopping import run

    options = argparse.Namespace(model=str(tiny_model_folder), rows=16, epochs=4, dry=True)
    plain, log = run("without", options, str(tmp_path / "a"))
    kept, _ = run("with EarlyStopping", options, str(tmp_path / "b"))
    assert plain["eval_before"] == pytest.approx(kept["eval_before"])
    assert len([r for r in log if "eval_loss" in r]) >= 3
    assert kept["eval_of_adapter_kept"] == pytest.approx(kept["eval_lowest"], rel=1e-5)
