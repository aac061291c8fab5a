"""The sweep on the tiny model: what it finds, that its runs are paired, and what it refuses."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import ROWS  # noqa: E402

from colab_qlora import UserError, read_log  # noqa: E402
from colab_qlora.curves import train_points  # noqa: E402
from colab_qlora.training.learning_rate_sweep import learning_rate_sweep  # noqa: E402
from colab_qlora.training.row_losses import row_losses  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
EVAL_ROWS = [
    {"prompt": f"Question {i}: what comes after {i}?\n", "completion": f"{i + 1} comes after {i}."}
    for i in range(30, 42)
]
# the rate at which 20 steps teach the tiny model most of what it learns from these rows
GOOD = 6e-3
STEPS = 20


@pytest.fixture
def maker(make_trainer: Make) -> Callable[..., Any]:
    """What a user writes: a function that gives a fresh trainer."""

    def build(**options: Any) -> Callable[[float, int, str], Any]:
        def make(learning_rate: float, max_steps: int, output_dir: str) -> Any:
            given = {"eval_rows": EVAL_ROWS, "learning_rate": learning_rate, **options}
            return make_trainer(Path(output_dir), max_steps=max_steps, **given)

        return make

    return build


def test_a_sensible_centre_wins_against_far_too_low_and_far_too_high(
    maker: Callable[..., Any], tmp_path: Path
) -> None:
    lines: list[str] = []
    result = learning_rate_sweep(
        maker(), GOOD, factors=(0.01, 1, 100), steps=STEPS, output_dir=tmp_path, say=lines.append
    )
    low, centre, high = result.runs
    assert [run.learning_rate for run in result.runs] == [GOOD / 100, GOOD, GOOD * 100]
    assert result.outcome == "inside"
    assert result.best is centre
    assert not result.is_tied(low)
    assert not result.is_tied(high)
    assert result.chosen == GOOD
    advice = result.advice()
    assert (advice.setting, advice.as_arguments()) == ("none", {"learning_rate": GOOD})
    # the log on disk is the log of the result, with the schedule that was really used
    for run in result.runs:
        assert run.log.path is not None
        stored = read_log(run.log.path)
        assert stored.records == run.log.records
        assert stored.run["lr_scheduler_type"] == "constant_with_warmup"
        assert stored.run["learning_rate"] == run.learning_rate
        evals = [record["step"] for record in stored.records if "eval_loss" in record]
        assert evals == [0, STEPS // 2, STEPS]
        rates = [r["learning_rate"] for r in stored.records if "loss" in r]
        assert rates[2:] == pytest.approx([run.learning_rate] * (STEPS - 2))
    # same order of rows: before the first update all runs see the same loss
    firsts = [train_points(run.log.records)[1][0] for run in result.runs]
    assert firsts == pytest.approx([firsts[0]] * 3, abs=1e-6)
    assert len(lines) == 3
    assert "3 of 3" in lines[2]
    figure = result.draw()
    texts = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
    assert any("6e-3" in text for text in texts)


def test_equal_rates_are_within_noise_with_one_model_for_all(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainers: list[Any] = []

    def make(learning_rate: float, max_steps: int, output_dir: str) -> Any:
        from colab_qlora import SFTConfig, SFTTrainer

        if not trainers:
            trainers.append(make_trainer(tmp_path / "first", eval_rows=EVAL_ROWS))
        first = trainers[0]
        return SFTTrainer(
            model=first.model,
            processing_class=first.processing_class,
            args=SFTConfig(
                output_dir,
                learning_rate=learning_rate,
                max_steps=max_steps,
                per_device_train_batch_size=2,
                seed=5,
            ),
            train_dataset=ROWS,
            eval_dataset=EVAL_ROWS,
        )

    result = learning_rate_sweep(make, GOOD, factors=(1, 1, 1), steps=8, output_dir=tmp_path / "s")
    # every run began at the start, and so may the next
    assert "earlier run" not in capsys.readouterr().out
    assert trainers[0].model.colab_qlora_settings.trained_steps == 0
    assert result.outcome == "within noise"
    assert result.chosen == GOOD
    assert result.names() == ["6e-3", "6e-3 (2)", "6e-3 (3)"]
    curves = [train_points(run.log.records)[1].tolist() for run in result.runs]
    # the start weights were put back: all three runs are one run
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert curves[2] == pytest.approx(curves[0], abs=1e-6)
    assert result.base.mean > result.runs[0].eval_loss
    # and the user's model is as it was
    assert row_losses(trainers[0]).mean == pytest.approx(result.base.mean, abs=1e-6)


def test_rates_that_are_all_too_low_point_upwards(
    maker: Callable[..., Any], tmp_path: Path
) -> None:
    result = learning_rate_sweep(maker(), GOOD / 1e4, steps=6, output_dir=tmp_path)
    assert result.outcome == "none learnt"
    assert result.chosen is not None
    assert result.chosen > result.runs[-1].learning_rate


def test_a_rate_that_breaks_is_a_result(maker: Callable[..., Any], tmp_path: Path) -> None:
    # plain gradient descent without clipping: 1e30 overflows float32 in the second step
    make = maker(optim="sgd", max_grad_norm=0.0)
    result = learning_rate_sweep(make, 1.0, factors=(1, 1e30), steps=8, output_dir=tmp_path)
    sound, broken = result.runs
    assert broken.is_broken
    assert broken.broken_step is not None
    assert math.isnan(broken.eval_loss)
    # the run stopped there instead of training on
    assert max(record["step"] for record in broken.log.records) <= broken.broken_step + 1
    assert result.best is sound
    assert f"broke at step {broken.broken_step}" in result.table()
    result.draw()


def test_the_memory_of_a_trainer_is_freed_before_the_next(
    maker: Callable[..., Any], tmp_path: Path
) -> None:
    alive: list[weakref.ref] = []
    make = maker()

    def watched(learning_rate: float, max_steps: int, output_dir: str) -> Any:
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)
        trainer = make(learning_rate, max_steps, output_dir)
        alive.extend([weakref.ref(trainer), weakref.ref(trainer.model)])
        return trainer

    learning_rate_sweep(watched, GOOD, factors=(1, 2), steps=5, output_dir=tmp_path)
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 4}, "seed 4 instead of 3"),
        ({"rows": ROWS[:20]}, "train_rows 20 instead of 24"),
        ({"rows": [*ROWS[1:], ROWS[0]]}, "data_hash"),
        ({"eval_rows": EVAL_ROWS[:8]}, "eval_rows 8 instead of 12"),
        ({"lora": {"random_state": 9}}, "start weights"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 4 instead of 2"),
    ],
)
def test_trainers_that_differ_are_refused(
    maker: Callable[..., Any], tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    makers = iter([maker(), maker(**changed)])
    with pytest.raises(UserError, match="differ in more than the learning rate") as caught:
        learning_rate_sweep(
            lambda *asked: next(makers)(*asked), GOOD, factors=(1, 2), steps=5, output_dir=tmp_path
        )
    assert words in str(caught.value)


def test_a_maker_that_ignores_what_it_is_asked_for(
    maker: Callable[..., Any], tmp_path: Path
) -> None:
    make = maker()
    with pytest.raises(UserError, match="does not pass on learning_rate, max_steps"):
        learning_rate_sweep(lambda rate, steps, out: make(1e-3, 7, out), GOOD, output_dir=tmp_path)
    with pytest.raises(UserError, match="needs one eval_dataset"):
        learning_rate_sweep(maker(eval_rows=None), GOOD, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, "not all positive"),
        ({"factors": (1, math.nan)}, "not all positive"),
        ({"factors": (1,)}, "allowed: 2 to 6"),
        ({"factors": (1, 2, 3, 4, 5, 6, 7)}, "allowed: 2 to 6"),
        ({"steps": 4}, "allowed: 5 or more"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        learning_rate_sweep(lambda *asked: None, **{"learning_rate": GOOD, **options})


def test_early_stopping_is_off(maker: Callable[..., Any], tmp_path: Path) -> None:
    lines: list[str] = []
    make = maker(trainer={"early_stopping": True}, eval_strategy="steps", eval_steps=1)
    result = learning_rate_sweep(
        make, GOOD, factors=(1, 2), steps=6, output_dir=tmp_path, say=lines.append
    )
    assert [run.log.records[-1]["step"] for run in result.runs] == [6, 6]
    assert sum("early stopping is off" in line for line in lines) == 2


def test_the_header_of_a_log_is_json(maker: Callable[..., Any], tmp_path: Path) -> None:
    result = learning_rate_sweep(maker(), GOOD, factors=(1, 2), steps=5, output_dir=tmp_path)
    path = result.runs[0].log.path
    assert path is not None
    assert path.parent.parent == tmp_path
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["run"]["max_steps"] == 5
