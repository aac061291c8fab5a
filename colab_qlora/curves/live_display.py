"""A picture and the words under it, shown once in a notebook and from then on replaced in place.

    display(bundle, raw=True, display_id=True) -> handle; handle.update(bundle, raw=True)

The two are outputs of their own: of an output that holds both, JupyterLab would show the HTML and
hide the picture. The saved notebook has the last state of each: one image, and the words as HTML
with a plain alternative. It works the same in IPython 7.34 and 9, in classic notebook, JupyterLab
and Colab, and needs no widget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from colab_qlora.curves.live_words import as_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PlotDisplay", "has_kernel", "has_shell"]


def has_kernel() -> bool:
    """Whether this process is a notebook's kernel, whose outputs can be replaced."""
    # IPython in a terminal has no kernel and could only print the words of a bundle
    return getattr(_shell(), "kernel", None) is not None


def has_shell() -> bool:
    """Whether IPython runs here; without it `display` would print the picture as letters."""
    return _shell() is not None


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


class PlotDisplay:
    """The two outputs of a live plot.

    Args:
        display: what `IPython.display.display` is; None: that.
    """

    def __init__(self, display: Callable[..., Any] | None = None) -> None:
        self._display = display
        self._handles: list[Any] = []

    def show(self, fig: Figure, alternative: str, lines: Sequence[str]) -> None:
        """Show the picture and the lines under it, in place of those before.

        Args:
            fig: the picture.
            alternative: the picture in words, for readers that cannot see it.
            lines: what stands under it.
        """
        from colab_qlora.curves.draw import figure_bundle

        words = {"text/html": as_html(lines), "text/plain": "\n".join(lines)}
        bundles = [figure_bundle(fig, alternative), words]
        if self._handles:
            for handle, bundle in zip(self._handles, bundles, strict=True):
                handle.update(bundle, raw=True)
            return
        if self._display is None:
            from IPython.display import display

            self._display = display
        self._handles = [self._display(bundle, raw=True, display_id=True) for bundle in bundles]
