"""The plot in a training: what it shows, what ends it, and which readers a trainer has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from live_helpers import fail_at, with_verdict  # noqa: E402
from trainer_helpers import ROWS, losses_of  # noqa: E402

from colab_qlora import UserError, read_log  # noqa: E402
from colab_qlora.training.callbacks import LossLogCallback  # noqa: E402
from colab_qlora.training.early_stopping import EarlyStopping  # noqa: E402
from colab_qlora.training.live_callbacks import LossPlot, readers_for  # noqa: E402
from colab_qlora.training.log_reader import LogReader  # noqa: E402
from colab_qlora.training.non_finite import StopOnNonFinite  # noqa: E402

Make = Callable[..., Any]


class Screen:
    """Stands in for IPython's display."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.seen: list[str] = []

    def __call__(self, bundle: dict[str, str], **options: Any) -> Any:
        self.outputs.append({})
        screen, index = self, len(self.outputs) - 1

        class Handle:
            def update(self, bundle: dict[str, str], **options: Any) -> None:
                screen.outputs[index] = bundle
                screen.seen.append(bundle["text/plain"])

        Handle().update(bundle)
        return Handle()


def plot_on(screen: Screen, name: str = "healthy") -> LossPlot:
    return LossPlot(display=screen, every_seconds=0, diagnose=with_verdict(name))


