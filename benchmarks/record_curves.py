"""Record three of the loss curves of data_samples/curves/ with real runs of the kit.

    python -m benchmarks.record_curves [NAME ...] [--model embedded]

Each run fine-tunes the model on data_samples/train.jsonl and evaluates on eval.jsonl. The log that
the trainer wrote is the sample; nothing is edited but the output folder's name, which is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer, read_log
from colab_qlora.data import format_chat, read_records
from colab_qlora.samples import sample_path


@dataclass(frozen=True)
class Run:
    """What makes a run come out as it does."""

    rows: int
    epochs: int
    learning_rate: float
    eval_steps: int
    max_steps: int = -1


RUNS = {
    # small models take higher learning rates: 1e-3 for 135M parameters, where an 8B takes 2e-4
    "healthy": Run(rows=256, epochs=2, learning_rate=1e-3, eval_steps=8),
    # few rows, seen often: the model learns them by heart
    "overfitting": Run(rows=32, epochs=14, learning_rate=2e-3, eval_steps=4),
    # twenty times the healthy run's
    "learning_rate_too_high": Run(
        rows=256, epochs=2, learning_rate=2e-2, eval_steps=8, max_steps=40
    ),
}


def record_curve(name: str, model_name: str) -> dict:
    """Make one run and put its log into data_samples/curves/."""
    run = RUNS[name]
    print(f"{name}: {run}", flush=True)
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=512)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=42
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=format_chat(read_records(sample_path("train.jsonl"))[: run.rows]),
            eval_dataset=format_chat(read_records(sample_path("eval.jsonl"))),
            args=_arguments(run, out),
        )
        trainer.train()
        target = sample_path() / "curves" / f"{name}.jsonl"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(out) / "loss_log.jsonl", target)
    return {"run": name, **_summary(target)}


def _arguments(run: Run, out: str) -> SFTConfig:
    return SFTConfig(
        output_dir=out,
        num_train_epochs=run.epochs,
        max_steps=run.max_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=8,
        learning_rate=run.learning_rate,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        optim="adamw_8bit",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=run.eval_steps,
        save_strategy="no",
        seed=42,
    )


def _summary(target: Path) -> dict:
    """Steps, losses and seconds of a recorded log."""
    records = read_log(target).records
    evals = [r["eval_loss"] for r in records if "eval_loss" in r]
    losses = [r["loss"] for r in records if "loss" in r]
    return {
        "steps": len(losses),
        "train_first": losses[0],
        "train_last": losses[-1],
        "eval_before": evals[0],
        "eval_best": min(evals),
        "eval_last": evals[-1],
        "seconds": records[-1]["seconds"],
    }


def main() -> None:
    """Record the runs that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--model", default="embedded")
    options = parser.parse_args()
    rows = [record_curve(name, options.model) for name in options.runs]
    for row in rows:
        print(row)
    earlier = record.RESULTS / "record_curves.json"
    if earlier.is_file():  # runs that are not recorded again keep their row
        kept = json.loads(earlier.read_text(encoding="utf-8"))["rows"]
        rows = [r for r in kept if r["run"] not in options.runs] + rows
    print(f"wrote {record.write('record_curves', rows, model=options.model)}")


if __name__ == "__main__":
    main()
