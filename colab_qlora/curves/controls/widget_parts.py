"""Pieces that the kit's widgets are made of: an output that changes in place, and shared layout.

Only what ipywidgets 7.7.1 (Colab, classic notebook) and 8 have in common is used.
"""

from __future__ import annotations

import html
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "SWITCH_LAYOUT",
    "DisplaySlot",
    "control_style",
    "folded",
    "row",
    "tooltip",
    "words_bundle",
]

# of a checkbox beside others
SWITCH_LAYOUT = {"width": "auto", "max_width": "100%", "margin": "2px 20px 2px 2px"}


class DisplaySlot:
    """One output of a cell whose content is replaced in place.

    It is an ordinary output, so the last content stays in the saved notebook, and GitHub and
    viewers without a kernel show it, which they do not do with an image widget.
    """

    def __init__(self) -> None:
        self._display_id = uuid.uuid4().hex
        self._is_shown = False

    def show(self, bundle: Mapping[str, str]) -> None:
        """Adds an output with this content to the cell that is running."""
        from IPython.display import display

        display(dict(bundle), raw=True, display_id=self._display_id)
        self._is_shown = True

    def update(self, bundle: Mapping[str, str]) -> None:
        """Replaces the content wherever it is shown; nothing happens if it is not."""
        from IPython.display import update_display

        if self._is_shown:
            update_display(dict(bundle), raw=True, display_id=self._display_id)


def words_bundle(paragraphs: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Gives paragraphs as a MIME bundle of HTML, which wraps at words, and plain text.

    Args:
        paragraphs: heading -> lines; a heading of "" is left out.
    """
    blocks, plain = [], []
    for heading, lines in paragraphs.items():
        said = list(lines)
        head = [f"<b>{html.escape(heading)}</b>"] if heading else []
        blocks.append("<br>".join([*head, *map(html.escape, said)]))
        plain.append("\n".join([f"{heading}:", *said] if heading else said))
    style = "max-width: 50em; margin: 0.5em 0; line-height: 1.45"
    text = "".join(f'<p style="{style}">{block}</p>' for block in blocks)
    return {"text/html": text, "text/plain": "\n\n".join(plain)}


def tooltip(text: str) -> dict[str, str]:
    """The keyword argument by which a control takes its tooltip in the ipywidgets at hand."""
    from ipywidgets import IntSlider

    # 8 renamed it, and warns of the old name
    return {
        "tooltip" if "tooltip" in IntSlider.class_trait_names() else "description_tooltip": text
    }


def control_style(is_field: bool, description_px: int = 130) -> dict[str, Any]:
    """Style and layout of a control with its description to the left.

    At 800 px beside a notebook's margins one slider takes a line of a `row`, and two fields do.

    Args:
        is_field: whether it holds a number and needs little room, or is a slider.
        description_px: of its width, what the description has.
    """
    from ipywidgets import Layout

    least, most = (285, 320) if is_field else (400, 800)
    # without a least width of 0 a browser makes a field as wide as its largest number
    layout = Layout(
        flex=f"1 1 {least}px", width="auto", min_width="0px", max_width=f"min(100%, {most}px)"
    )
    return {"layout": layout, "style": {"description_width": f"{description_px}px"}}


def row(children: Iterable[Any]) -> Any:
    """Controls side by side, going on below where the width ends."""
    from ipywidgets import Box, Layout

    layout = Layout(display="flex", flex_flow="row wrap", width="auto", overflow="hidden")
    return Box(children=tuple(children), layout=layout)


def folded(words: str, content: Any) -> tuple[Any, Any]:
    """A checkbox and what it opens, closed at first.

    An Accordion would do the same for a mouse alone: its title does not take the keyboard.

    Args:
        words: what the checkbox is called.
        content: a box.

    Returns:
        The checkbox, and the content to place below it.
    """
    from ipywidgets import Checkbox, Layout

    box = Checkbox(value=False, description=words, indent=False, layout=Layout(**SWITCH_LAYOUT))
    open_display = content.layout.display

    def show(change: Any) -> None:
        content.layout.display = open_display if change["new"] else "none"

    content.layout.display = "none"
    box.observe(show, "value")
    return box, content
