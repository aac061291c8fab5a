"""`python -m colab_qlora plan MODEL`: a memory plan on the command line."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from colab_qlora.activations.memory_plan import MemoryPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument(
        "model", help='"embedded", a folder, a well-known model such as llama-3-8b, or a hub id'
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--gpu", help="T4, L4, A100, H100; default: this machine's, or a T4")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--memory-budget-gib", type=float, help="GPU memory that torch may use")
    parser.add_argument("--host-budget-gib", type=float, help="host memory to pin; 0: none")
    parser.add_argument("--rows", type=int, help="rows of the data set, for the hours it takes")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows")
    parser.add_argument("--out", metavar="PNG", help="write the picture to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits, 1 if it does not."""
    from colab_qlora.models.memory_planning import plan_memory

    if options.rank < 1:
        raise UserError("--rank is not a rank", got=options.rank, allowed="1 or more")
    plan = plan_memory(
        options.model,
        batch_size=options.batch,
        max_seq_length=options.seq,
        gpu=options.gpu,
        r=options.rank,
        memory_budget_gib=options.memory_budget_gib,
        host_budget_gib=options.host_budget_gib,
    )
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print(plan)
        if options.rows is not None and plan.fits:
            hours = plan.hours(options.rows, options.epochs)
            print(f"{options.rows:,} rows, {options.epochs:g} epochs: {hours:.2f} hours")
    if options.out:
        _write_picture(plan, Path(options.out))
    return 0 if plan.fits else 1


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan's figures, for another program."""
    step = plan.step
    change = plan.cheapest_change
    return {
        "model": plan.workload.model_name,
        "batch_size": plan.workload.batch_size,
        "max_seq_length": plan.workload.seq_length,
        "gpu": plan.machine.profile.name,
        "rates": plan.machine.profile.source,
        "fits": plan.fits,
        "memory_budget_gib": plan.machine.budget_bytes / 2**30,
        "peak_memory_gib": plan.peak_memory_gib,
        "host_memory_gib": step.plan.host_bytes / 2**30 if step else None,
        "step_seconds": None if math.isnan(plan.step_seconds) else plan.step_seconds,
        "recompute_share": step.recompute_share if step else None,
        "layers": step.plan.describe().splitlines() if step else None,
        "largest_batch_size": plan.largest_batch_size,
        "longest_seq_length": plan.longest_seq_length,
        "cheapest_change": change.text if change else None,
    }


def _write_picture(plan: MemoryPlan, path: Path) -> None:
    try:
        plan.draw().savefig(path)
    except OSError as error:
        raise UserError(
            f"the picture cannot be written to {path}", got=error.strerror, do="Name another file"
        ) from error
    except ValueError as error:  # matplotlib does not know the ending
        raise UserError(
            f"{path} is no picture", got=path.suffix or "no ending", allowed=".png, .svg, .pdf"
        ) from error
