"""What a trainer does when its run breaks: save the last finished step, and say what to change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import state_of
from colab_qlora.training.adapter_state import adapter_name, adapter_tensors, is_finite
from colab_qlora.training.atomic_checkpoint import SAVING, new_staging, put_in_place
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.fused_trainer import FusedTrainer
from colab_qlora.training.log_reader import LogReader
from colab_qlora.training.resume import what_is_missing

__all__ = ["RescuingTrainer"]


class RescuingTrainer(FusedTrainer):
    """A `FusedTrainer` that knows what to keep, and what to say, when memory or disk is full."""

    # where a checkpoint is being written, while one is
    _staging: str | None = None

    def _readers(self) -> list[LogReader]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, LogReader)]

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers, but the folder gets its name when it is whole."""
        if self.args.push_to_hub or self.args.world_size > 1:
            # an upload goes on in the background, and other processes write their share
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial))
        staging = new_staging(run_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        finally:
            self._staging = None
        put_in_place(staging / name, run_dir / name)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _stop_out_of_memory(self, error: BaseException) -> NoReturn:
        self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        state = state_of(self.model)
        if state is not None:
            state.free()  # as large as the batch that did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args: Any = self.args
        batch = f"{args.per_device_train_batch_size} rows x {args.max_length} tokens"
        raise UserError(
            f"out of memory at {batch}; {self._rescue()}",
            got=str(error).split(". ")[0],
            do=self._smaller_step(),
        ) from error

    def _stop_disk_full(self, error: BaseException, folder: str) -> NoReturn:
        # what was half written is of no use and takes the space that is missing
        shutil.rmtree(Path(folder) / SAVING, ignore_errors=True)
        half = Path(folder) / f"checkpoint-{self.state.global_step}"
        if half.is_dir() and what_is_missing(half):
            shutil.rmtree(half, ignore_errors=True)
        raise UserError(
            f"the disk is full: something of step {self.state.global_step} could not be written "
            f"in {folder}; earlier checkpoints are whole",
            got=str(error).splitlines()[0],
            do="Free some space (or set save_total_limit=1), then "
            "trainer.train(resume_from_checkpoint=True)",
        ) from error

    def _smaller_step(self) -> str:
        rows, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        if rows > 1:
            half = rows // 2
            return (
                f"Set per_device_train_batch_size={half} and gradient_accumulation_steps="
                f"{steps * rows // half}: the same training in less memory"
            )
        if not self.args.gradient_checkpointing:
            return "Pass use_gradient_checkpointing='smart' to get_peft_model"
        length = getattr(self.args, "max_length", None)
        return f"Lower max_seq_length to {length // 2}" if length else "Set max_seq_length=1024"

    def _rescue(self) -> str:
        """Save a checkpoint of the last finished step; in words what there is on disk now."""
        kept = [reader.kept() for reader in self._readers() if isinstance(reader, EarlyStopping)]
        return "; ".join([self._save_last_step(), *filter(None, kept)])

    def _save_last_step(self) -> str:
        """Save a checkpoint of the last finished step; a clause that says whether it worked."""
        if self.state.global_step == 0:
            return "no step was finished yet"
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        if adapter_name(self.model) and not is_finite(adapter_tensors(self.model)):
            # it would push the last good checkpoint out
            return f"step {self.state.global_step} is not finite and was not saved"
        if what_is_missing(folder) is None:
            # saved right after that step; a second save could only harm it
            return f"step {self.state.global_step} is saved in {folder}"
        try:
            self._save_checkpoint(self.model, None)
        except Exception as error:  # whatever went wrong, the first error is the one to show
            return (
                f"saving step {self.state.global_step} failed too ({type(error).__name__}: {error})"
            )
        return f"step {self.state.global_step} is saved in {folder}"
