"""`SFTTrainer`: TRL's trainer, thinly wrapped, that takes today's arguments and those of older scripts.

What it adds: the older names, a precision that the machine has, adapters that stay float32, a loss
scale that skips no early step, a check of lengths and labels before the first step, a loss log on disk,
and resuming from the newest whole checkpoint.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback

from colab_qlora.errors import UserError
from colab_qlora.models.settings import settings_of
from colab_qlora.training.arguments import TRAINER_ARGUMENTS, fit_arguments
from colab_qlora.training.callbacks import LossLogCallback, ProgressLines
from colab_qlora.training.dataset_checks import as_dataset, check_dataset
from colab_qlora.training.resume import check_checkpoint, last_complete_checkpoint

# a T4's first steps overflow at the usual 65,536 and are skipped; at 8,192 they are not
INITIAL_LOSS_SCALE = 2.0**13


class SFTTrainer(trl.SFTTrainer):
    """Supervised fine-tuning. Takes all that `trl.SFTTrainer` takes, and:

    Args:
        model: what `FastLanguageModel.get_peft_model` gave (any PEFT or transformers model works).
        args: `SFTConfig` or a plain `TrainingArguments`.
        train_dataset: a datasets.Dataset or a list of dicts with "text", "messages", or "prompt" and
            "completion".
        eval_dataset: the same; if given, the first evaluation happens before the first step.
        processing_class: the tokenizer.
        tokenizer: older name of `processing_class`.
        dataset_text_field, max_seq_length, packing, dataset_num_proc: older places for the fields of
            `SFTConfig` (`max_seq_length` is `max_length` there).

    Raises:
        UserError: no rows, no labels left after truncation, an output folder that cannot be written to,
            or arguments that contradict each other.
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
        **kwargs: Any,
    ) -> None:
        self.notes: list[str] = []
        if model is None or isinstance(model, str):
            raise UserError(
                "the trainer needs a loaded model",
                got=repr(model),
                do="Load it first: FastLanguageModel.from_pretrained(...)",
            )
        if tokenizer is not None and processing_class not in (None, tokenizer):
            raise UserError("tokenizer and processing_class differ", do="Pass one of them")
        tokenizer = processing_class if processing_class is not None else tokenizer
        overrides = {
            TRAINER_ARGUMENTS[name]: kwargs.pop(name) for name in TRAINER_ARGUMENTS if name in kwargs
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        args = fit_arguments(
            args, model, has_eval_dataset=eval_dataset is not None, overrides=overrides, say=self._say
        )
        check_writable(args.output_dir)
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = None if eval_dataset is None else as_dataset(eval_dataset, "eval_dataset")
        formatting = kwargs.get("formatting_func")
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            note = check_dataset(dataset, name, tokenizer, args, formatting) if dataset else None
            if note:
                self._say(note)

        with _adapters_kept_as_they_are(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                **kwargs,
            )
        if self.args.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=INITIAL_LOSS_SCALE)
        # one kind of progress report; the notebook table would hide the training loss between evals
        for stock in (ProgressCallback, NotebookProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self._loss_log = LossLogCallback(self._run_settings())
        self.add_callback(self._loss_log)
        self.add_callback(ProgressLines())

    def _say(self, line: str) -> None:
        self.notes.append(line)
        print(f"colab_qlora: {line}", flush=True)

    def _run_settings(self) -> dict[str, Any]:
        """The hyperparameters that a reader of the curve needs, for the head of the loss log."""
        names = (
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "warmup_steps",
            "weight_decay",
            "max_length",
            "seed",
        )
        run = {name: getattr(self.args, name, None) for name in names}
        run["optim"] = str(getattr(self.args.optim, "value", self.args.optim))
        scheduler = self.args.lr_scheduler_type
        run["lr_scheduler_type"] = str(getattr(scheduler, "value", scheduler))
        settings = settings_of(self.model)
        if settings is not None:
            run |= {"model_name": settings.model_name, "compute_dtype": settings.compute_dtype}
        lora = getattr(self.model, "peft_config", {}).get("default")
        if lora is not None:
            run |= {"r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
        return run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint, if any.

        A run that is interrupted, or that runs out of memory, saves a checkpoint of the last finished
        step before it stops.

        Raises:
            UserError: out of memory or disk (with what to change), or a checkpoint that is cut short.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                self._say(f"no checkpoint in {self.args.output_dir} yet: starting with the first step")
            else:
                self._say(f"going on from {found}")
            resume_from_checkpoint = str(found) if found else None
        elif resume_from_checkpoint:
            resume_from_checkpoint = check_checkpoint(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt:
            saved = self._rescue()
            self._say(f"interrupted; {saved}")
            raise
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            saved = self._rescue()
            raise UserError(
                f"out of GPU memory at {self._batch_words()}; {saved}",
                got=reason,
                do=self._smaller_step(),
            ) from error
        except (OSError, RuntimeError) as error:
            if not _is_disk_full(error):
                raise
            raise UserError(
                f"the disk is full, so a checkpoint in {self.args.output_dir} could not be written; "
                "earlier checkpoints and the loss log are whole",
                got=str(error).splitlines()[0],
                do="Free some space (or set save_total_limit=1), then "
                "trainer.train(resume_from_checkpoint=True)",
            ) from error
        finally:
            self._loss_log.close()

    def _batch_words(self) -> str:
        return f"{self.args.per_device_train_batch_size} rows x {self.args.max_length} tokens"

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
        length = self.args.max_length
        return f"Lower max_seq_length to {length // 2}" if length else "Set max_seq_length=1024"

    def _rescue(self) -> str:
        """Save a checkpoint of the last finished step; a clause that says whether it worked."""
        if self.state.global_step == 0:
            return "no step was finished yet"
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            self._save_checkpoint(self.model, None)
        except Exception as error:  # whatever went wrong, the first error is the one to show
            return f"saving step {self.state.global_step} failed too ({type(error).__name__}: {error})"
        return f"step {self.state.global_step} is saved in {folder}"


def check_writable(folder: str | Path) -> None:
    """Create `folder` if needed and prove that a file can be written there.

    Raises:
        UserError: it cannot; with the system's reason.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to",
            got=error.strerror or str(error),
            allowed="a folder that can be created and written to",
            do="Choose another output folder",
        ) from error


@contextmanager
def _adapters_kept_as_they_are(model: Any) -> Iterator[None]:
    """Undo TRL's cast of a quantised model's adapters to bfloat16.

    float16 training cannot unscale bfloat16 gradients, and an update of 2e-4 relative to the weight is
    lost in bfloat16's 8 bits. Values are put back too, since the cast rounded them.
    """
    before = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        kept = before.get(name)
        if kept is None:
            continue
        half = kept.dtype in (torch.float16, torch.bfloat16)
        parameter.data = kept.float() if half else kept


def _is_disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) == errno.ENOSPC:
            return True
        text = str(seen)
        # safetensors and torch's archive writer report a failed write in words of their own
        if "No space left on device" in text or "file write failed" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
