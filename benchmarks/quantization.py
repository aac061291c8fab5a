"""What methods of quantisation cost: before and after fine-tuning, seeds and rows paired.

    python -m benchmarks.quantization [--methods nf4,dynamic +10%] [--seeds 1,2,3] [--steps 32]
    python -m benchmarks.quantization --join quantization_1 quantization_2  # results of other seeds
    python -m benchmarks.quantization --dry

Every method loads the model, gets adapters, is measured, trains on the same rows in the same order
at the same learning rate, and is measured again: KL to the 16-bit model (before) and to the 16-bit
model fine-tuned from the same adapters (after), eval loss, top tokens that changed, bytes of all
weights, load seconds, seconds a step. Intervals are 95 %, by bootstrap over seeds and eval rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import record
from benchmarks.quantization_methods import METHODS, Built, Request
from benchmarks.quantization_metrics import (
    Predictions,
    divergence,
    gap_interval,
    interval,
    paired_difference,
    predictions_of,
    ratio_interval,
)
from benchmarks.table import format_table
from colab_qlora import SFTConfig, SFTTrainer
from colab_qlora.data import format_chat, read_records
from colab_qlora.quantization.calibration import labelled_batches
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.samples import sample_path

LENGTH = 256
# small models take higher rates than the 2e-4 that suits an 8B
LEARNING_RATE = 1e-3
REFERENCE, PLAIN = "16bit", "nf4"
PERCENT = 100
FIRST_STEPS = 3


def main() -> None:
    """Measure every method and seed; write after each, print the tables at the end."""
    options = _options()
    rows: list[dict[str, Any]] = []
    if options.join:
        rows, about = _joined(options.join)
        summary = summarise(rows)
        print(_table(summary) + _schedules(rows))
        print(f"wrote {record.write(options.name, rows, summary=summary, **about)}")
        return
    for seed in options.seeds:
        reference: dict[str, Predictions] = {}
        for method in options.methods:
            rows.append(_measure(method, seed, options, reference))
            shown = {k: v for k, v in rows[-1].items() if k not in ("by_row", "changes")}
            print(shown, flush=True)
            if not options.dry:
                record.write(options.name, rows, **_about(options))
    summary = summarise(rows)
    print(_table(summary) + _schedules(rows))
    if not options.dry:
        print(f"wrote {record.write(options.name, rows, summary=summary, **_about(options))}")


def _schedules(rows: list[dict[str, Any]]) -> str:
    """A line for each schedule beside the fixed map of the same bytes."""
    after: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        after.setdefault(row["method"], {})[row["seed"]] = row["by_row"]["kl_after"]
    lines = ""
    for name in [name for name in after if f"{name} schedule" in after]:
        fixed, moving = after[name], after[f"{name} schedule"]
        seeds = sorted(fixed.keys() & moving.keys())
        values = [[by_seed[seed] for seed in seeds] for by_seed in (fixed, moving)]
        lines += f"\n{name} schedule against {name}: KL after {paired_difference(*values)}"
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="to train on")
    parser.add_argument("--eval-rows", type=int, default=40)
    parser.add_argument("--dtype", help="compute dtype; default: the machine's")
    parser.add_argument("--other-calibration", action="store_true", help="data of another kind")
    parser.add_argument("--name", default="quantization", help="name of the result file")
    parser.add_argument("--join", nargs="*", metavar="NAME", help="result files of other seeds")
    parser.add_argument("--dry", action="store_true", help="one seed, one step, nothing written")
    options = parser.parse_args()
    if options.dry:
        options.seeds, options.steps, options.batch, options.eval_rows = "1", 1, 2, 2
        options.methods = "16bit,nf4,dynamic +10%"
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.methods = options.methods.split(",")
    unknown = set(options.methods) - METHODS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    # both are what the others are measured against
    options.methods = list(dict.fromkeys([REFERENCE, PLAIN, *options.methods]))
    return options


def _joined(names: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of result files that differ in their seeds alone, and what they say of themselves."""
    files = [json.loads((record.RESULTS / f"{name}.json").read_text("utf-8")) for name in names]
    about = {**files[0], "joined": names}
    for name in ("rows", "summary"):
        about.pop(name, None)
    seeds = [sorted({row["seed"] for row in file["rows"]}) for file in files]
    alike = [
        {k: v for k, v in file["options"].items() if k not in ("seeds", "name", "join")}
        for file in files
    ]
    if any(options != alike[0] for options in alike):
        raise SystemExit(f"the result files differ in more than their seeds: {alike}")
    if len({seed for own in seeds for seed in own}) < sum(map(len, seeds)):
        raise SystemExit(f"a seed is in two of the result files: {seeds}")
    return [row for file in files for row in file["rows"]], about


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {"options": vars(options), "learning_rate": LEARNING_RATE, "max_seq_length": LENGTH}


