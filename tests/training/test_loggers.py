"""`report_to` reaches the loggers: TensorBoard's files hold the losses of the loss log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import losses_of  # noqa: E402

from colab_qlora import SFTConfig  # noqa: E402
from colab_qlora.training.arguments import rebuild  # noqa: E402

pytestmark = pytest.mark.model


@pytest.mark.parametrize("given", [None, "tensorboard logs"])
def test_tensorboard_gets_the_losses(
    make_trainer: Callable[..., Any], tmp_path: Path, given: str | None
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {} if given is None else {"logging_dir": str(tmp_path / given)}
    trainer = make_trainer(report_to="tensorboard", max_steps=3, **options)
    trainer.train()
    root = tmp_path / "out" if given is None else tmp_path / given
    (events,) = root.rglob("events.out.tfevents.*")
    if given is not None:
        assert events.parent == root
        assert not list((tmp_path / "out").rglob("events.*"))
    found = EventAccumulator(str(events.parent)).Reload()
    scalars = found.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    assert [scalar.value for scalar in scalars] == pytest.approx(losses_of(trainer), rel=1e-6)


def test_no_logger_unless_asked_for(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    make_trainer(max_steps=1).train()
    assert not list((tmp_path / "out").rglob("events.*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_names_pass_through(tmp_path: Path, name: str) -> None:
    config = SFTConfig(str(tmp_path), report_to=name, run_name="a run")
    assert rebuild(config).report_to == [name]
    assert rebuild(config).run_name == "a run"
