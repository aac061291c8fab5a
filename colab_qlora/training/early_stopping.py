"""`EarlyStopping`: stop when the diagnosis says that the eval loss has turned, and go back to its
lowest.

A count of evaluations that did not improve stops healthy runs, since eval losses are noisy too.
What stops a run here is a verdict with its reason: overfitting, a rising eval loss, or a model that
is worse than before training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from colab_qlora.curves.log import eval_points
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.curves.verdicts import CONFIDENCES, Verdict
from colab_qlora.errors import UserError
from colab_qlora.training.adapter_state import adapter_name
from colab_qlora.training.best_adapter import FOLDER_NAME, BestAdapter
from colab_qlora.training.log_reader import Diagnose, LogReader

__all__ = ["EarlyStopping"]

_STOPPING = ("worse than base", "overfitting", "eval rising")


class EarlyStopping(LogReader):
    """Keeps the adapter of the lowest eval loss, and stops once the eval loss has turned.

    The best adapter is in `<output_dir>/best_adapter`, as PEFT saves one. The evaluation before the
    first step counts as the base, not as a candidate: its adapter has learnt nothing.

    Args:
        thresholds: where the rules of the diagnosis draw their lines; None: the usual ones.
        restore_best: whether the model has the best adapter's weights when training ends.
        confidence: the least confidence of a verdict that stops: "sure", "likely" or "watch".
        diagnose: what reads the log; None: `colab_qlora.curves.diagnose.diagnose`.

    Attributes:
        best: the `BestAdapter` of the last run, or None.
        stopped_by: the verdict that stopped it, or None.

    Raises:
        UserError: another confidence; when training begins: no evaluations, or no adapter.
    """

    def __init__(
        self,
        thresholds: Thresholds | None = None,
        restore_best: bool = True,
        confidence: str = "likely",
        *,
        diagnose: Diagnose | None = None,
    ) -> None:
        super().__init__(thresholds, diagnose)
        if confidence not in CONFIDENCES:
            raise UserError(
                "the confidence is not understood",
                got=repr(confidence),
                allowed=", ".join(CONFIDENCES),
            )
        self.restore_best, self.confidence = restore_best, confidence
        self.best: BestAdapter | None = None
        self.stopped_by: Verdict | None = None
        self._is_to_look = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        _check_run(args, kwargs.get("model"))
        is_resumed = state.global_step > 0
        self.best = BestAdapter(Path(args.output_dir) / FOLDER_NAME, is_resumed=is_resumed)
        self.stopped_by = None
        # a run that was stopped stays stopped; after a step, because the trainer's averages over
        # no step at all are nonsense
        self._is_to_look = is_resumed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_to_look:
            self._is_to_look = False
            self._stop_if_turned(state.global_step, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_running or self.best is None or state.global_step == 0:
            return
        steps, losses = eval_points(self.log.records)
        if not steps.size or steps[-1] != state.global_step:
            return  # an evaluation that logged no loss
        loss = float(losses[-1])
        if math.isfinite(loss) and loss < self.best.eval_loss:
            self._save_best(kwargs["model"], state.global_step, loss)
        self._stop_if_turned(state.global_step, control)

    def _save_best(self, model: Any, step: int, loss: float) -> None:
        assert self.best is not None
        try:
            self.best.save(model, step, loss)
        except (OSError, SafetensorError) as error:
            # the training is worth more than this copy, and the one before stays
            what = self.kept() or "there is none yet"
            self._say(f"the best adapter of step {step:,} could not be saved ({error}); {what}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self.restore_best:
            self.restore(kwargs["model"])

    def restore(self, model: Any) -> None:
        """Put the best adapter's weights back into the model, and say so."""
        if self.best is None or self.best.step is None or self.best.is_in_model:
            return
        try:
            self.best.put_back_(model, self._say)
        except (OSError, SafetensorError) as error:
            self._say(f"the best adapter could not be read ({error}); the last one stays")
            return
        self._say(f"the adapter is that of {self.best}, the lowest; also in {self.best.folder}")

    def take_over(self, output_dir: str, model: Any) -> None:
        """Put the best adapter of a run that is finished already back, if it is wanted."""
        self.best = BestAdapter(Path(output_dir) / FOLDER_NAME, is_resumed=True)
        if self.restore_best:
            self.restore(model)

    def kept(self) -> str:
        """Where the best adapter is, as a clause; "" if there is none."""
        if self.best is None or self.best.step is None:
            return ""
        return f"the best adapter, of {self.best}, is in {self.best.folder}"

    def _stop_if_turned(self, step: int, control: Any) -> None:
        diagnosis = self.diagnosis()
        if diagnosis is None:
            return
        found = (diagnosis.get(name) for name in _STOPPING)
        verdict = next((v for v in found if v is not None and self._is_enough(v)), None)
        if verdict is None:
            return
        self.stopped_by = verdict
        control.should_training_stop = True
        self.note_stop(f"stopped early: {verdict.title}")
        self._say(
            f"stopped early at step {step:,}: {verdict.title} ({verdict.confidence}), because "
            f"{verdict.because}"
        )

    def _is_enough(self, verdict: Verdict) -> bool:
        return CONFIDENCES.index(verdict.confidence) <= CONFIDENCES.index(self.confidence)


def _check_run(args: Any, model: Any) -> None:
    # a strategy without an eval set is an error of transformers before it comes to this
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise UserError(
            "early stopping needs evaluations",
            got="eval_strategy='no'",
            allowed="eval_strategy='steps' or 'epoch', with an eval_dataset",
            do="Set them, or pass early_stopping=False",
        )
    if adapter_name(model) is None:
        raise UserError(
            "early stopping keeps the best adapter, and the model has none",
            got=type(model).__name__,
            do="Attach one with get_peft_model, or pass early_stopping=False",
        )
