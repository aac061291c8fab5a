"""Where the rules of a diagnosis draw their lines, in one place.

They are round numbers that had margin on real runs (Prechelt 1998 for the generalisation loss; 93
published notebooks and 44 published trainer logs for the rest), not fitted optima. Shares are
fractions of 1. "se" is the standard error of a level, 1.253 s / sqrt(points), s being the scatter
of a single logged loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from colab_qlora.errors import UserError

__all__ = ["Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """The lines that the rules draw; shares are fractions of 1.

    Attributes:
        least_points: with fewer train points, and fewer evals than `least_evals`, nothing is said.
        least_evals: evals after step 0 that are evidence on their own.
        window_share: the level of a run at a step is the median of this share of its points.
        generalisation_loss: rise of the eval loss above its lowest that is overfitting.
        confirmed_rise: both of the last two evals lie this far above the lowest.
        worse_than_base: the eval loss lies this far above its value before training.
        unstable_rise: the train level rises this far above its lowest, as a share of the lowest.
        unstable_errors: and by this many standard errors of the difference.
        spike_scatters: a single loss this many scatters above the level is a spike.
        stair_fall: fall of the train level where an epoch begins, beyond the trend.
        stair_errors: and by this many standard errors.
        repeat_fall: fall of the train level since the first epoch ended, without an eval.
        leak_gap: after repeated epochs the eval loss is at most this far above the train loss.
        leak_fall: fall of the train level since the first epoch ended that asks for a gap.
        gap_below: the eval loss is this far below the train loss.
        scale_ratio: train over eval loss that no training explains.
        collapsed_loss: a train level below this without an eval is not learning but copying.
        little_learnt: an eval loss that improves by less has not been learnt from.
        little_fall: a train level that falls by less, without an eval, may not have moved.
        slow_fall: a run that is still falling and fell by less is slow.
        slow_shape: and half of its fall, or not much more, lay between its first and second third.
        tail_fall: fall over the last third, as a share of the end, that is still improving.
    """

    least_points: int = 20
    least_evals: int = 3
    window_share: float = 0.1
    generalisation_loss: float = 0.03
    confirmed_rise: float = 0.015
    worse_than_base: float = 0.01
    unstable_rise: float = 0.25
    unstable_errors: float = 4.0
    spike_scatters: float = 8.0
    stair_fall: float = 0.08
    stair_errors: float = 4.0
    repeat_fall: float = 0.40
    leak_gap: float = 0.02
    leak_fall: float = 0.15
    gap_below: float = 0.10
    scale_ratio: float = 1.8
    collapsed_loss: float = 0.02
    little_learnt: float = 0.02
    little_fall: float = 0.05
    slow_fall: float = 0.30
    slow_shape: float = 0.70
    tail_fall: float = 0.05

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not value > 0:
                raise UserError(
                    f"the threshold {each.name} is not positive",
                    got=value,
                    allowed="above 0",
                    do=f"Leave it out for the usual {each.default}",
                )
