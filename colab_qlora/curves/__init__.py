"""Loss curves: the log on disk, the picture, and the picture in words.

Nothing here imports torch or transformers, and matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

from colab_qlora.curves.draw import draw_curves, figure_bundle, save_png
from colab_qlora.curves.log import LossLog, eval_points, read_log, train_points
from colab_qlora.curves.series import describe_curves

__all__ = [
    "LossLog",
    "describe_curves",
    "draw_curves",
    "eval_points",
    "figure_bundle",
    "read_log",
    "save_png",
    "train_points",
]
