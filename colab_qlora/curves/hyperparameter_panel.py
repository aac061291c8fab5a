"""A panel for the hyperparameters of a run: what is moved is written into the user's dictionary.

The dictionary stays the truth. The panel offers widgets for what is in it, writes each change into
it at once, and says below what the plan makes of all values.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

from colab_qlora.curves.controls.widget_parts import (
    DisplaySlot,
    control_style,
    folded,
    row,
    tooltip,
    words_bundle,
)
from colab_qlora.curves.live_display import has_kernel
from colab_qlora.errors import UserError

__all__ = ["PANEL_SETTINGS", "HyperparameterPanel", "Plan", "hyperparameter_panel"]

# what the panel has a widget for, in the order in which they are shown
PANEL_SETTINGS = (
    "learning_rate",
    "warmup_share",
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "max_seq_length",
    "r",
    "lora_alpha",
)
# room for the longest name
_DESCRIPTION_PX = 205
_RANKS = (4, 8, 16, 32, 64, 128, 256)
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
# lowest value, highest value, step
_COUNTS = {
    "num_train_epochs": (1, 100, 1),
    "max_steps": (-1, 1_000_000, 1),
    "batch_size": (1, 1024, 1),
    "gradient_accumulation_steps": (1, 1024, 1),
    "lora_alpha": (1, 1024, 1),
}


# an epoch may be broken off in the middle
_WHOLE = tuple({*_COUNTS, "r", "max_seq_length"} - {"num_train_epochs", "lora_alpha"})
_SHARES = ("warmup_share", "learning_rate")


class Plan(Protocol):
    """What a plan has to offer."""

    def sentence(self) -> str:
        """Memory, seconds per step, whole time and whether it fits, without a full stop."""


MakePlan = Callable[[Mapping[str, Any]], Plan]


def hyperparameter_panel(
    parameters: MutableMapping[str, Any],
    *,
    plan: MakePlan | None = None,
    hints: Mapping[str, str] | None = None,
) -> HyperparameterPanel:
    """Offers a widget for each hyperparameter of a dictionary, and writes what is set into it.

    Args:
        parameters: the settings, changed in place; `globals()` is the parameter cell of a notebook.
            Of its names those in `PANEL_SETTINGS` are used, and no name is added.
        plan: what to say about the settings, from all of `parameters`; a UserError that it raises
            is said too. `colab_qlora.teaching.plan_for_panel` makes one.
        hints: setting -> which way to move it.

    Returns:
        The panel; as the last line of a cell it shows its widgets. `.text()` is what it says.

    Raises:
        UserError: there is none of the settings, or one has a value that it cannot have.

    Example:
        >>> settings = {"learning_rate": 2e-4, "batch_size": 2}
        >>> hyperparameter_panel(settings, plan=plan_for_panel("llama-3-8b", gpu="T4"))
    """
    names = [name for name in PANEL_SETTINGS if name in parameters]
    if not names:
        raise UserError(
            "there is no hyperparameter to set",
            got=", ".join(map(str, parameters)) or "nothing",
            allowed=f"a dict with some of {', '.join(PANEL_SETTINGS)}",
        )
    for name in names:
        _check(name, parameters[name])
    return HyperparameterPanel(parameters, names, plan, dict(hints or {}))


class HyperparameterPanel:
    """Widgets over a dictionary; made by `hyperparameter_panel`.

    Attributes:
        parameters: the dictionary, always up to date.
        names: the settings that have a widget.
    """

    def __init__(
        self,
        parameters: MutableMapping[str, Any],
        names: list[str],
        plan: MakePlan | None,
        hints: Mapping[str, str],
    ) -> None:
        self.parameters, self.names = parameters, names
        self._plan, self._hints = plan, hints
        self._by_name: dict[str, Any] = {}
        self._words = DisplaySlot()
        self._lock = threading.Lock()

    @property
    def controls(self) -> Mapping[str, Any]:
        """The widgets by the name of what they set; setting a `value` acts like a hand."""
        if not self._by_name:
            for name in self.names:
                widget = _widget(name, self.parameters[name], self._hints.get(name, ""))
                widget.observe(lambda change, name=name: self._take(name), "value")
                self._by_name[name] = widget
        return self._by_name

    def text(self) -> str:
        """The settings in one line, and what the plan says about them."""
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)}); see .parameters, .text()"

    def _ipython_display_(self) -> None:
        if not has_kernel():
            print(self.text())
            return
        from IPython.display import display
        from ipywidgets import Layout, VBox

        parts = [row(self.controls.values())]
        if known := {name: self._hints[name] for name in self.names if name in self._hints}:
            parts += folded("show which way to move them", _hint_table(known))
        display(VBox(parts, layout=Layout(width="auto", max_width="800px")))
        self._words.show(words_bundle({"": self._lines()}))

    def _take(self, name: str) -> None:
        # JupyterLab has ipykernel 7 take changes of widgets in other threads, several at a time;
        # the value of now is the last one, whichever change this is
        with self._lock:
            self.parameters[name] = _plain(name, self._by_name[name].value)
            self._words.update(words_bundle({"": self._lines()}))

    def _lines(self) -> list[str]:
        # numbers as Python writes them, so that they can be copied into the parameter cell
        settings = ", ".join(f"{name}={self.parameters[name]!r}" for name in self.names)
        if self._plan is None:
            return [settings]
        try:
            said = f"{self._plan(self.parameters).sentence()}."
        except UserError as error:
            said = str(error)
        return [settings, said]


def _check(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    low: float = _COUNTS.get(name, (0, 0, 0))[0]
    if name == "num_train_epochs":
        low = 0
    is_allowed = is_number and math.isfinite(value) and value >= low
    is_zero_allowed = name in ("max_steps", "warmup_share")
    if not is_allowed or (value == 0 and not is_zero_allowed):
        least = f"a number from {low} up" if is_zero_allowed else "a number above 0"
        raise UserError(f"{name} cannot be set so", got=repr(value), allowed=least)
    if name in _WHOLE and value != int(value):
        raise UserError(f"{name} cannot be set so", got=repr(value), allowed="a whole number")
    if name in _SHARES and value > 1:
        raise UserError(f"{name} cannot be set so", got=repr(value), allowed="at most 1")


def _plain(name: str, value: Any) -> Any:
    # a logarithmic slider gives 0.000199526 where it shows 2.00e-4
    return float(f"{value:.3g}") if name in ("learning_rate", "warmup_share") else value


def _widget(name: str, value: Any, hint: str) -> Any:
    import ipywidgets

    common: dict[str, Any] = {"description": name, "continuous_update": False}
    common |= control_style(name in _COUNTS, _DESCRIPTION_PX)
    common |= tooltip(hint) if hint else {}
    if name == "learning_rate":
        low, high = min(-6.0, math.log10(value)), max(-1.0, math.log10(value))
        return ipywidgets.FloatLogSlider(
            value=value, base=10, min=low, max=high, step=0.1, readout_format=".2e", **common
        )
    if name == "warmup_share":
        return ipywidgets.FloatSlider(value=value, min=0, max=max(0.5, value), step=0.01, **common)
    if name in ("r", "max_seq_length"):
        usual = _RANKS if name == "r" else _LENGTHS
        options = sorted({*usual, value})
        return ipywidgets.SelectionSlider(options=options, value=value, **common)
    low, high, step = _COUNTS[name]
    bounds = {"min": min(low, value), "max": max(high, value), "value": value}
    if isinstance(value, float):
        return ipywidgets.BoundedFloatText(**bounds | {"min": 0.01}, step=0.1, **common)
    return ipywidgets.BoundedIntText(**bounds, step=step, **common)


def _hint_table(hints: Mapping[str, str]) -> Any:
    from ipywidgets import HTML

    return HTML(words_bundle({name: [text] for name, text in hints.items()})["text/html"])
