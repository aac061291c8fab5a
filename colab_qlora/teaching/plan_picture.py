"""A memory plan as a picture: where the memory goes, and what each layer does with its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colab_qlora.activations.memory_plan import GIB, MemoryPlan
from colab_qlora.activations.report import WORDS, peak_parts, seconds_text
from colab_qlora.curves.picture.layout import DPI
from colab_qlora.teaching.figures import (
    INK,
    LINE_PX,
    MUTED,
    PAPER,
    blank_figure,
    fill_rectangle,
    line,
    put_text,
    put_title,
    shortened,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the Okabe-Ito palette, neighbours far apart in lightness
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#f0e442", "#009e73", "#cc79a7", "#5f6670", "#e69f00")
_WIDTH, _LEFT, _RIGHT = 800.0, 24.0, 776.0
_BAR_PX, _ROW_PX, _KEY_PX = 40.0, 26.0, 250.0
_NAMES_PX = 150.0
# letters whose names begin with a vowel: an H100, an NVIDIA H200, but a T4
_AN_BEFORE = "AEFHILMNORSX"
ACTIONS: dict[str, dict[str, Any]] = {
    "keep": {"facecolor": "#0072b2", "edgecolor": PAPER},
    "offload": {"facecolor": "#e69f00", "edgecolor": INK, "hatch": "////"},
    "recompute": {"facecolor": PAPER, "edgecolor": MUTED, "hatch": ".."},
}
SAID = {"keep": "stays on the GPU", "offload": "waits on the host", "recompute": "computed again"}
ROWS = ("input", "qkv", "attention", "h1", "gate_up")


def draw_plan(plan: MemoryPlan) -> Figure:
    """Draw a plan, 800 px wide: the peak's parts as a bar, then a square a layer and tensor.

    A misfit has the bar alone, with the least that would do against what there is.
    """
    parts = peak_parts(plan)
    key_rows = -(-len(parts) // 3)
    grid = _ROW_PX * len(ROWS) + 3 * LINE_PX + 16 if plan.step is not None else 0.0
    fig = blank_figure(_WIDTH, 60 + 2 * LINE_PX + _BAR_PX + LINE_PX * key_rows + 24 + grid)
    put_title(fig, _LEFT, _title(plan))
    height = fig.get_size_inches()[1] * DPI
    words = shortened(fig, _subtitle(plan), _RIGHT - _LEFT)
    put_text(fig, _LEFT, height - 44, words, color=MUTED, gid="subtitle")
    bottom = grid + LINE_PX * key_rows + 20
    _draw_bar(fig, plan, parts, bottom)
    _draw_keys(fig, parts, bottom - 20)
    if plan.step is not None:
        _draw_layers(fig, plan, grid - LINE_PX)
    return fig


def describe_plan(plan: MemoryPlan) -> str:
    """The picture in words."""
    parts = peak_parts(plan)
    largest = ", ".join(
        f"{name} {size / GIB:.2f} GiB"
        for name, size in sorted(parts.items(), key=lambda part: -part[1])[:3]
    )
    return f"{plan.sentence()}. The largest parts are {largest}."


def _title(plan: MemoryPlan) -> str:
    work, machine = plan.workload, plan.machine
    where = _with_article(machine.profile.name)
    name = f"{work.batch_size} x {work.seq_length} tokens on {where}"
    need, have = plan.peak_memory_gib, machine.budget_bytes / GIB
    if plan.fits:
        return f"{name}: {need:.2f} of {have:.2f} GiB"
    return f"{name}: at least {need:.2f} GiB, and {have:.2f} are there"


def _with_article(gpu: str) -> str:
    # "Tesla" is read as a word, "NVIDIA" and "H100" letter by letter
    is_word = gpu[1:2].islower()
    return f"{'an' if gpu[:1] in ('AEIOU' if is_word else _AN_BEFORE) else 'a'} {gpu}"


def _subtitle(plan: MemoryPlan) -> str:
    parts = [plan.workload.model_name]
    if plan.fits and plan.machine.profile.layer_launch_s > 0:
        parts.append(f"about {seconds_text(plan.step_seconds)} a step")
    return "; ".join([*parts, f"rates: {plan.machine.profile.source}"])


def _draw_bar(fig: Figure, plan: MemoryPlan, parts: dict[str, int], bottom: float) -> None:
    budget = plan.machine.budget_bytes
    scale = (_RIGHT - _LEFT) / (max(sum(parts.values()), budget) * 1.01)
    left = _LEFT
    for number, (name, size) in enumerate(parts.items()):
        style = {"facecolor": _COLOURS[number % len(_COLOURS)], "edgecolor": PAPER}
        fill_rectangle(fig, left, bottom, size * scale, _BAR_PX, gid=f"part {name}", **style)
        label = f"{size / GIB:.1f}"
        if size * scale > text_width(fig, label) + 8:
            ink = INK if number % len(_COLOURS) in (1, 3, 7) else PAPER
            spot = left + size * scale / 2
            put_text(fig, spot, bottom + _BAR_PX / 2, label, ha="center", color=ink)
        left += size * scale
    edge = _LEFT + budget * scale
    line(fig, (edge, edge), (bottom - 6, bottom + _BAR_PX + 6), color=INK, linestyle="--")
    text = f"{budget / GIB:.2f} GiB for torch"
    at_right = edge + text_width(fig, text) / 2 > _RIGHT
    place = {"ha": "right", "x": min(edge, _RIGHT)} if at_right else {"ha": "center", "x": edge}
    put_text(fig, place["x"], bottom + _BAR_PX + 18, text, ha=place["ha"], color=MUTED)  # type: ignore[arg-type]


def _draw_keys(fig: Figure, parts: dict[str, int], top: float) -> None:
    for number, (name, size) in enumerate(parts.items()):
        left, row = _LEFT + _KEY_PX * (number % 3), number // 3
        y = top - LINE_PX * row
        colour = _COLOURS[number % len(_COLOURS)]
        fill_rectangle(fig, left, y - 6, 12, 12, facecolor=colour, edgecolor=INK)
        put_text(fig, left + 18, y, f"{name} {size / GIB:.2f}")


def _draw_layers(fig: Figure, plan: MemoryPlan, top: float) -> None:
    assert plan.step is not None
    layers = len(plan.step.plan.keep)
    wide = (_RIGHT - _LEFT - _NAMES_PX) / layers
    for row, name in enumerate(ROWS):
        bottom = top - _ROW_PX * (row + 1) - LINE_PX
        put_text(fig, _LEFT, bottom + _ROW_PX / 2, WORDS[name])
        for layer in range(layers):
            action = action_of(plan, layer, name)
            left = _LEFT + _NAMES_PX + wide * layer
            gid = f"{name} {layer} {action}"
            style = {"linewidth": 0.8, **ACTIONS[action]}
            fill_rectangle(fig, left, bottom + 3, wide - 2, _ROW_PX - 6, gid=gid, **style)
    foot = top - _ROW_PX * len(ROWS) - LINE_PX - 10
    for layer in sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1}):
        centre = _LEFT + _NAMES_PX + wide * (layer + 0.5) - 1
        put_text(fig, centre, foot, str(layer), ha="center", color=MUTED)
    put_text(fig, _LEFT, foot, "layer", color=MUTED)
    left = _LEFT + _NAMES_PX
    for action, words in SAID.items():
        style = {"linewidth": 0.8, **ACTIONS[action]}
        fill_rectangle(fig, left, top - 8, 18, 14, **style)
        put_text(fig, left + 24, top - 1, words)
        left += text_width(fig, words) + 48


def action_of(plan: MemoryPlan, layer: int, name: str) -> str:
    """What a layer does with a class of its tensors: keep, offload or recompute."""
    assert plan.step is not None
    return next(a for a in ACTIONS if name in getattr(plan.step.plan, a)[layer])
