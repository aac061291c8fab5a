"""200 steps of the embedded model: do ours and stock part by more than stock parts from itself?

    python -m benchmarks.curves_200 [--steps 200] [--dtype bfloat16] [--permuted 1] [--processes 4]

The trainer runs several times over the same batches in the same order, from the same adapters:

    stock      the model's own layers, in the dtype that is asked for
    permuted   the same, but the rows of every batch in another order: other orders of sums
    float32    stock in float32, which is the truth that half precision rounds
    ours       the fused layers, in the dtype that is asked for

Stock's own noise is what permuted differs from stock by, and what stock itself differs from float32
by: rounding, carried on by training. The first alone would say too little, since a permutation
leaves every row's forward pass as it was, bit by bit; only the gradients' sums change.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import record
from benchmarks.table import format_table
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer
from colab_qlora.data import format_chat, read_records
from colab_qlora.models.fuse import fused_layers, state_of
from colab_qlora.samples import sample_path

# as the recorded healthy curve: 135M parameters take a higher rate than an 8B
LEARNING_RATE = 1e-3
BATCH, ACCUMULATION = 4, 1
LENGTH = 512
STEPS, STEPS_ON_CPU = 200, 10


class Permuting:
    """A data collator that puts the rows of each training batch into another order."""

    def __init__(self, collator: Any, seed: int) -> None:
        self.collator = collator
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[Any]) -> Any:
        order = torch.randperm(len(rows), generator=self.generator).tolist()
        return self.collator([rows[index] for index in order])


def main() -> None:
    """Make the runs, print the comparison and write the JSON."""
    options = _options()
    permuted = [f"permuted {i + 1}" for i in range(options.permuted)]
    exact = "float32" if options.dtype != "float32" else "stock"
    names = dict.fromkeys(["stock", *permuted, exact, "ours"])
    runs = dict(zip(names, _run_all(list(names), options), strict=True))
    pairs = [(name, "stock") for name in (*permuted, "ours")]
    if exact != "stock":
        pairs += [(name, exact) for name in ("stock", *permuted, "ours")]
    rows = [compare(runs[name], runs[against]) for name, against in pairs]
    print(_table(rows))
    for run in runs.values():
        if run["stock_passes"]:
            print(f"{run['run']}: layers ran the model's own code: {run['stock_passes']}")
    about = {"options": vars(options), "batch": BATCH, "learning_rate": LEARNING_RATE}
    path = record.write(options.name, rows, **about, runs=list(runs.values()))
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=STEPS if has_gpu else STEPS_ON_CPU)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--permuted", type=int, default=1, help="how many permuted runs, 1 or more")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--eval-rows", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--name", default="curves_200", help="name of the result file")
    options = parser.parse_args()
    if options.permuted < 1 or options.steps < 1:
        parser.error("--permuted and --steps are 1 or more")
    return options


def _run_all(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One after the other, or several side by side: losses do not depend on it, seconds do."""
    if options.processes == 1:
        return [_run(name, options) for name in names]
    # a process that uses a GPU cannot be forked
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        return list(pool.map(_run, names, [options] * len(names)))


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    print(f"{name} ...", flush=True)
    is_ours = name == "ours"
    dtype = "float32" if name == "float32" else options.dtype
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, LENGTH, dtype)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        use_gradient_checkpointing=options.checkpointing,
        random_state=42,
        use_fused_layers=is_ours,
    )
    assert bool(fused_layers(model)) == is_ours
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(model, tokenizer, options, out)
        if name.startswith("permuted"):
            trainer.data_collator = Permuting(trainer.data_collator, seed=int(name.split()[1]))
        trainer.train()
        final = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = state_of(model)
    return {
        "run": name,
        "losses": losses,
        "eval_loss": final,
        "seconds": trainer.state.log_history[-2].get("train_runtime"),
        "stock_passes": dict(state.stock_passes) if state else {},
        "notes": trainer.notes,
    }


def _trainer(model: Any, tokenizer: Any, options: argparse.Namespace, out: str) -> SFTTrainer:
    evaluated = read_records(sample_path("eval.jsonl"))[: options.eval_rows]
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=format_chat(read_records(sample_path("train.jsonl"))),
        eval_dataset=format_chat(evaluated),
        args=SFTConfig(
            output_dir=out,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            per_device_eval_batch_size=8,
            learning_rate=LEARNING_RATE,
            warmup_steps=5,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            optim="adamw_8bit",
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=42,
        ),
    )


def compare(run: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """How far apart the losses of two runs are; a row for JSON, losses in nat."""
    pairs = zip(run["losses"], against["losses"], strict=True)
    differences = [abs(a - b) for a, b in pairs]
    return {
        "run": run["run"],
        "against": against["run"],
        "steps": len(differences),
        "first_difference": differences[0],
        "mean_difference": statistics.fmean(differences),
        "max_difference": max(differences),
        "eval_loss": run["eval_loss"],
        "eval_difference": abs(run["eval_loss"] - against["eval_loss"]),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["run", "against", "steps", "first step", "mean", "largest", "eval loss", "eval apart"]
    keys = ("first_difference", "mean_difference", "max_difference")
    cells = [
        [row["run"], row["against"], str(row["steps"])]
        + [f"{row[key]:.2e}" for key in keys]
        + [f"{row['eval_loss']:.4f}", f"{row['eval_difference']:.2e}"]
        for row in rows
    ]
    return format_table(head, cells, left=("against",))


if __name__ == "__main__":
    main()
