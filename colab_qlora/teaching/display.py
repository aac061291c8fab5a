"""Show a picture in a notebook together with the same in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.curves.draw import figure_bundle

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
    if _in_notebook():
        from IPython.display import display

        display(figure_bundle(fig, text), raw=True)
    print(text)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    # IPython in a terminal has no kernel and would print the words of the bundle as well
    return getattr(get_ipython(), "kernel", None) is not None
