"""`SFTTrainer`: TRL's trainer, thinly wrapped, that takes today's arguments and those of older
scripts.

What it adds: the older names, a precision that the machine has, adapters that stay float32, a loss
scale that skips no early step, a check of lengths and labels before the first step, a loss log on
disk, and resuming from the newest whole checkpoint.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils.notebook import NotebookProgressCallback

from colab_qlora.decoding import free_decoding
from colab_qlora.disk import is_disk_full
from colab_qlora.models.settings import settings_of
from colab_qlora.models.smart import bring_embedding_back, free_recordings, runtime_of
from colab_qlora.quantization.schedule import ScheduleSettings
from colab_qlora.training.adapter_dtype import adapters_kept, adapters_to_float32
from colab_qlora.training.arguments import config_fields, fit_arguments
from colab_qlora.training.callbacks import LossLogCallback
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.failures import is_out_of_memory
from colab_qlora.training.live_callbacks import LossPlot, readers_for
from colab_qlora.training.older_names import trainer_arguments
from colab_qlora.training.one_start_token import one_start_text
from colab_qlora.training.packing import (
    check_collator,
    describe_rows,
    truncated,
    truncation_left_to_us,
    without_attention_warnings,
)
from colab_qlora.training.padding import pad_to_few_lengths
from colab_qlora.training.quantization_schedule import QuantizationSchedule, schedules_for
from colab_qlora.training.resuming import ResumingTrainer
from colab_qlora.training.run_settings import run_settings
from colab_qlora.training.trainer_checks import check_one_eval_set, checked_tokenizer
from colab_qlora.training.trainer_rows import checked_rows
from colab_qlora.work import check_writable

# a T4's first steps overflow at the usual 65,536 and are skipped; at 8,192 they are not
INITIAL_LOSS_SCALE = 2.0**13


class SFTTrainer(ResumingTrainer):
    """Supervised fine-tuning. Takes all that `trl.SFTTrainer` takes, and:

    Args:
        model: what `FastLanguageModel.get_peft_model` gave (any PEFT or transformers model works).
        args: `SFTConfig` or a plain `TrainingArguments`.
        train_dataset: a datasets.Dataset or a list of dicts with "text", "messages", or "prompt"
            and "completion".
        eval_dataset: the same; if given, the first evaluation happens before the first step.
        processing_class: the tokenizer.
        tokenizer: older name of `processing_class`.
        **kwargs: further arguments of `trl.SFTTrainer`, and fields of `SFTConfig` that older
            scripts give to the trainer (`dataset_text_field`, `max_seq_length`, `packing`, ...).
        live_plot: True: the loss curves and their reading, redrawn in place; False: lines of
            progress; None: the curves in a notebook's kernel, lines elsewhere; or a `LossPlot`.
        early_stopping: True, or an `EarlyStopping`: stop when the eval loss has turned, and keep
            the best adapter. Needs an eval_dataset and an eval_strategy.
        stop_on_non_finite: stop when the loss is nan or inf, and give the last good adapter back.
        quantization_schedule: whether weights of a model with quantization="dynamic" change their
            precision during the training, under the same cap; True, False or a `ScheduleSettings`.
            None: True for such a model.

    Raises:
        UserError: no rows, no labels left after truncation, an output folder that cannot be
            written to, or arguments that contradict each other.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        live_plot: bool | LossPlot | None = None,
        early_stopping: bool | EarlyStopping = False,
        stop_on_non_finite: bool = True,
        quantization_schedule: bool | ScheduleSettings | None = None,
        **kwargs: Any,
    ) -> None:
        self.notes = []
        tokenizer = checked_tokenizer(model, tokenizer, processing_class)
        older, said = trainer_arguments(kwargs, trl.SFTTrainer, config_fields())
        if said:
            self._say("; ".join(said))
        has_eval = eval_dataset is not None
        args = fit_arguments(args, model, has_eval_dataset=has_eval, overrides=older, say=self._say)
        check_one_eval_set(early_stopping, eval_dataset)
        check_writable(args.output_dir)
        if kwargs.get("formatting_func") is not None:
            kwargs["formatting_func"] = one_start_text(kwargs["formatting_func"], tokenizer)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        formatting = kwargs.get("formatting_func")
        datasets = checked_rows(datasets, tokenizer, args, formatting, say=self._say)
        check_collator(args, data_collator)
        with adapters_kept(model), without_attention_warnings(), truncation_left_to_us(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                processing_class=tokenizer,
                **datasets,
                **kwargs,
            )
        self._prepare_rows()
        self._set_precision()
        self._report_in_one_way()
        given = self.callback_handler.callbacks
        readers = readers_for(given, live_plot, early_stopping, stop_on_non_finite)
        for reader in [*readers, *schedules_for(self, quantization_schedule)]:
            self.add_callback(reader)

    def _prepare_rows(self) -> None:
        """Truncate the rows that TRL has tokenised, describe them, and pad to few lengths."""
        self.train_dataset = truncated(self.train_dataset, self.args)
        self.eval_dataset = truncated(self.eval_dataset, self.args)
        for name, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if line := describe_rows(rows, name, self.args):
                self._say(line)
        pad_to_few_lengths(self, self._say)

    def _set_precision(self) -> None:
        adapters_to_float32(self.model)
        if self.args.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=INITIAL_LOSS_SCALE)

    def _report_in_one_way(self) -> None:
        # one kind of progress report; the notebook table would hide the training loss between evals
        for stock in (ProgressCallback, NotebookProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        if logging_dir := getattr(self.args, "logging_dir", None):
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback):
                    callback.logging_dir = str(Path(logging_dir).expanduser())
        self._loss_log = LossLogCallback(run_settings(self))
        # before the callbacks that read it, of which the user may have passed some
        self.callback_handler.callbacks.insert(0, self._loss_log)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `FusedTrainer`; a schedule of precision keeps the micro-batch to measure on."""
        for reader in self._readers():
            if isinstance(reader, QuantizationSchedule):
                reader.keep(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def train(  # type: ignore[override]  # the rest of Trainer.train's arguments pass through
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint, if any.

        A run that is interrupted, or that runs out of memory, saves a checkpoint of the last
        finished step before it stops; the best adapter, if early stopping keeps one, stays too.

        Raises:
            UserError: out of memory or disk (with what to change), or a checkpoint that is cut
                short.
        """
        folder = self.args.output_dir or "."
        free_decoding(self.model)  # of answers before
        for reader in self._readers():
            reader.attach(self._loss_log, self._say)
        checkpoint = self._checkpoint_to_start_from(resume_from_checkpoint, folder)
        if checkpoint and (done := self._finished(checkpoint)):
            if settings := settings_of(self.model):
                settings.trained_steps = done.global_step
            return done
        before = 0 if checkpoint else self._steps_before()
        eval_on_start = self.args.eval_on_start
        # a resumed run has its evaluation before the first step in the log already
        self.args.eval_on_start = eval_on_start and not checkpoint
        try:
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self._say_peak_memory()
            return result
        except KeyboardInterrupt:
            self._loss_log.note_end(self.state.global_step, "interrupted")
            self._say(f"interrupted; {self._rescue()}")
            raise
        except Exception as error:  # safetensors and torch each raise types of their own
            self._loss_log.note_end(self.state.global_step, f"stopped by {type(error).__name__}")
            if is_out_of_memory(error):
                self._stop_out_of_memory(error)
            if is_disk_full(error):
                self._stop_disk_full(error, folder)
            raise
        finally:
            if settings := settings_of(self.model):
                settings.trained_steps = before + self.state.global_step
            self.args.eval_on_start = eval_on_start
            with contextlib.suppress(RuntimeError):  # of a GPU that has failed
                free_recordings(self.model)
            self._bring_embedding_back()
            self._loss_log.close()  # raises nothing: the readers have to be told in any case
            for reader in self._readers():
                reader.run_ended()

    def _steps_before(self) -> int:
        """Steps that an earlier trainer has trained this model for, which is said."""
        settings = settings_of(self.model)
        steps = settings.trained_steps if settings else 0
        if steps:
            self._say(
                f"this model has {steps} step{'' if steps == 1 else 's'} of an earlier run behind "
                "it and is trained on from there; to begin anew, load it again"
            )
        return steps

    def _bring_embedding_back(self) -> None:
        try:
            bring_embedding_back(self.model)
        except torch.OutOfMemoryError:
            self._say(
                "the embedding's table stays on the host for want of GPU memory; "
                "FastLanguageModel.for_inference(model) brings it back"
            )

    def _say_peak_memory(self) -> None:
        """What the run took, beside what was planned for it."""
        runtime = runtime_of(self.model)
        if runtime is None or runtime.device.type != "cuda" or not runtime.plans:
            return
        peak_gib = torch.cuda.max_memory_allocated(runtime.device) / 2**30
        planned_gib = runtime.predicted_peak_bytes / 2**30
        self._say(f"peak memory {peak_gib:.2f} GiB; planned {planned_gib:.2f}")


# the name that tutorials know; the same class
UnslothTrainer = SFTTrainer
