"""The hyperparameter panel without a browser: the dictionary, the plan, the mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("ipywidgets")

from colab_qlora.curves.hyperparameter_panel import PANEL_SETTINGS, hyperparameter_panel
from colab_qlora.errors import UserError

SETTINGS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "warmup_share": 0.05,
    "num_train_epochs": 2,
    "max_steps": -1,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_seq_length": 1024,
    "r": 16,
    "lora_alpha": 32,
}


@dataclass
class RowsPlan:
    """A plan that tells the rows of a step, and refuses more than 100."""

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.rows > 100:
            raise UserError("too many rows", got=self.rows, allowed="100")

    @property
    def rows(self) -> int:
        return int(self.settings["batch_size"] * self.settings["gradient_accumulation_steps"])

    def sentence(self) -> str:
        return f"{self.rows} rows a step"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-3),
        ("warmup_share", 0.1),
        ("num_train_epochs", 3),
        ("max_steps", 60),
        ("batch_size", 1),
        ("gradient_accumulation_steps", 8),
        ("max_seq_length", 2048),
        ("r", 64),
        ("lora_alpha", 16),
    ],
)
def test_a_change_is_in_the_dictionary_at_once(name: str, value: Any) -> None:
    settings = {**SETTINGS, "seed": 42}
    panel = hyperparameter_panel(settings)
    assert panel.controls[name].value == SETTINGS[name]
    panel.controls[name].value = value
    assert settings == {**SETTINGS, "seed": 42, name: value}
    assert type(settings[name]) is type(SETTINGS[name])
    assert f"{name}={value!r}" in panel.text()


def test_all_settings_have_a_control_in_order() -> None:
    panel = hyperparameter_panel(dict(SETTINGS))
    assert tuple(panel.controls) == PANEL_SETTINGS
    assert set(SETTINGS) == set(PANEL_SETTINGS)
    for name, widget in panel.controls.items():
        assert (widget.description, widget.continuous_update) == (name, False)


def test_making_a_panel_changes_nothing() -> None:
    # none of them is on a slider's usual marks
    settings = {
        "learning_rate": 0.317,
        "warmup_share": 0.777,
        "num_train_epochs": 250,
        "max_steps": 0,
        "batch_size": 3000,
        "r": 10,
        "max_seq_length": 777,
        "lora_alpha": 2.5,
    }
    before = dict(settings)
    panel = hyperparameter_panel(settings)
    assert {name: widget.value for name, widget in panel.controls.items()} == before
    assert settings == before


def test_a_slider_position_becomes_a_round_learning_rate() -> None:
    settings = dict(SETTINGS)
    panel = hyperparameter_panel(settings)
    # what the browser sends for the next mark of the logarithmic slider
    panel.controls["learning_rate"].value = 10**-3.6
    assert settings["learning_rate"] == 0.000251


def test_only_what_is_there_is_offered() -> None:
    settings = {"batch_size": 2, "seed": 1}
    panel = hyperparameter_panel(settings, hints={"r": "higher"})
    assert list(panel.controls) == ["batch_size"]
    panel.controls["batch_size"].value = 3
    assert settings == {"batch_size": 3, "seed": 1}


def test_the_plan_follows_every_change() -> None:
    settings = dict(SETTINGS)
    panel = hyperparameter_panel(settings, plan=RowsPlan)
    assert panel.text().splitlines()[-1] == "8 rows a step."
    panel.controls["batch_size"].value = 16
    assert panel.text().splitlines()[-1] == "32 rows a step."
    settings["batch_size"] = 1
    assert panel.text().splitlines()[-1] == "2 rows a step."


def test_what_the_plan_refuses_is_said() -> None:
    panel = hyperparameter_panel(dict(SETTINGS), plan=RowsPlan)
    panel.controls["batch_size"].value = 500
    assert panel.text().splitlines()[-1] == "too many rows: got 1000; allowed: 100."


def test_in_a_kernel_words_follow_the_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[Any] = []
    updates: list[tuple[str, str]] = []
    ids: list[str] = []

    def display(content: Any, raw: bool = False, display_id: str = "") -> None:
        shown.append(content)
        ids.append(display_id)

    def update_display(content: dict[str, str], raw: bool, display_id: str) -> None:
        updates.append((display_id, content["text/plain"]))

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython.display, "update_display", update_display)
    monkeypatch.setattr("colab_qlora.curves.hyperparameter_panel.has_kernel", lambda: True)
    hints = {"r": "raise it <when> weak"}
    panel = hyperparameter_panel(dict(SETTINGS), plan=RowsPlan, hints=hints)
    panel._ipython_display_()
    box, words = shown
    assert words["text/plain"] == panel.text()
    fold, table = box.children[-2:]
    assert "raise it &lt;when&gt; weak" in table.value
    assert table.layout.display == "none"
    fold.value = True
    assert table.layout.display != "none"
    panel.controls["batch_size"].value = 5
    assert updates == [(ids[1], panel.text())]


def test_outside_a_kernel_the_words_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    panel = hyperparameter_panel(dict(SETTINGS), plan=RowsPlan)
    panel._ipython_display_()
    assert capsys.readouterr().out == panel.text() + "\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "there is no hyperparameter to set: got seed; allowed: a dict with some of"),
        ({}, "there is no hyperparameter to set: got nothing"),
        ({"learning_rate": 0}, "learning_rate cannot be set so: got 0; allowed: a number above 0"),
        ({"learning_rate": "2e-4"}, "learning_rate cannot be set so: got '2e-4'"),
        ({"learning_rate": float("nan")}, "learning_rate cannot be set so: got nan"),
        ({"batch_size": True}, "batch_size cannot be set so: got True"),
        ({"r": -1}, "r cannot be set so: got -1"),
        ({"max_steps": -2}, "max_steps cannot be set so: got -2; allowed: a number from -1 up"),
        ({"warmup_share": None}, "warmup_share cannot be set so: got None"),
    ],
)
def test_mistakes_are_said_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hyperparameter_panel(settings)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("r", 16.5, "a whole number"),
        ("batch_size", 2.5, "a whole number"),
        ("warmup_share", 3, "at most 1"),
        ("learning_rate", 2, "at most 1"),
        ("max_seq_length", math.inf, "a number above 0"),
    ],
)
def test_values_that_no_run_can_have_are_refused(name, value, allowed):
    with pytest.raises(UserError, match=f"{name} cannot be set so: got .*; allowed: {allowed}"):
        hyperparameter_panel({name: value})
