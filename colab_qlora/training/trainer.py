"""`SFTTrainer`: TRL's trainer, thinly wrapped, that takes today's arguments and those of older
scripts.

What it adds: the older names, a precision that the machine has, adapters that stay float32, a loss
scale that skips no early step, a check of lengths and labels before the first step, a loss log on
disk, and resuming from the newest whole checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils.notebook import NotebookProgressCallback

from colab_qlora.decoding import free_decoding
from colab_qlora.disk import is_disk_full
from colab_qlora.models.smart import bring_embedding_back, free_recordings, runtime_of
from colab_qlora.quantization.remaking import follow_map, follow_or_say
from colab_qlora.quantization.schedule import ScheduleSettings
from colab_qlora.training.adapter_dtype import adapters_kept, adapters_to_float32
from colab_qlora.training.arguments import config_fields, fit_arguments
from colab_qlora.training.atomic_checkpoint import finish_killed_save
from colab_qlora.training.best_adapter import move_aside
from colab_qlora.training.callbacks import LossLogCallback
from colab_qlora.training.dataset_checks import as_dataset, check_dataset, with_messages
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.failures import is_out_of_memory
from colab_qlora.training.live_callbacks import LossPlot, readers_for
from colab_qlora.training.older_names import trainer_arguments
from colab_qlora.training.one_start_token import one_start_text, with_one_start
from colab_qlora.training.packing import (
    check_collator,
    describe_rows,
    truncated,
    truncation_left_to_us,
    without_attention_warnings,
)
from colab_qlora.training.padding import pad_to_few_lengths
from colab_qlora.training.quantization_schedule import QuantizationSchedule, schedules_for
from colab_qlora.training.rescue import RescuingTrainer
from colab_qlora.training.resume import (
    check_checkpoint,
    last_complete_checkpoint,
    other_settings,
    set_aside,
)
from colab_qlora.training.run_settings import run_settings
from colab_qlora.training.trainer_checks import (
    check_completions,
    check_one_eval_set,
    checked_tokenizer,
)
from colab_qlora.work import check_writable

# a T4's first steps overflow at the usual 65,536 and are skipped; at 8,192 they are not
INITIAL_LOSS_SCALE = 2.0**13


class SFTTrainer(RescuingTrainer):
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
        datasets = self._checked_rows(datasets, tokenizer, args, kwargs.get("formatting_func"))
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
        self.train_dataset = truncated(self.train_dataset, self.args)
        self.eval_dataset = truncated(self.eval_dataset, self.args)
        self._describe_rows()
        pad_to_few_lengths(self, self._say)
        self._set_precision()
        self._report_in_one_way()
        given = self.callback_handler.callbacks
        readers = readers_for(given, live_plot, early_stopping, stop_on_non_finite)
        for reader in [*readers, *schedules_for(self, quantization_schedule)]:
            self.add_callback(reader)

    def _describe_rows(self) -> None:
        for name, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if line := describe_rows(rows, name, self.args):
                self._say(line)

    def _set_precision(self) -> None:
        adapters_to_float32(self.model)
        if self.args.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=INITIAL_LOSS_SCALE)

    def _checked_rows(
        self, given: dict[str, Any], tokenizer: Any, args: Any, formatting: Any
    ) -> dict[str, Any]:
        """The rows as datasets, by the name of their argument; says what was noted of them."""
        found: dict[str, Any] = {}
        for name, rows in given.items():
            # a missing train set is an error there, and a missing eval set none
            is_left_out = rows is None and name == "eval_dataset"
            found[name] = None if is_left_out else as_dataset(rows, name)
            # rows that TRL is told to leave alone are left alone here too
            if formatting is None and not args.dataset_kwargs:
                kind, field = name.removesuffix("_dataset"), args.dataset_text_field
                found[name], note = with_messages(found[name], kind, field)
                if note:
                    self._say(note)
        check_completions(args, found["train_dataset"])
        for name, dataset in found.items():
            kind = name.removesuffix("_dataset")
            note = check_dataset(dataset, kind, tokenizer, args, formatting) if dataset else None
            one_start = None
            if dataset and tokenizer is not None and formatting is None:
                found[name], one_start = with_one_start(dataset, tokenizer, args)
            for line in filter(None, (note, one_start)):
                self._say(line)
        return found

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # the adapter was trained over a base of these precisions
        follow_map(self.model, resume_from_checkpoint, self._say)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # so was the best one, and over others if precision changed since
        follow_or_say(self.model, self.state.best_model_checkpoint, self._say)
        super()._load_best_model()

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
        if self.is_world_process_zero() and (finished := finish_killed_save(folder)):
            self._say(f"the save of {finished} was killed when all was written; it is in place now")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._checkpoint_to_go_on_from(folder)
        elif resume_from_checkpoint:
            resume_from_checkpoint = check_checkpoint(resume_from_checkpoint)
        if not resume_from_checkpoint and (aside := set_aside(folder)):
            move_aside(folder, aside)
            self._say(f"an earlier run's checkpoints and log are now in {aside}")
        if resume_from_checkpoint and (done := self._finished(resume_from_checkpoint)):
            return done
        eval_on_start = self.args.eval_on_start
        # a resumed run has its evaluation before the first step in the log already
        self.args.eval_on_start = eval_on_start and not resume_from_checkpoint
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
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
            self.args.eval_on_start = eval_on_start
            with contextlib.suppress(RuntimeError):  # of a GPU that has failed
                free_recordings(self.model)
            self._bring_embedding_back()
            self._loss_log.close()  # raises nothing: the readers have to be told in any case
            for reader in self._readers():
                reader.run_ended()

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

    def _finished(self, checkpoint: str | bool) -> TrainOutput | None:
        """Take over a checkpoint of the last step as it is; transformers would train one more."""
        state = TrainerState.load_from_json(str(Path(str(checkpoint)) / "trainer_state.json"))
        if state.global_step < self._total_steps(state):
            return None
        self._load_from_checkpoint(str(checkpoint))
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

    def _checkpoint_to_go_on_from(self, folder: str) -> str | None:
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


# the name that tutorials know; the same class
UnslothTrainer = SFTTrainer
