"""A run that overfits, with and without EarlyStopping: what is kept, and what it costs.

    python -m benchmarks.early_stopping [--model embedded] [--rows 32] [--epochs 14] [--dry]

Both runs have the same rows, seed and settings. The loss of the adapter that each leaves in memory
is measured on the eval rows after training. The picture of both goes to docs/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.table import format_table
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer, read_log
from colab_qlora.curves import diagnose, draw_curves, save_png
from colab_qlora.data import format_chat, read_records
from colab_qlora.samples import sample_path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "early_stopping.png"


def make_trainer(name: str, options: argparse.Namespace, out: str) -> SFTTrainer:
    """The trainer of one of the two runs; early stopping is all that they differ in."""
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=42
    )
    steps = -(-options.rows // 8) * options.epochs
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=format_chat(read_records(sample_path("train.jsonl"))[: options.rows]),
        eval_dataset=format_chat(read_records(sample_path("eval.jsonl"))),
        early_stopping=name == "with EarlyStopping",
        args=SFTConfig(
            output_dir=out,
            num_train_epochs=options.epochs,
            max_steps=4 if options.dry else -1,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            warmup_steps=3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=max(1, steps // 14),
            save_strategy="no",
            seed=42,
        ),
    )


def run(name: str, options: argparse.Namespace, out: str) -> tuple[dict[str, Any], Any]:
    """One row of the table, and the run's log."""
    trainer = make_trainer(name, options, out)
    began = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - began
    log = read_log(Path(out) / "loss_log.jsonl")
    found = diagnose(log)
    row = {
        "run": name,
        "steps": result.global_step,
        "seconds": round(seconds, 1),
        "eval_before": found.base_eval_loss,
        "eval_lowest": found.best_eval_loss,
        "eval_logged_last": [r["eval_loss"] for r in log if "eval_loss" in r][-1],
        "eval_of_adapter_kept": trainer.evaluate()["eval_loss"],
        "verdict": found.headline,
    }
    return row, log


def main() -> None:
    """Make both runs, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--dry", action="store_true", help="four steps each, nothing is written")
    options = parser.parse_args()
    rows, logs = [], {}
    for name in ("without", "with EarlyStopping"):
        with tempfile.TemporaryDirectory() as out:
            row, logs[name] = run(name, options, out)
        rows.append(row)
    head = tuple(rows[0])
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    print(format_table(head, cells))
    if options.dry:
        return
    readings = {name: diagnose(log) for name, log in logs.items()}
    save_png(draw_curves(logs, diagnosis=readings), PICTURE)
    print(f"wrote {record.write('early_stopping', rows, model=options.model)} and {PICTURE.name}")


if __name__ == "__main__":
    main()
