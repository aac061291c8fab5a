"""Stand-ins shared by the tests of the callbacks that read the loss log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colab_qlora.curves.verdicts import Diagnosis, Verdict


def fail_at(trainer: Any, step: int, error: BaseException) -> None:
    """Make the trainer's next training step after `step` finished ones raise `error`."""
    stock = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            raise error
        return stock(*args, **kwargs)

    trainer.training_step = training_step


def with_verdict(
    name: str, confidence: str = "likely", from_step: int = 0
) -> Callable[..., Diagnosis]:
    """A diagnosis that says `name` from a step on, and that all is well before."""

    def diagnose(log: Any, **options: Any) -> Diagnosis:
        last = max((record["step"] for record in log), default=0)
        said = name if last >= from_step else "healthy"
        verdict = Verdict(said, "info", confidence, None, "of a test", "go on")
        return Diagnosis((verdict,), last)

    return diagnose
