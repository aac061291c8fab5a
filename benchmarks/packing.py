"""Tokens a second of training on rows of Alpaca-like lengths: padded, padding-free, packed.

    python -m benchmarks.packing MODEL [--implementations ours_nockpt,hf_nockpt] [--length 2048]
    python -m benchmarks.packing --dry

The rows are random tokens whose lengths are drawn from a log-normal distribution (median 95 tokens,
sigma 0.75: a mean of 126, one row in twenty above 326), as a stand-in for short instructions with
answers. The trainer lays them out and batches them; a step is forward, backward and optimiser over
one such batch. Only tokens of rows count, padding does not. Stock layers run padded alone.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.table import format_table, number

MEDIAN_TOKENS, SIGMA, LEAST_TOKENS, MOST_TOKENS = 95, 0.75, 16, 1024
FIRST_WORD = 3
# warm-up batches (each padded one has a shape of its own), and batches that count
STEPS, STEPS_DRY = (6, 20), (1, 2)
# name -> fields of SFTConfig; the first is what the others are measured against
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded, 2 rows": {"per_device_train_batch_size": 2},
    "padded, 8 rows": {"per_device_train_batch_size": 8},
    "padding-free, 8 rows": {"per_device_train_batch_size": 8, "padding_free": True},
    "packed, 1 row": {"per_device_train_batch_size": 1, "packing": True},
    "packed, 2 rows": {"per_device_train_batch_size": 2, "packing": True},
}


def main() -> None:
    """Measure each implementation and layout, print the table and write the JSON."""
    options = _options()
    rows: list[dict[str, Any]] = []
    if options.dry:
        from benchmarks.random_model import write_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), "tiny")
            _measure_all(options, folder, rows)
    else:
        _measure_all(options, options.model, rows)
    print(_table(rows))
    model = "dry" if options.dry else Path(options.model).name
    name = options.name or f"packing_{model}"
    print(f"wrote {record.write(name, rows, model=model, length=options.length)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a checkpoint")
    parser.add_argument("--implementations", default="ours_nockpt,hf_nockpt")
    parser.add_argument("--length", type=int, default=2048, help="of a packed row, in tokens")
    parser.add_argument("--dry", action="store_true", help="a tiny model on whatever there is")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    if options.dry == bool(options.model):
        parser.error("name one model, or pass --dry")
    return options


def draw_lengths(count: int, seed: int = 0) -> list[int]:
    """Row lengths in tokens."""
    draw = random.Random(seed)
    drawn = (round(MEDIAN_TOKENS * draw.lognormvariate(0, SIGMA)) for _ in range(count))
    return [max(LEAST_TOKENS, min(MOST_TOKENS, length)) for length in drawn]


def _measure_all(options: argparse.Namespace, folder: str, rows: list[dict[str, Any]]) -> None:
    import torch

    from benchmarks.train_step_models import IMPLEMENTATIONS, Request, make_optimizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    for name in options.implementations.split(","):
        is_ours = name.startswith("ours")
        model = IMPLEMENTATIONS[name](Request(folder, dtype, longest=options.length)).train()
        optimizer = make_optimizer("flat" if is_ours else "bnb", model)
        for layout, fields in LAYOUTS.items():
            # joined rows want layers that know their borders at the speed of theirs
            if is_ours or layout.startswith("padded"):
                row = {"implementation": name, "layout": layout}
                rows.append(row | _measure(model, optimizer, fields, options, folder))
                print(rows[-1], flush=True)
        del model, optimizer
        # what refers to itself is still there, with its memory
        gc.collect()


def _measure(
    model: Any, optimizer: Any, fields: dict[str, Any], options: argparse.Namespace, folder: str
) -> dict[str, Any]:
    import torch

    from benchmarks.gpu_timing import synchronize

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warm_up, counted = STEPS_DRY if options.dry else STEPS
    batches = _batches(model, fields, options, folder, warm_up + counted)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens, places = [], [], []
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items()}
        mask = inputs.get("attention_mask")
        places.append(inputs["input_ids"].numel())
        tokens.append(places[-1] if mask is None else int(mask.sum()))
        synchronize(device)
        began = time.perf_counter()
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    found = {
        "step_ms": 1e3 * statistics.median(seconds[warm_up:]),
        "tokens_per_step": statistics.mean(tokens[warm_up:]),
        "padding_share": 1 - sum(tokens[warm_up:]) / sum(places[warm_up:]),
        "tokens_per_s": sum(tokens[warm_up:]) / sum(seconds[warm_up:]),
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def _batches(
    model: Any, fields: dict[str, Any], options: argparse.Namespace, folder: str, steps: int
) -> list[dict[str, Any]]:
    """Batches as the trainer makes them."""
    from transformers import AutoTokenizer

    from colab_qlora import SFTConfig, SFTTrainer

    draw = random.Random(1)
    words = model.config.vocab_size
    # a packed row of 2,048 tokens takes 16 of these
    lengths = draw_lengths(steps * fields["per_device_train_batch_size"] * 24)
    rows = [{"input_ids": draw.choices(range(FIRST_WORD, words), k=n)} for n in lengths]
    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(out, max_length=options.length, seed=0, **fields)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            live_plot=False,
        )
        found = []
        for batch in trainer.get_train_dataloader():
            found.append({key: value.clone() for key, value in batch.items()})
            if len(found) == steps:
                return found
    raise SystemExit(f"{len(found)} batches were made, {steps} are needed")


def _table(rows: list[dict[str, Any]]) -> str:
    first = {row["implementation"]: row["tokens_per_s"] for row in reversed(rows)}
    head = ("implementation", "layout", "step ms", "tokens", "padding", "tokens/s", "times", "GiB")
    cells = [
        [
            row["implementation"],
            row["layout"],
            number(row["step_ms"], 4),
            number(row["tokens_per_step"], 4),
            f"{row['padding_share']:.0%}",
            number(row["tokens_per_s"], 4),
            f"{row['tokens_per_s'] / first[row['implementation']]:.2f}",
            number(row["peak_gib"], 4) if row.get("peak_gib") else "-",
        ]
        for row in rows
    ]
    return format_table(list(head), cells, left=("implementation", "layout"))


if __name__ == "__main__":
    main()
