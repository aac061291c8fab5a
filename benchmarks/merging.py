"""How far a merged model is from the model it was merged from, and from what it should be.

    python -m benchmarks.merging [--methods nf4,dynamic +5%] [--steps 12] [--dry]

Adapters are trained over the rounded base and merged into the 16-bit weights. Next-token KL in nat
on the eval rows, with the 16-bit model and the same adapters beside it as the truth:

    unmerged             truth || adapters over the rounded base: the quantisation error
    merged               truth || merged: one rounding of the weights to the compute dtype, both
                         models computed in float32
    merged as computed   the same with both computed in the compute dtype, which rounds every
                         activation of two models that add in another order
    merged to unmerged   unmerged || merged: the quantisation error once more
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from benchmarks import record
from benchmarks.quantization import LENGTH, train
from benchmarks.quantization_methods import METHODS, Request
from benchmarks.quantization_metrics import (
    Predictions,
    divergence,
    interval,
    predictions_of,
)
from benchmarks.table import format_table
from colab_qlora import FastLanguageModel
from colab_qlora.data import format_chat, read_records
from colab_qlora.quantization import merge_16_bit
from colab_qlora.quantization.calibration import labelled_batches
from colab_qlora.samples import sample_path


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    rows = format_chat(read_records(sample_path("train.jsonl")))
    held_out = format_chat(read_records(sample_path("eval.jsonl"))[: options.eval_rows])
    built = METHODS[method](Request(options.model, LENGTH, options.dtype, rows, 1))
    device = next(built.model.parameters()).device
    batches = labelled_batches(held_out, built.tokenizer, LENGTH, device)
    train(built, rows, options, seed=1)
    unmerged = predictions_of(built.model, batches)
    with tempfile.TemporaryDirectory() as folder:
        built.model.save_pretrained(folder)
        computed, exact = (_truth(folder, dtype, batches) for dtype in (options.dtype, "float32"))
    merged_model = merge_16_bit(built.model)
    rounded = predictions_of(merged_model, batches)
    merged = predictions_of(merged_model.float(), batches)
    return {
        "method": method,
        "unmerged": interval([divergence(exact, unmerged)[0]]),
        "merged": interval([divergence(exact, merged)[0]]),
        "merged_as_computed": interval([divergence(computed, rounded)[0]]),
        "merged_to_unmerged": interval([divergence(unmerged, merged)[0]]),
    }


def _truth(folder: str, dtype: str | None, batches: list[dict[str, torch.Tensor]]) -> Predictions:
    """Predictions of the 16-bit weights with the adapters of `folder` beside them."""
    model, _ = FastLanguageModel.from_pretrained(folder, LENGTH, dtype, load_in_4bit=False)
    return predictions_of(model, batches)


def main() -> None:
    """Measure each method, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--methods", default="nf4,dynamic +5%")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--dtype", help="compute dtype; default: the machine's")
    parser.add_argument("--dry", action="store_true", help="one step, nothing written")
    options = parser.parse_args()
    if options.dry:
        options.steps, options.batch, options.eval_rows = 1, 2, 2
    rows = [measure(method, options) for method in options.methods.split(",")]
    names = ("unmerged", "merged", "merged_as_computed", "merged_to_unmerged")
    cells = [[row["method"], *(_shown(row[name]) for name in names)] for row in rows]
    print(format_table(["method", *(name.replace("_", " ") for name in names)], cells))
    if not options.dry:
        print(f"wrote {record.write('merging', rows, options=vars(options))}")


def _shown(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.5f} ({low:.5f} to {high:.5f})"


if __name__ == "__main__":
    main()
