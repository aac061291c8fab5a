"""What a trainer does to go on where a run stopped: which checkpoint, over which precisions, and
whether there is anything left to do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from colab_qlora.quantization.remaking import follow_map, follow_or_say
from colab_qlora.training.atomic_checkpoint import finish_killed_save
from colab_qlora.training.best_adapter import move_aside
from colab_qlora.training.callbacks import LossLogCallback
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.rescue import RescuingTrainer
from colab_qlora.training.resume import (
    check_checkpoint,
    last_complete_checkpoint,
    other_settings,
    set_aside,
)


class ResumingTrainer(RescuingTrainer):
    """A `RescuingTrainer` that knows where a run begins."""

    _loss_log: LossLogCallback

    def _checkpoint_to_start_from(self, asked: str | bool | None, folder: str) -> str | None:
        """The checkpoint that is asked for, whole; None: the first step, in a folder made ready.

        Args:
            asked: True: the newest of this run, if there is any; or a checkpoint's folder.
            folder: where the run's checkpoints are.

        Raises:
            UserError: the folder that is asked for is no whole checkpoint.
        """
        if self.is_world_process_zero() and (finished := finish_killed_save(folder)):
            self._say(f"the save of {finished} was killed when all was written; it is in place now")
        found = None
        if asked is True:
            found = self._newest_of_this_run(folder)
        elif asked:
            found = check_checkpoint(asked)
        if not found and (aside := set_aside(folder)):
            move_aside(folder, aside)
            self._say(f"an earlier run's checkpoints and log are now in {aside}")
        return found

    def _newest_of_this_run(self, folder: str) -> str | None:
        found = last_complete_checkpoint(folder)
        if found is None:
            self._say(f"no checkpoint in {folder} yet: starting with the first step")
            return None
        changed = other_settings(folder, self._loss_log.run)
        if changed:
            words = ", ".join(
                f"{name} {now} instead of {then}" for name, (then, now) in changed.items()
            )
            self._say(f"the checkpoints are of another run ({words}): starting with the first step")
            return None
        self._say(f"going on from {found}")
        return str(found)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # the adapter was trained over a base of these precisions
        follow_map(self.model, resume_from_checkpoint, self._say)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # so was the best one, and over others if precision changed since
        follow_or_say(self.model, self.state.best_model_checkpoint, self._say)
        super()._load_best_model()

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """Take over a checkpoint of the last step as it is; transformers would train one more."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step < self._total_steps(state):
            return None
        self._load_from_checkpoint(checkpoint)
        self.state = state
        self._say(f"all {state.max_steps} steps are done: nothing is left to train")
        for reader in self._readers():
            if isinstance(reader, EarlyStopping):
                reader.take_over(self.args.output_dir or ".", self.model)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = sum(losses) / len(losses) if losses else float("nan")
        metrics = {"train_runtime": 0.0, "train_loss": loss}
        return TrainOutput(state.global_step, loss, metrics)

    def _total_steps(self, state: TrainerState) -> int:
        """Steps that the present arguments ask for (the checkpoint's for uncounted rows)."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        try:
            batches = len(self.get_train_dataloader())
        except TypeError:  # an iterable dataset
            return state.max_steps
        per_epoch = max(1, -(-batches // self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * per_epoch)
