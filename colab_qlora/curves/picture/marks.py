"""What a diagnosis marks on the picture of a run, and in which words; no judgement of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colab_qlora.curves.picture.curve import Curve, one_line
from colab_qlora.curves.verdicts import Diagnosis, Verdict
from colab_qlora.errors import UserError

__all__ = ["Marks", "Turn", "amount_words", "as_marks", "count_words"]

Diagnoses = Diagnosis | Mapping[str, Diagnosis] | None

# what costs the zone behind the divergence point, the first that holds
_ZONES = {"overfitting": "overfitting", "eval rising": "eval loss rising"}
# verdicts whose step is a place on the curve, and what happens there
_TURNS = {
    "collapsed": "loss collapsed since",
    "worse than base": "worse than before training since",
    "unstable": "unstable since",
    "memorising": "memorising since",
}


@dataclass(frozen=True)
class Turn:
    """A verdict's place on the curve.

    Attributes:
        step: the step.
        event: what happens there, to be followed by "step 12".
        further_steps: where it happens again.
    """

    step: int
    event: str
    further_steps: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """What happens, with the step."""
        return f"{self.event} step {self.step:,}"


@dataclass(frozen=True)
class Marks:
    """What is marked on one run.

    Attributes:
        divergence: the step from which the eval loss rose for good, or None.
        zone_end: the last step of the zone that begins there.
        zone: what the zone is, in a few words: "overfitting".
        spikes: steps of single losses far above their neighbours, rising.
        turns: the places of other verdicts, most important first.
    """

    divergence: int | None = None
    zone_end: int = 0
    zone: str = ""
    spikes: tuple[int, ...] = ()
    turns: tuple[Turn, ...] = ()

    @property
    def zone_text(self) -> str:
        """The zone with its first step."""
        return f"{self.zone} since step {self.divergence:,}"

    def texts(self) -> list[str]:
        """All marks in words, most important first."""
        said = []
        if self.divergence is not None:
            end = f", a zone up to step {self.zone_end:,}" if self.has_zone else ""
            said.append(f"{self.zone_text}{end}")
        said += [turn.text for turn in self.turns]
        if self.spikes:
            said.append(f"{count_words(len(self.spikes), 'spike')} at {steps_words(self.spikes)}")
        return said

    @property
    def has_zone(self) -> bool:
        """Whether anything lies behind the divergence point."""
        return self.divergence is not None and self.zone_end > self.divergence


def as_marks(diagnosis: Diagnoses, curves: Sequence[Curve]) -> list[Marks]:
    """Gives what is marked on each run.

    Args:
        diagnosis: that of the only run; or a dict from run name to diagnosis, in which runs may be
            missing; or None.
        curves: the runs.

    Returns:
        The marks of each run, in the order of `curves`; empty ones for a run without a diagnosis.

    Raises:
        UserError: one diagnosis for several runs, or one for a run that is not shown.
    """
    if diagnosis is None:
        return [Marks() for _ in curves]
    names = [curve.name for curve in curves]
    if isinstance(diagnosis, Diagnosis):
        if len(curves) > 1:
            raise UserError(
                "one diagnosis cannot be that of several runs",
                got=f"{len(curves)} runs",
                do=f"Pass a dict from run name to diagnosis, for instance {{{names[0]!r}: ...}}",
            )
        return [_marks(diagnosis)]
    if not isinstance(diagnosis, Mapping) or not all(
        isinstance(each, Diagnosis) for each in diagnosis.values()
    ):
        raise UserError(
            "that is no diagnosis",
            got=type(diagnosis).__name__,
            allowed="a Diagnosis, or a dict from run name to Diagnosis",
            do="Pass what diagnose(log) gives",
        )
    by_name = {one_line(name): each for name, each in diagnosis.items()}
    for name in by_name:
        if name not in names:
            raise UserError(
                "a diagnosis is of a run that is not shown",
                got=repr(name),
                allowed=", ".join(map(repr, names)),
                do="Use the same names for runs and diagnoses, and pass the runs as a dict",
            )
    return [_marks(by_name[name]) if name in by_name else Marks() for name in names]


def count_words(count: int, noun: str) -> str:
    """Writes a count with its noun: "1 spike", "1,200 spikes"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def amount_words(amount: float, noun: str) -> str:
    """Writes an amount that need not be whole with its noun: "1 epoch", "2.5 epochs"."""
    shown = f"{amount:g}"
    return f"{shown} {noun}{'' if shown == '1' else 's'}"


def steps_words(steps: Sequence[int], most: int = 8) -> str:
    """Lists steps: "step 3", "steps 3, 5 and 9", "steps 3, 5, 9 and 30 more"."""
    shown = [f"{step:,}" for step in steps[:most]]
    if len(steps) > most:
        return f"steps {', '.join(shown)} and {len(steps) - most:,} more"
    if len(steps) == 1:
        return f"step {shown[0]}"
    return f"steps {', '.join(shown[:-1])} and {shown[-1]}"


def _marks(diagnosis: Diagnosis) -> Marks:
    zone = ""
    if diagnosis.divergence_step is not None:
        found = next((v for name in _ZONES if (v := diagnosis.get(name))), None)
        # the turn is in the numbers even where no verdict of the two is
        zone = _ZONES["eval rising"] if found is None else _said(found, _ZONES[found.name])
    spikes = diagnosis.get("spikes")
    known = set() if spikes is None else {*spikes.steps, spikes.step} - {None}
    turns = [verdict for verdict in diagnosis.verdicts if verdict.name in _TURNS]
    return Marks(
        divergence=diagnosis.divergence_step,
        zone_end=diagnosis.last_step,
        zone=zone,
        spikes=tuple(sorted(step for step in known if step is not None)),
        turns=tuple(
            Turn(verdict.step, _said(verdict, _TURNS[verdict.name]), verdict.steps)
            for verdict in turns
            if verdict.step is not None
        ),
    )


def _said(verdict: Verdict, words: str) -> str:
    return f"maybe {words}" if verdict.confidence == "watch" else words
