"""Show a picture in a notebook together with the same in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.curves.draw import figure_bundle
from colab_qlora.curves.live_display import has_kernel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["show"]


def show(fig: Figure, text: str) -> None:
    """Display a figure and print its text alternative below it.

    The picture is published as a bundle of image/png and text/plain, so that a front end that
    cannot show pictures, or a reader of the saved notebook, has the words. Where there is no
    notebook, only the words are printed.

    Args:
        fig: the figure.
        text: what it says, from the `describe_...` function that belongs to the drawing function.
    """
    if has_kernel():
        from IPython.display import display

        display(figure_bundle(fig, text), raw=True)
    print(text)