def _measure(
    method: str, seed: int, options: argparse.Namespace, reference: dict[str, Predictions]
) -> dict[str, Any]:
    train_rows = format_chat(read_records(sample_path("train.jsonl"))[: options.rows])
    eval_rows = format_chat(read_records(sample_path("eval.jsonl"))[: options.eval_rows])
    calibrated = OTHER_TEXTS if options.other_calibration else train_rows
    request = Request(options.model, LENGTH, options.dtype, calibrated, seed)
    built = METHODS[method](request)
    device = next(built.model.parameters()).device
    batches = labelled_batches(eval_rows, built.tokenizer, LENGTH, device)
    before = predictions_of(built.model, batches)
    seconds = train(built, train_rows, options, seed)
    after = predictions_of(built.model, batches)
    if method == REFERENCE:
        reference |= {"before": before, "after": after}
    kl_before, flips_before = divergence(reference["before"], before)
    kl_after, flips_after = divergence(reference["after"], after)
    state = dynamic_state(built.model)
    row = {
        "method": method,
        "seed": seed,
        "weight_bytes": built.weight_bytes,
        "load_s": round(built.load_s, 2),
        "step_s": round(seconds, 4),
        "changes": [vars(change) for change in state.history] if state else [],
        "by_row": {
            "kl_before": kl_before,
            "kl_after": kl_after,
            "loss_before": before.losses,
            "loss_after": after.losses,
            "flips_before": flips_before,
            "flips_after": flips_after,
        },
    }
    row |= {name: sum(v) / len(v) for name, v in row["by_row"].items()}  # type: ignore[attr-defined]
    del built
    gc.collect()
    return row


class _StepTimer(TrainerCallback):
    """Seconds of every optimiser step, on a GPU until its work is done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._began)

    def median(self) -> float:
        """Without the first steps."""
        return statistics.median(self.seconds[FIRST_STEPS:] or self.seconds)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def train(built: Built, rows: list[Any], options: argparse.Namespace, seed: int) -> float:
    """Train a method's model, and return the median seconds of a step."""
    schedule: dict[str, Any] = {"quantization_schedule": True} if built.has_schedule else {}
    if not built.has_schedule and dynamic_state(built.model) is not None:
        schedule = {"quantization_schedule": False}
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=built.model,
            processing_class=built.tokenizer,
            train_dataset=rows,
            live_plot=False,
            args=SFTConfig(
                output_dir=out,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=LEARNING_RATE,
                warmup_steps=3,
                lr_scheduler_type="cosine",
                logging_steps=1,
                save_strategy="no",
                seed=seed,
            ),
            **schedule,
        )
        timer = _StepTimer()
        # the first of the callbacks: what others do after a step is not counted
        trainer.callback_handler.callbacks.insert(0, timer)
        trainer.train()
        return timer.median()


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: means with intervals, and what it saves against plain NF4."""
    by_method: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        tables = by_method.setdefault(row["method"], {})
        for name, values in row["by_row"].items():
            tables.setdefault(name, []).append(values)
    plain, best = by_method[PLAIN], by_method[REFERENCE]
    found = []
    for method, tables in by_method.items():
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {
            "method": method,
            "seeds": len(own),
            "weight_mb": own[0]["weight_bytes"] / 1e6,
            "load_s": min(row["load_s"] for row in own),
            "step_s": statistics.median(row["step_s"] for row in own),
        }
        for name in tables:
            line[name] = interval(tables[name])
        for name in ("kl_before", "kl_after"):
            line[f"{name}_saved"] = ratio_interval(tables[name], plain[name])
        line["gap_closed"] = gap_interval(
            tables["loss_after"], plain["loss_after"], best["loss_after"]
        )
        found.append(line)
    return found


def _table(summary: list[dict[str, Any]]) -> str:
    head = ["method", "MB", "load s", "step s", "KL before", "saved", "KL after", "saved"]
    head += ["eval loss", "gap closed", "flips after"]
    cells = []
    for line in summary:
        row = [line["method"], f"{line['weight_mb']:.1f}", f"{line['load_s']:.1f}"]
        row += [
            f"{line['step_s']:.2f}",
            _shown(line["kl_before"]),
            _percent(line["kl_before_saved"]),
        ]
        row += [_shown(line["kl_after"]), _percent(line["kl_after_saved"])]
        row += [_shown(line["loss_after"]), _percent(line["gap_closed"])]
        cells.append([*row, _percent(line["flips_after"])])
    return format_table(head, cells)


def _shown(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


def _percent(values: tuple[float, float, float] | None) -> str:
    if values is None:
        return "no gap"
    mean, low, high = (PERCENT * value for value in values)
    return f"{mean:.0f} % ({low:.0f} to {high:.0f})"


# texts of another kind than the training rows, for the case where the two differ
OTHER_TEXTS = [
    f"def f{n}(values):\n    total = {n}\n    for index, value in enumerate(values):\n"
    f"        if index % {n + 2} == 0:\n            total += value * {n}\n    return total\n\n\n"
    f"class Box{n}:\n    def __init__(self, width, height):\n        self.width = width\n"
    f"        self.height = height + {n}\n"
    for n in range(16)
]


if __name__ == "__main__":
    main()
