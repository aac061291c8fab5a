"""Loss curves: the log on disk, the picture, the same in words, what it shows, and what to change.

Nothing here imports torch or transformers. What draws is fetched from its module on first use, so
that reading a log does not load matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# not fetched late: modules of the same names would take the functions' places in the package
from colab_qlora.curves.advise import advise
from colab_qlora.curves.diagnose import diagnose
from colab_qlora.lazy import lazy_names

# public name -> the module that defines it
_EXPORTS = {
    "Advice": "advise",
    "Diagnosis": "verdicts",
    "LivePlot": "live",
    "LossLog": "log",
    "Thresholds": "thresholds",
    "Verdict": "verdicts",
    "describe_curves": "words",
    "draw_curves": "draw",
    "explore_curves": "widgets",
    "eval_points": "logs.points",
    "figure_bundle": "draw",
    "read_log": "log",
    "read_runs": "log",
    "save_png": "draw",
    "split_runs": "logs.runs",
    "train_points": "logs.points",
}

__all__ = [
    "Advice",
    "Diagnosis",
    "LivePlot",
    "LossLog",
    "Thresholds",
    "Verdict",
    "advise",
    "describe_curves",
    "diagnose",
    "draw_curves",
    "eval_points",
    "explore_curves",
    "figure_bundle",
    "read_log",
    "read_runs",
    "save_png",
    "split_runs",
    "train_points",
]

if TYPE_CHECKING:
    from colab_qlora.curves.advise import Advice
    from colab_qlora.curves.draw import draw_curves, figure_bundle, save_png
    from colab_qlora.curves.live import LivePlot
    from colab_qlora.curves.log import LossLog, read_log, read_runs
    from colab_qlora.curves.logs.points import eval_points, train_points
    from colab_qlora.curves.logs.runs import split_runs
    from colab_qlora.curves.thresholds import Thresholds
    from colab_qlora.curves.verdicts import Diagnosis, Verdict
    from colab_qlora.curves.widgets import explore_curves
    from colab_qlora.curves.words import describe_curves

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