@pytest.mark.model
def test_the_plot_follows_a_training(
    make_trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen()
    trainer = make_trainer(
        eval_rows=ROWS[:4],
        eval_strategy="steps",
        eval_steps=2,
        trainer={"live_plot": plot_on(screen)},
    )
    trainer.train()
    statuses = [text for text in screen.seen if text.startswith("step ")]
    # the evaluation before the first step, both others, and the end
    assert {f"step {n} of 4" for n in (0, 2, 4)} <= {text.split(" | ")[0] for text in statuses}
    last = statuses[-1].splitlines()
    assert f"train loss {losses_of(trainer)[-1]:.4f}" in last[0]
    assert "tokens/s" in last[0] and "peak memory" in last[0] and "left" not in last[0]
    assert last[1] == "This run: healthy (likely)."
    assert len(screen.outputs) == 2
    capsys.readouterr()
    # an evaluation afterwards is a line and changes neither the plot nor the log
    shown = list(screen.seen)
    loss = trainer.evaluate()["eval_loss"]
    assert f"step 4/4 | eval loss {loss:.4f}\n" in capsys.readouterr().out
    assert screen.seen == shown
    # 4 steps, 3 evaluations and the end
    assert len(trainer._loss_log.log) == 8


@pytest.mark.model
def test_drawing_that_fails_does_not_change_the_training(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    capsys.readouterr()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no ink")

    monkeypatch.setattr("colab_qlora.curves.draw.draw_curves", broken)
    trainer = make_trainer(tmp_path / "drawn", trainer={"live_plot": plot_on(Screen())})
    trainer.train()
    assert losses_of(trainer) == losses_of(plain)
    printed = capsys.readouterr().out
    assert printed.count("no ink") == 1
    assert "step 4/4 | loss " in printed


@pytest.mark.model
def test_an_interrupt_leaves_the_last_state(make_trainer: Make, tmp_path: Path) -> None:
    screen = Screen()
    stopping = EarlyStopping(diagnose=with_verdict("healthy"))
    trainer = make_trainer(
        eval_rows=ROWS[:4],
        eval_strategy="steps",
        eval_steps=1,
        trainer={"live_plot": plot_on(screen), "early_stopping": stopping},
    )
    fail_at(trainer, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    out = tmp_path / "out"
    losses = {
        r["step"]: r["eval_loss"] for r in read_log(out / "loss_log.jsonl") if "eval_loss" in r
    }
    assert list(losses) == [0, 1, 2, 3]
    # the last picture has the end marked
    assert "1 event: step 3 interrupted." in screen.seen[-2]
    status, *verdict = screen.outputs[1]["text/plain"].splitlines()
    assert status.startswith("interrupted | step 3 of 4 | ")
    assert verdict[0] == "This run: healthy (likely)."
    del losses[0]
    best = min(losses, key=losses.__getitem__)
    assert trainer.notes[-1] == (
        f"interrupted; step 3 is saved in {out}/checkpoint-3; the best adapter, of step {best} "
        f"(eval loss {losses[best]:.4f}), is in {out}/best_adapter"
    )
    assert (out / "best_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.model
def test_an_interrupt_inside_the_drawing_saves_the_step(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(trainer={"live_plot": plot_on(Screen())})
    from colab_qlora.curves import draw

    stock = draw.draw_curves

    def interrupted(records: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2 and len(records) == 2 and trainer.is_in_train:
            monkeypatch.setattr(draw, "draw_curves", stock)
            raise KeyboardInterrupt
        return stock(records, **options)

    monkeypatch.setattr(draw, "draw_curves", interrupted)
    # every record is drawn, whatever it costs
    monkeypatch.setattr("colab_qlora.curves.live._LEAST_SECONDS_BETWEEN", 0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    log = read_log(tmp_path / "out" / "loss_log.jsonl")
    assert len([r for r in log if "loss" in r]) == 2


@pytest.mark.model
def test_a_resumed_run_shows_the_earlier_part(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(save_strategy="steps", save_steps=2, max_steps=4).train()
    trainer = make_trainer(max_steps=6, trainer={"live_plot": plot_on(screen := Screen())})
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-4"))
    assert screen.outputs[0]["text/plain"].startswith("Train loss goes from ")
    assert "over steps 1 to 6" in screen.outputs[0]["text/plain"]


@pytest.mark.model
def test_lines_end_with_the_verdict(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    plot = LossPlot(line_every_steps=3, diagnose=with_verdict("plateau"))
    make_trainer(max_steps=7, trainer={"live_plot": plot}).train()
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split(" | ")[0] for line in lines if " | loss " in line]
    assert steps == ["step 3/7", "step 6/7", "step 7/7"]
    assert lines[-3:] == ["This run: levelled off (likely).", "Because of a test.", "Next: go on."]


@pytest.mark.model
def test_callbacks_that_the_user_passed_are_the_only_ones_of_their_kind(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colab_qlora.curves.live._LEAST_SECONDS_BETWEEN", 0)
    screen = Screen()
    plot = plot_on(screen)
    trainer = make_trainer(max_steps=2, trainer={"callbacks": [plot], "stop_on_non_finite": False})
    assert trainer._readers() == [plot]
    trainer.train()
    # each record is written before the plot reads it; the third is the end's
    assert [text[:11] for text in screen.seen if text.startswith("step")] == [
        "step 1 of 2",
        "step 2 of 2",
        "step 2 of 2",
    ]
    assert trainer._readers() == [plot]


def test_readers_of_a_trainer() -> None:
    assert [type(r) for r in readers_for([], None, False, True)] == [StopOnNonFinite, LossPlot]
    stop, early, plot = readers_for([], False, True, True)
    assert (type(stop), type(early), type(plot)) == (StopOnNonFinite, EarlyStopping, LossPlot)
    assert stop.early_stopping is early
    mine = EarlyStopping(confidence="sure")
    assert readers_for([], True, mine, False)[0] is mine
    assert [type(r) for r in readers_for([mine], None, True, True)] == [StopOnNonFinite, LossPlot]
    assert readers_for([mine], None, False, True)[0].early_stopping is mine


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("yes", False), "live_plot is not understood: got 'yes'; allowed: True, False, None"),
        ((None, 3), "early_stopping is not understood: got 3; allowed: True, False or EarlyStop"),
    ],
)
def test_values_of_another_type(values: tuple[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        readers_for([], *values, True)


def test_numbers_out_of_range_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="the live plot is too narrow"):
        LossPlot(width_px=100)


def test_a_reader_without_a_log_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"LossPlot has no loss log to read\. Pass it to"):
        LossPlot().on_train_begin(None, None, None)
    with pytest.raises(UserError, match="EarlyStopping has no loss log to read"):
        EarlyStopping().attach(LossLogCallback()).on_train_begin(None, None, None)


def test_a_diagnosis_that_fails_is_said_once(tmp_path: Path) -> None:
    def broken(log: Any, **options: Any) -> Any:
        raise RuntimeError("two\nlines")

    source = LossLogCallback()
    state = type("State", (), {"global_step": 0})()
    source.on_train_begin(type("Args", (), {"output_dir": str(tmp_path)})(), state, None)
    notes: list[str] = []
    reader = LogReader(diagnose=broken).attach(source, notes.append)
    assert reader.diagnosis() is None
    assert reader.diagnosis() is None
    assert notes == ["LogReader could not read the loss log (RuntimeError: two lines)"]
    source.close()
