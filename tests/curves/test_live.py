"""The live plot: where it draws, how often, what it says, and that it never breaks a training."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colab_qlora.curves import live_display
from colab_qlora.curves.diagnose import diagnose
from colab_qlora.curves.live import LivePlot
from colab_qlora.curves.log import LossLog, read_log
from colab_qlora.curves.verdicts import Diagnosis, Verdict
from colab_qlora.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
VERDICT = Verdict(
    *("overfitting", "fault", "likely", 8),
    "the eval loss is 5 % < before & rises",
    "use the adapter of step 4",
)
LINES = Diagnosis((VERDICT,), 8).text().splitlines()


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """Stands in for IPython's display: keeps what is on the screen, and when it was drawn."""

    def __init__(self, clock: Clock | None = None, cost_seconds: float = 0.0) -> None:
        self.clock, self.cost_seconds = clock or Clock(), cost_seconds
        self.outputs: list[dict[str, str]] = []
        self.drawn_at: list[float] = []

    def __call__(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw and display_id is True
        self.outputs.append(bundle)
        self._count(bundle)
        screen, index = self, len(self.outputs) - 1

        class Handle:
            def update(self, bundle: dict[str, str], *, raw: bool) -> None:
                assert raw
                screen.outputs[index] = bundle
                screen._count(bundle)

        return Handle()

    def _count(self, bundle: dict[str, str]) -> None:
        if "image/png" in bundle:
            self.drawn_at.append(self.clock.now)
            self.clock.now += self.cost_seconds


def reading(log: Any, *, is_finished: bool) -> Diagnosis:
    """A diagnosis with fixed words."""
    return Diagnosis((VERDICT,), 8)


def train(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "seconds": float(step), "tokens": 500 * step, **more}


@pytest.fixture
def cheap_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the drawing, of which only the (fake) cost matters, by nothing."""
    monkeypatch.setattr("colab_qlora.curves.draw.draw_curves", lambda records, **_: None)
    monkeypatch.setattr(
        "colab_qlora.curves.draw.figure_bundle", lambda fig, text: {"image/png": ""}
    )


def replay(live: LivePlot, records: list[dict[str, Any]], clock: Clock | None = None) -> LossLog:
    """Show records one by one, a step a second where there is a clock."""
    log = LossLog()
    live.begin(log)
    for record in records:
        if clock is not None:
            clock.now += 1.0
        log.records.append(record)
        live.update(log)
    return log


def test_the_picture_is_replaced_in_place_and_the_words_stand_under_it() -> None:
    clock = Clock()
    screen = Screen(clock)
    live = LivePlot(10, diagnose=reading, display=screen, clock=clock, every_seconds=0)
    records = [train(i, 3 - 0.1 * i, peak_memory_gib=5.25) for i in range(1, 9)]
    log = replay(live, [{"step": 0, "eval_loss": 3.1}, *records], clock)
    shown = screen.outputs[1]["text/plain"].splitlines()
    live.finish(log)
    picture, words = screen.outputs
    assert len(screen.drawn_at) == 10
    assert set(picture) == {"image/png", "text/plain"}
    assert picture["text/plain"].startswith("Train loss goes from 2.900 to 2.200")
    status = "peak memory 5.2 GiB | train loss 2.2000 | eval loss 3.1000 (step 0)"
    assert shown == [f"step 8 of 10 | 500 tokens/s | 2 s left | {status}", *LINES]
    # the run is over, and nothing is left
    assert words["text/plain"].splitlines() == [
        f"step 8 of 10 | 500 tokens/s | {status}",
        *LINES,
    ]
    assert "5 % &lt; before &amp; rises" in words["text/html"]
    assert len(re.findall("<p ", words["text/html"])) == 4


def test_what_the_whole_run_shows_is_said_at_the_end_only() -> None:
    asked = []

    def noted(log: Any, *, is_finished: bool) -> Diagnosis:
        asked.append(is_finished)
        return reading(log, is_finished=is_finished)

    clock = Clock()
    live = LivePlot(diagnose=noted, display=Screen(clock), clock=clock, every_seconds=0)
    log = replay(live, [train(1), train(2)], clock)
    live.finish(log)
    live.finish(log)
    live.update(log)
    assert asked == [False, False, True]


def test_an_interrupted_run_says_so() -> None:
    screen = Screen()
    live = LivePlot(9, diagnose=reading, display=screen)
    live.finish(replay(live, [train(1), train(2)]), is_interrupted=True)
    assert screen.outputs[1]["text/plain"].startswith("interrupted | step 2 of 9 | ")


@pytest.mark.parametrize("cost_seconds", [0.001, 0.1, 3.0])
def test_drawing_takes_two_percent_at_most(cheap_picture: None, cost_seconds: float) -> None:
    clock = Clock()
    screen = Screen(clock, cost_seconds)
    live = LivePlot(diagnose=reading, display=screen, clock=clock)
    began = clock.now
    replay(live, [train(i) for i in range(1, 2001)], clock)
    elapsed = clock.now - began
    # the first picture is drawn at once, before there is any time to take a share of
    assert live.drawing_seconds - cost_seconds <= 0.02 * elapsed
    assert live.redraws == len(screen.drawn_at)
    gaps = [b - a for a, b in zip(screen.drawn_at, screen.drawn_at[1:], strict=False)]
    assert min(gaps) >= 2.0
    # and it is drawn whenever it may be: a step is a second here
    assert max(gaps) <= max(2.0, 60 * cost_seconds) + cost_seconds + 1.0


def test_evaluations_are_drawn_at_once_and_paid_back(cheap_picture: None) -> None:
    clock = Clock()
    screen = Screen(clock, cost_seconds=1.0)
    live = LivePlot(diagnose=reading, display=screen, clock=clock)
    began = clock.now
    log = replay(live, [train(1)], clock)
    for step in (2, 3):
        clock.now += 1.0
        log.records.append({"step": step, "eval_loss": 2.0})
        live.update(log)
        assert live.redraws == step
    while live.redraws == 3:
        clock.now += 1.0
        log.records.append(train(len(log) + 1))
        live.update(log)
    # three redraws of a second each
    assert 150 <= clock.now - began <= 200


def test_evaluations_that_come_all_the_time_wait_too(cheap_picture: None) -> None:
    clock = Clock()
    screen = Screen(clock, cost_seconds=0.2)
    live = LivePlot(diagnose=reading, display=screen, clock=clock)
    began = clock.now
    records = [{"step": i // 2, "loss" if i % 2 else "eval_loss": 2.0} for i in range(2, 2002)]
    replay(live, records, clock)
    assert live.drawing_seconds <= 0.02 * (clock.now - began)
    # and yet none of the time that there is for them is left unused
    assert live.drawing_seconds >= 0.016 * (clock.now - began)


def test_an_error_while_drawing_is_said_once_and_lines_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    screen = Screen(clock)
    live = LivePlot(4, diagnose=reading, display=screen, clock=clock, every_seconds=0)
    log = replay(live, [train(1)], clock)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no\nink")

    monkeypatch.setattr("colab_qlora.curves.draw.draw_curves", broken)
    for step in (2, 3, 4):
        log.records.append(train(step))
        live.update(log)
    live.finish(log)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "colab_qlora: the live plot stopped, training goes on (RuntimeError: no ink)",
        "step 3/4 | loss 2.0000 | 1.0 s/step | 1 s left",
        "step 4/4 | loss 2.0000 | 1.0 s/step | 0 s left",
        *LINES,
    ]
    assert len(screen.drawn_at) == 1


def test_an_interrupt_while_drawing_reaches_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LivePlot(diagnose=reading, display=Screen())
    live.begin()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("colab_qlora.curves.draw.draw_curves", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.update(LossLog([train(1)]))


@pytest.mark.parametrize("is_plot", [True, False])
def test_a_broken_diagnosis_costs_the_verdict_alone(
    is_plot: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(log: Any, *, is_finished: bool) -> Diagnosis:
        raise ZeroDivisionError("of nothing")

    screen = Screen()
    live = LivePlot(
        2, diagnose=broken, display=screen if is_plot else None, plot=is_plot, every_seconds=0
    )
    live.finish(replay(live, [train(1), train(2)]))
    printed = capsys.readouterr().out
    assert printed.count("without a verdict (ZeroDivisionError: of nothing)") == 1
    if is_plot:
        assert screen.outputs[1]["text/plain"] == ("step 2 of 2 | 500 tokens/s | train loss 2.0000")
    else:
        assert "step 2/2 | loss 2.0000" in printed


def _line_mode(**options: Any) -> LivePlot:
    return LivePlot(12, diagnose=reading, plot=False, **options)


def test_lines_come_every_two_seconds_and_for_evaluations_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    live = _line_mode(clock=clock)
    log = LossLog()
    live.begin(log)
    for step in range(1, 8):
        clock.now += 0.7
        log.records.append(train(step, seconds=0.7 * step, peak_memory_gib=5.31))
        live.update(log)
        if step == 3:
            log.records.append({"step": 3, "eval_loss": 1.9, "seconds": 2.1})
            live.update(log)
    live.finish(log)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/12 | loss 2.0000 | 0.7 s/step | 8 s left | peak 5.3 GiB",
        "step 3/12 | eval loss 1.9000",
        "step 4/12 | loss 2.0000 | 0.7 s/step | 6 s left | peak 5.3 GiB",
        "step 7/12 | loss 2.0000 | 0.7 s/step | 4 s left | peak 5.3 GiB",
        *LINES,
    ]


def test_a_line_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    live = _line_mode(line_every_steps=5)
    live.finish(replay(live, [train(step) for step in range(1, 13)]))
    printed = capsys.readouterr().out
    assert re.findall(r"step (\d+)/12 \| loss", printed) == ["5", "10", "12"]
    assert printed.endswith("\n".join(LINES) + "\n")


def test_the_pace_is_that_of_the_last_records_of_this_session(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # an earlier session took 1,000 s for 100 steps; the first step of this one compiles for 60 s
    earlier = [train(s, seconds=10.0 * s, tokens=10 * s) for s in range(1, 101)]
    now = [train(100 + i, seconds=1060.0 + 0.5 * i, tokens=1000 + 70 * i) for i in range(1, 101)]
    log = LossLog([*earlier, now[0]])
    live = LivePlot(300, plot=False, diagnose=reading, every_seconds=0)
    live.begin(LossLog(earlier))
    live.update(log)
    log.records += now[1:]
    live.update(log)
    printed = capsys.readouterr().out
    assert "step 101/300 | loss 2.0000 | 60.5 s/step | 200.7 min left" in printed
    assert "step 200/300 | loss 2.0000 | 0.5 s/step | 50 s left" in printed
    screen = Screen()
    live = LivePlot(300, diagnose=reading, display=screen)
    live.begin(LossLog(earlier))
    live.update(log)
    assert "step 200 of 300 | 140 tokens/s | 50 s left" in screen.outputs[1]["text/plain"]


def test_a_resumed_run_shows_its_earlier_part(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(records: Any, **options: Any) -> Any:
        from matplotlib.figure import Figure

        drawn.append(len(list(records)))
        return Figure()

    monkeypatch.setattr("colab_qlora.curves.draw.draw_curves", draw)
    log = LossLog([train(step) for step in range(1, 31)])
    live = LivePlot(diagnose=reading, display=Screen())
    live.begin(log)
    drawn.clear()  # what begin draws is nobody's picture
    log.records.append(train(31))
    live.update(log)
    assert drawn == [31]


def test_values_that_are_not_finite_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    records = [train(1), train(2, nan, grad_norm=nan), {"step": 2, "eval_loss": nan}]
    screen = Screen()
    live = LivePlot(diagnose=reading, display=screen, every_seconds=0)
    live.finish(replay(live, records))
    assert "train loss nan | eval loss nan" in screen.outputs[1]["text/plain"]
    live = LivePlot(diagnose=reading, plot=False, every_seconds=0)
    replay(live, records)
    assert "step 2 | loss nan" in capsys.readouterr().out


def test_nothing_logged_is_nothing_shown(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for live in (LivePlot(diagnose=reading, display=screen), _line_mode()):
        live.begin()
        live.update([])
        live.finish([])
    assert screen.outputs == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has_plot", [True, False])
def test_a_run_that_logged_no_loss_says_what_to_do(
    has_plot: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen()
    live = LivePlot(4, display=screen) if has_plot else _line_mode()
    live.finish(replay(live, [{"run": {}, "step": 0}, {"step": 4, "train_runtime": 9.0}]))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "colab_qlora: no loss was logged, so there is no curve to read: lower logging_steps"
    ]


def test_a_plot_without_a_notebook_becomes_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live_display, "_shell", lambda: None)
    live = LivePlot(1, diagnose=reading, plot=True)
    live.finish(replay(live, [train(1)]))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("there is no notebook to draw in: lines of progress instead")
    assert printed[1].startswith("step 1/1 | loss 2.0000")


@pytest.mark.parametrize(
    ("has_kernel", "plot", "is_drawn"), [(True, None, True), (False, None, False)]
)
def test_a_kernel_decides(
    monkeypatch: pytest.MonkeyPatch, has_kernel: bool, plot: bool | None, is_drawn: bool
) -> None:
    shell = type("Shell", (), {"kernel": object()} if has_kernel else {})()
    monkeypatch.setattr(live_display, "_shell", lambda: shell)
    screen = Screen()
    monkeypatch.setattr("IPython.display.display", screen)
    live = LivePlot(1, diagnose=reading, plot=plot)
    live.finish(replay(live, [train(1)]))
    assert bool(screen.outputs) == is_drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_seconds": -1}, "every_seconds is negative: got -1"),
        ({"width_px": 300}, "the live plot is too narrow: got 300 px"),
        ({"line_every_steps": 0}, "line_every_steps is not a count: got 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LivePlot(**options)


def test_it_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, colab_qlora.curves.live as live; live.LivePlot(plot=False);"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


NOTEBOOK = """
from colab_qlora.curves.live import LivePlot
from colab_qlora.curves.log import LossLog, read_log

recorded = read_log("data_samples/curves/overfitting.jsonl").records
log = LossLog()
hour = 0  # steps of an hour each: on a clock of its own, every record may be drawn
live = LivePlot(recorded[-1]["step"], every_seconds=0, clock=lambda: 3600.0 * hour)
live.begin(log)
for hour, record in enumerate(recorded):
    log.records.append(record)
    live.update(log)
"""


@pytest.mark.notebook
def test_a_saved_notebook_has_one_image_and_the_words() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in (NOTEBOOK, "print(live.redraws)", "live.finish(log)")
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    # finished in another cell, the plot is still replaced where it was first shown
    log = read_log(ROOT / "data_samples" / "curves" / "overfitting.jsonl")
    assert int(cells[1].outputs[0].text) == len(log.records)
    assert cells[2].outputs == []
    picture, words = cells[0].outputs
    images = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    assert images == [picture]
    assert picture.data["text/plain"].startswith("Train loss goes from")
    said = diagnose(log).text().splitlines()
    assert words.data["text/plain"].splitlines()[1:] == said
    assert said[0].startswith("This run: overfitting since step ")
    assert all(html.escape(line) in words.data["text/html"] for line in said)
