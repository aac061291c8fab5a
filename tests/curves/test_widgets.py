"""The curve explorer without a browser: arguments, controls, and what it shows in a kernel."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipywidgets")

from colab_qlora.curves.draw import figure_bundle
from colab_qlora.curves.log import LossLog, read_log
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.curves.verdicts import Diagnosis, Verdict
from colab_qlora.curves.widgets import CurveExplorer, explore_curves
from colab_qlora.errors import UserError
from colab_qlora.samples import sample_path

# control -> (the value that a hand gives it, the argument that stands for it)
CONTROLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chosen: healthy": (True, {"chosen": ["healthy", "overfitting"]}),
    "smooth": (0.2, {"smooth": 0.2}),
    "y_range": ((1.0, 3.0), {"y_range": (1.0, 3.0)}),
    "stop_at": (20, {"stop_at": 20}),
    "generalisation_loss": (0.9, {"thresholds": {"generalisation_loss": 0.9}}),
    "unstable_rise": (1.5, {"thresholds": {"unstable_rise": 1.5}}),
    "spike_scatters": (20.0, {"thresholds": {"spike_scatters": 20.0}}),
    "dark": (True, {"dark": True}),
    "learning_rate": (True, {"learning_rate": True}),
}


def _png(explorer: CurveExplorer) -> str:
    return figure_bundle(explorer.figure(), "")["image/png"]


def _runs(count: int) -> dict[str, list[dict[str, Any]]]:
    return {
        f"run {n}": [{"step": s, "loss": 2.0 + n - 0.1 * s} for s in range(5)] for n in range(count)
    }


class Screen:
    """Stands in for a kernel's front end: keeps what was shown, by display id."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, str]] = {}
        self.widgets: list[Any] = []

    def display(self, content: Any, raw: bool = False, display_id: str = "") -> None:
        if raw:
            assert display_id not in self.outputs
            self.outputs[display_id] = content
        else:
            self.widgets.append(content)

    def update_display(self, content: dict[str, str], raw: bool, display_id: str) -> None:
        assert raw
        assert display_id in self.outputs
        self.outputs[display_id] = content

    def of_type(self, mime: str) -> str:
        (found,) = [output[mime] for output in self.outputs.values() if mime in output]
        return found


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A kernel that shows on a `Screen`."""
    import IPython.display

    found = Screen()
    monkeypatch.setattr(IPython.display, "display", found.display)
    monkeypatch.setattr(IPython.display, "update_display", found.update_display)
    monkeypatch.setattr("colab_qlora.curves.widgets.has_kernel", lambda: True)
    return found


# ---- arguments and controls


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_does_what_its_argument_does(name: str) -> None:
    value, arguments = CONTROLS[name]
    by_hand = explore_curves(chosen="overfitting")
    plain = (by_hand.view, by_hand.text(), _png(by_hand))
    by_hand.controls[name].value = value
    by_argument = explore_curves(**({"chosen": "overfitting"} | arguments))
    assert by_hand.view == by_argument.view
    assert by_hand.text() == by_argument.text()
    assert _png(by_hand) == _png(by_argument)
    assert by_hand.view != plain[0]
    # thresholds that the run is far from change nothing that is seen of it
    is_far = name in ("unstable_rise", "spike_scatters")
    assert ((by_hand.text(), _png(by_hand)) == plain[1:]) == is_far


@pytest.mark.parametrize("name", CONTROLS)
def test_an_argument_is_what_the_controls_start_with(name: str) -> None:
    value, arguments = CONTROLS[name]
    explorer = explore_curves(**({"chosen": "overfitting"} | arguments))
    assert explorer.controls[name].value == value
    before = explorer.view
    # a change of something else reads all of them
    explorer.controls["dark"].value = not before.dark
    assert {**vars(explorer.view), "dark": before.dark} == vars(before)


def test_sliders_redraw_only_when_they_are_let_go() -> None:
    for name, widget in explore_curves().controls.items():
        assert widget.description, name
        assert not getattr(widget, "continuous_update", False), name


def test_figure_and_text_need_no_widgets() -> None:
    code = (
        "import sys; sys.modules['ipywidgets'] = None; sys.modules['IPython'] = None\n"
        "from colab_qlora.curves.widgets import explore_curves\n"
        "found = explore_curves(chosen='overfitting', stop_at=20)\n"
        "found.figure(); print(found.text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "If you had stopped at step 20" in done.stdout


# ---- what if I had stopped here


def test_stopping_tells_the_eval_loss_of_then_and_the_best() -> None:
    evals = {
        record["step"]: record["eval_loss"]
        for record in read_log(sample_path("curves/overfitting.jsonl"))
        if "eval_loss" in record
    }
    best = min(evals, key=lambda step: evals[step])
    later = max(evals) - 1
    last = max(step for step in evals if step <= later)
    said = explore_curves(chosen="overfitting", stop_at=later).text()
    assert f"eval loss {evals[last]:.3f} (step {last})" in said
    assert f"{evals[last] - evals[best]:.3f} above the lowest, {evals[best]:.3f}" in said
    assert "had passed" in said
    said = explore_curves(chosen="overfitting", stop_at=best).text()
    assert f"eval loss {evals[best]:.3f} (step {best}), the lowest of the whole run" in said
    said = explore_curves(chosen="overfitting", stop_at=best - 1).text()
    assert "was still to come" in said


def test_stopping_reads_the_log_as_it_was_then() -> None:
    seen = []

    def diagnose(log: Any, *, thresholds: Thresholds, is_finished: bool) -> Diagnosis:
        steps = [record["step"] for record in log]
        seen.append((max(steps), is_finished, log.run.get("learning_rate")))
        verdict = Verdict("healthy", "good", "sure", None, f"{max(steps)} steps", "go on")
        return Diagnosis((verdict,), max(steps))

    explorer = explore_curves(chosen="overfitting", stop_at=20, diagnose=diagnose)
    assert "20 steps" in explorer.text()
    rate = read_log(sample_path("curves/overfitting.jsonl")).run["learning_rate"]
    assert seen == [(20, False, rate)]
    explorer.figure()
    explorer.controls["dark"].value = True
    explorer.figure()
    # the picture has the marks of the whole run, which is read once
    assert seen[1:] == [(56, True, rate)]


def test_stopping_before_the_first_record_says_so() -> None:
    explorer = explore_curves([{"step": 5, "loss": 2.0}, {"step": 6, "loss": 1.9}], stop_at=3)
    assert "Nothing had been logged by step 3" in explorer.text()


def test_stopping_at_the_end_is_the_whole_run() -> None:
    explorer = explore_curves(chosen="overfitting", stop_at=10_000)
    assert explorer.text() == explore_curves(chosen="overfitting").text()
    assert explorer.controls["stop_at"].value == explorer.controls["stop_at"].max == 56


# ---- sliders that follow the runs


def test_bounds_follow_the_chosen_runs() -> None:
    explorer = explore_curves(chosen="overfitting")
    stop, losses = explorer.controls["stop_at"], explorer.controls["y_range"]
    assert (stop.max, stop.value) == (56, 56)
    assert losses.min <= 0.01
    explorer.controls["chosen: healthy"].value = True
    explorer.controls["chosen: overfitting"].value = False
    assert explorer.view.chosen == ("healthy",)
    assert (stop.max, stop.value, explorer.view.stop_at) == (64, 64, None)
    assert losses.value == (losses.min, losses.max)
    assert losses.min > 1
    assert explorer.view.y_range is None


def test_what_was_set_is_kept_when_runs_change() -> None:
    explorer = explore_curves(chosen="overfitting", stop_at=30, y_range=(1.0, 3.0))
    explorer.controls["chosen: healthy"].value = True
    explorer.controls["chosen: overfitting"].value = False
    assert explorer.view.stop_at == 30
    assert explorer.view.y_range == (1.0, 3.0)
    assert explorer.controls["y_range"].value == (1.0, 3.0)


@pytest.mark.parametrize(
    "losses",
    [[2.0], [math.nan], [math.inf, math.nan, math.nan], [1.5, 1.5, 1.5], [1e-7, 2e-7], [1e6, 3e6]],
)
def test_odd_losses_give_controls_and_a_picture(losses: list[float]) -> None:
    explorer = explore_curves([{"step": step, "loss": loss} for step, loss in enumerate(losses)])
    slider = explorer.controls["y_range"]
    assert slider.min < slider.max
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert all(slider.min <= loss <= slider.max for loss in finite)
    assert explorer.view.y_range is None
    assert explorer.text()
    assert _png(explorer)


# ---- which runs


def test_the_users_own_run_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorded = {"healthy", "overfitting", "learning rate too high"}
    assert explore_curves().view.chosen == ("healthy",)
    with LossLog.open("work/loss_log.jsonl") as log:
        log.append({"step": 1, "loss": 2.0})
    explorer = explore_curves()
    assert explorer.view.chosen == ("your run",)
    names = {name[len("chosen: ") :] for name in explorer.controls if name.startswith("chosen")}
    assert names == recorded | {"your run"}


def test_runs_come_from_files_and_folders(tmp_path: Path) -> None:
    healthy = sample_path("curves/healthy.jsonl")
    assert explore_curves(healthy).view.chosen == ("healthy",)
    assert explore_curves(str(healthy)).text() == explore_curves(chosen="healthy").text()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss_log.jsonl").write_bytes(healthy.read_bytes())
    paths = [tmp_path / "first", tmp_path / "second" / "loss_log.jsonl"]
    assert explore_curves(paths).view.chosen == ("first", "second")
    assert explore_curves({"mine": paths[0], "log": read_log(healthy)}).view.chosen == (
        "mine",
        "log",
    )
    with pytest.raises(UserError, match="the same log twice"):
        explore_curves([paths[0], paths[0]])
    with pytest.raises(UserError, match="there is no such"):
        explore_curves(tmp_path / "nowhere.jsonl")


def test_several_runs_in_one_file_are_numbered(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 3.0 - 0.01 * s} for s in range(1, 31)]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in 2 * records))
    assert explore_curves(path).view.chosen == ("both 1", "both 2")


def test_of_many_runs_the_first_six_are_shown() -> None:
    explorer = explore_curves(_runs(8))
    assert len(explorer.view.chosen) == 6
    assert explorer.text().count("This run") == 6
    assert "run 5:\n" in explorer.text()
    assert explore_curves(_runs(8), chosen="run 7").view.chosen == ("run 7",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chosen": "nobody"}, "there is no such run: got 'nobody'; allowed: healthy"),
        ({"chosen": []}, "got 0; allowed: 1 to 6. Choose a run"),
        ({"smooth": 0.6}, "smooth is no share of the run: got 0.6; allowed: 0 to 0.5"),
        ({"smooth": math.nan}, "smooth is no share of the run: got nan"),
        ({"y_range": (3, 1)}, r"y_range is no range: got \(3.0, 1.0\)"),
        ({"stop_at": -1}, "stop_at is no step: got -1"),
        ({"thresholds": {"patience": 3}}, "there is no such threshold: got 'patience'"),
        ({"thresholds": {"leak_gap": -1}}, "leak_gap is not positive"),
        ({"runs": {}}, "there is no run to show"),
        ({"runs": _runs(7), "chosen": list(_runs(7))}, "got 7; allowed: 1 to 6. Choose fewer"),
        ({"runs": []}, "has no loss values"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explore_curves(**arguments)


# ---- in a kernel


def test_a_kernel_shows_controls_picture_and_words(screen: Screen) -> None:
    explorer = explore_curves(chosen="overfitting")
    explorer._ipython_display_()
    assert len(screen.widgets) == 1
    assert screen.of_type("image/png") == _png(explorer)
    assert "overfitting" in screen.of_type("text/html")
    # the picture has words of its own for who cannot see it
    texts = [output["text/plain"] for output in screen.outputs.values()]
    assert any(text.startswith("Train loss goes from") for text in texts)
    assert explorer.text() in texts


def test_a_change_replaces_picture_and_words(screen: Screen) -> None:
    explorer = explore_curves(chosen="overfitting")
    explorer._ipython_display_()
    before = (screen.of_type("image/png"), screen.of_type("text/html"))
    explorer.controls["stop_at"].value = 20
    after = (screen.of_type("image/png"), screen.of_type("text/html"))
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert len(screen.outputs) == 2
    assert after[0] == _png(explorer)


def test_no_run_keeps_the_picture_and_says_what_to_do(screen: Screen) -> None:
    explorer = explore_curves(chosen="overfitting")
    explorer._ipython_display_()
    before = (explorer.view, screen.of_type("image/png"))
    explorer.controls["chosen: overfitting"].value = False
    assert "Choose a run" in screen.of_type("text/html")
    assert (explorer.view, screen.of_type("image/png")) == before
    explorer.controls["chosen: healthy"].value = True
    assert explorer.view.chosen == ("healthy",)
    assert "Choose a run" not in screen.of_type("text/html")


def test_changes_in_two_threads_end_with_what_is_set(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer = explore_curves(chosen=["overfitting", "healthy"])
    explorer._ipython_display_()
    others = []

    def untick_the_last() -> None:
        explorer.controls["chosen: healthy"].value = False

    def update_display(content: dict[str, str], raw: bool, display_id: str) -> None:
        screen.update_display(content, raw, display_id)
        if not others:  # while the first change is being shown
            others.append(threading.Thread(target=untick_the_last))
            others[0].start()
            others[0].join(0.5)

    monkeypatch.setattr("IPython.display.update_display", update_display)
    explorer.controls["chosen: overfitting"].value = False
    others[0].join()
    assert "Choose a run" in screen.of_type("text/html")


def test_thresholds_open_by_a_checkbox(screen: Screen) -> None:
    explorer = explore_curves()
    explorer._ipython_display_()
    switches, fields = screen.widgets[0].children[-2:]
    fold = switches.children[-1]
    assert explorer.controls["spike_scatters"] in fields.children
    assert fields.layout.display == "none"
    fold.value = True
    assert fields.layout.display == "flex"
    fold.value = False
    assert fields.layout.display == "none"


def test_names_are_no_html(screen: Screen) -> None:
    runs = {"<b>a</b>": _runs(1)["run 0"], "b & c": _runs(1)["run 0"]}
    explore_curves(runs)._ipython_display_()
    words = screen.of_type("text/html")
    assert "&lt;b&gt;a&lt;/b&gt;" in words
    assert "b &amp; c" in words


def test_outside_a_kernel_the_words_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    explorer = explore_curves(chosen="healthy")
    explorer._ipython_display_()
    assert capsys.readouterr().out == explorer.text() + "\n"
