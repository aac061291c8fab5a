"""Make real runs whose cause is known, for the tests of the diagnosis.

    python -m benchmarks.record_corpus [NAME ...] [--model embedded] [--set small|large] [--dry]

Each run fine-tunes the model with the kit, with one thing done wrong or nothing, and leaves the log
that the trainer wrote in tests/curves/corpus/; its head says the cause. `small` takes a CPU about
two minutes a run; `large` is meant for a GPU: longer runs, more seeds, float16 that overflows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer, UserError, read_log
from colab_qlora.data import format_chat, read_records
from colab_qlora.samples import sample_path

CORPUS = Path(__file__).resolve().parent.parent / "tests" / "curves" / "corpus"


@dataclass(frozen=True)
class Run:
    """What makes a run come out as it does; `cause` is the verdict that a reader should reach.

    Attributes:
        cause: a name of `colab_qlora.curves.verdicts.NAMES`.
        rows: training rows, from the start of the samples.
        epochs: passes over them.
        learning_rate: peak; small models take higher ones.
        batch: rows a step.
        evals: evaluations after step 0; 0 for a run without an eval set.
        leaked: eval rows that stand among the training rows.
        frozen: whether the adapters are kept from training.
        dropout: LoRA dropout.
        fp16_scale: a fixed loss scale that overflows float16, on a GPU.
        every: steps that one logged loss is the mean of.
        schedule: the learning rate's.
        seed: of the order of rows and of the adapters.
    """

    cause: str
    rows: int = 200
    epochs: int = 1
    learning_rate: float = 1e-3
    batch: int = 4
    evals: int = 6
    leaked: int = 0
    frozen: bool = False
    dropout: float = 0.0
    fp16_scale: float = 0.0
    every: int = 1
    schedule: str = "cosine"
    seed: int = 42


SMALL = {
    "healthy": Run("healthy"),
    "healthy_seed_7": Run("healthy", learning_rate=2e-3, seed=7),
    "healthy_two_epochs": Run("healthy", rows=120, epochs=2, learning_rate=5e-4),
    "healthy_no_eval": Run("healthy", evals=0, seed=3),
    "healthy_batch_8": Run("healthy", batch=8, epochs=2, learning_rate=2e-3),
    "healthy_dropout": Run("healthy", dropout=0.1, learning_rate=1.5e-3, seed=11),
    "healthy_logged_by_five": Run("healthy", every=5, evals=6, seed=5),
    "rate_30_times": Run("worse than base", learning_rate=3e-2, rows=160),
    "rate_100_times": Run("worse than base", learning_rate=1e-1, rows=160),
    "rate_30_times_constant": Run(
        "worse than base", learning_rate=3e-2, rows=160, schedule="constant"
    ),
    "rate_too_low": Run("not learning", learning_rate=1e-7, rows=160),
    "frozen": Run("not learning", frozen=True, rows=160),
    "epochs_16": Run("overfitting", rows=24, epochs=16, learning_rate=2e-3, evals=12),
    "epochs_12": Run(
        "overfitting", rows=32, epochs=12, learning_rate=2e-3, evals=12, seed=8, schedule="constant"
    ),
    "tiny_data": Run("overfitting", rows=8, epochs=40, learning_rate=1e-3, evals=16),
    "tiny_data_no_eval": Run("memorising", rows=24, epochs=6, learning_rate=2e-3, evals=0),
    "leaked": Run("suspected leakage", rows=24, epochs=6, leaked=24, evals=8, learning_rate=2e-3),
    "leaked_seed_9": Run(
        "suspected leakage", rows=32, epochs=5, leaked=32, evals=8, learning_rate=1.5e-3, seed=9
    ),
}


def large_runs() -> Iterator[tuple[str, Run]]:
    """The small ones with three seeds each, and those that need a GPU."""
    for name, run in SMALL.items():
        for seed in (1, 2, 3):
            yield f"{name}_gpu_{seed}", replace(run, seed=seed)
    yield "overflow", Run("non-finite", fp16_scale=2.0**40)
    yield "overflow_constant", Run("non-finite", fp16_scale=2.0**60, schedule="constant")


def make_run(name: str, run: Run, model_name: str, folder: Path, max_steps: int = -1) -> Path:
    """Make one run and put its log into the folder."""
    print(f"{name}: {run}", flush=True)
    # a model in bfloat16 would train without a loss scaler, whatever the arguments say
    dtype = "float16" if run.fp16_scale else None
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, 128, dtype)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=run.dropout,
        use_gradient_checkpointing=False,
        random_state=run.seed,
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(model, tokenizer, run, out, max_steps)
        if run.frozen:
            # what adapters do that the loss does not depend on: everything runs, nothing learns
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.register_hook(torch.zeros_like)
        if run.fp16_scale:
            _overflow(trainer, run.fp16_scale)
        try:
            trainer.train()
        except UserError as error:  # a run that stops itself is what some of them are for
            print(f"{name}: {error}", flush=True)
        text = (Path(out) / "loss_log.jsonl").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.jsonl"
    head, *lines = text.splitlines()
    content = json.loads(head)
    content["run"] |= {"cause": run.cause, "made_by": asdict(run)}
    target.write_text("\n".join([json.dumps(content), *lines]) + "\n", encoding="utf-8")
    return target


def _trainer(model: Any, tokenizer: Any, run: Run, out: str, max_steps: int) -> SFTTrainer:
    rows = format_chat(read_records(sample_path("train.jsonl"))[: run.rows])
    eval_rows = format_chat(read_records(sample_path("eval.jsonl"))[:16])
    if run.leaked:
        # the eval set is cut from the training rows, as a careless split does
        eval_rows = rows[: min(16, run.leaked)]
    steps = -(-len(rows) // run.batch) * run.epochs
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=eval_rows if run.evals else None,
        args=SFTConfig(
            output_dir=out,
            num_train_epochs=run.epochs,
            max_steps=max_steps,
            per_device_train_batch_size=run.batch,
            per_device_eval_batch_size=8,
            learning_rate=run.learning_rate,
            warmup_steps=3,
            lr_scheduler_type=run.schedule,
            weight_decay=0.01,
            optim="adamw_8bit",
            logging_steps=run.every,
            eval_strategy="steps" if run.evals else "no",
            eval_steps=max(1, steps // run.evals) if run.evals else None,
            save_strategy="no",
            seed=run.seed,
            fp16=bool(run.fp16_scale) or None,
        ),
    )


def _overflow(trainer: SFTTrainer, scale: float) -> None:
    trainer.accelerator.scaler = torch.amp.GradScaler(
        "cuda", init_scale=scale, backoff_factor=0.999999
    )


def main() -> None:
    """Make the runs that are named, or all of a set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="names of runs; all of the set if none is named")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--set", choices=("small", "large"), default="small", dest="which")
    parser.add_argument("--dry", action="store_true", help="two steps of one run, kept nowhere")
    options = parser.parse_args()
    runs = SMALL if options.which == "small" else dict(large_runs())
    if options.dry:
        with tempfile.TemporaryDirectory() as folder:
            made = make_run("healthy", SMALL["healthy"], options.model, Path(folder), max_steps=2)
            print(f"{len(read_log(made).records)} records")
        return
    for name in options.runs or list(runs):
        make_run(name, runs[name], options.model, CORPUS)
    rows = corpus_rows()
    for row in rows:
        print(row)
    print(f"wrote {record.write('record_corpus', rows)}")


def corpus_rows() -> list[dict[str, Any]]:
    """One row for each run of the corpus, made now or earlier."""
    logs = [(path.stem, read_log(path)) for path in sorted(CORPUS.glob("*.jsonl"))]
    return [
        {
            "run": name,
            "cause": log.run["cause"],
            "model": log.run.get("model_name"),
            "steps": log.records[-1]["step"],
            "seconds": log.records[-1]["seconds"],
        }
        for name, log in logs
    ]


if __name__ == "__main__":
    main()
