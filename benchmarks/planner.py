"""Plans against measurements: peak memory and step time, over batches and budgets.

    python -m benchmarks.planner MODEL [--cases 2x2048@6.8,2x2048,1x8192@7.9] [--t4] [--host-gib 24]
    python -m benchmarks.planner --dry
    python -m benchmarks.planner --draw results/planner_8b.json [--peers results/train_step_8b.json]

A case is rows x tokens, and after @ a memory budget in GiB; without one, all that is free. Each is
planned by the kit as in training and then run; the table has what was predicted beside what was
measured. A case that is predicted not to fit is not run, and is named. `--draw` writes the curve of
peak memory against step time as PNG, with the peers' points where `benchmarks.train_step` measured
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.table import format_table, number

STEPS, STEPS_DRY = (3, 5), (1, 1)
CASES = (
    "2x512,2x2048,8x2048,1x8192,"
    "2x512@7,2x2048@6.8,2x2048@8,2x2048@10,2x2048@14,2x2048@20,"
    "8x2048@9.9,8x2048@16,1x8192@7.9,1x8192@12"
)


def main() -> None:
    """Measure every case in this process, or draw what was measured."""
    options = _options()
    if options.draw:
        print(f"wrote {draw(Path(options.draw), [Path(path) for path in options.peers])}")
        return
    if options.dry:
        from benchmarks.random_model import write_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), "tiny")
            _run(options, folder, "planner_dry")
        return
    name = options.name or f"planner_{Path(options.model).name}{'_t4' * options.t4}"
    _run(options, options.model, name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a checkpoint")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--host-gib", type=float, help="pinned host memory; default: what is free")
    parser.add_argument("--t4", action="store_true", help="float16, 14.74 GiB, no flash, no cuDNN")
    parser.add_argument("--dry", action="store_true", help="a tiny model on whatever there is")
    parser.add_argument("--draw", metavar="JSON", help="draw the rows of a result file")
    parser.add_argument("--peers", nargs="*", default=[], metavar="JSON", help="of train_step")
    parser.add_argument("--steps", help="before those that count, and those: 3,5")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    if sum(map(bool, (options.model, options.dry, options.draw))) != 1:
        parser.error("name one model, or pass --dry or --draw")
    if options.dry:
        options.cases = "2x32,2x48@0.0005"
    steps = STEPS_DRY if options.dry else STEPS
    if options.steps:
        steps = tuple(int(part) for part in options.steps.split(","))
    options.steps = steps
    return options


def parse_cases(text: str) -> list[tuple[int, int, float | None]]:
    """(rows, tokens, budget in GiB or None) of each case."""
    found = []
    for case in text.split(","):
        shape, _, budget = case.partition("@")
        rows, length = (int(part) for part in shape.split("x"))
        found.append((rows, length, float(budget) if budget else None))
    return found


def _run(options: argparse.Namespace, folder: str, name: str) -> None:
    import torch

    from benchmarks.train_step_measure import imitate_t4
    from benchmarks.train_step_models import IMPLEMENTATIONS, Request, make_optimizer

    if options.t4:
        imitate_t4()
    cases = parse_cases(options.cases)
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if options.t4 else torch.bfloat16 if on_gpu else torch.float32
    request = Request(folder, dtype, longest=max(length for _, length, _ in cases))
    model = IMPLEMENTATIONS["ours_smart"](request).train()
    optimizer = make_optimizer("flat", model)
    rows: list[dict[str, Any]] = []
    path = None
    for case in cases:
        rows.append(_measure(model, optimizer, case, options.host_gib, options.steps))
        path = record.write(name, rows, model=Path(folder).name, is_t4=options.t4)
        print(" | ".join(_cells(rows[-1])), flush=True)
    print(_table(rows))
    for row in rows:
        print(f"{row['case']}:\n{row['plan']}")
    print(f"wrote {path}")


def _measure(
    model: Any,
    optimizer: Any,
    case: tuple[int, int, float | None],
    host_gib: float | None,
    steps: tuple[int, int],
) -> dict[str, Any]:
    import torch

    from benchmarks.train_step_measure import (
        free_memory,
        is_recorded,
        make_step,
        time_unless_full,
    )
    from colab_qlora.activations.plan import BudgetTooSmall
    from colab_qlora.models.adapters import set_gradient_checkpointing
    from colab_qlora.models.smart import runtime_of

    length, budget = case[1], case[2]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row: dict[str, Any] = {
        "case": f"{case[0]}x{length}" + (f" @ {budget} GiB" if budget else ""),
        "budget_gib": budget,
        "tokens": case[0] * length,
    }
    optimizer.zero_grad(set_to_none=True)
    set_gradient_checkpointing(model, "smart", budget, host_gib)
    free_memory(model, device)
    step = make_step(model, optimizer, case[:2], device)
    began = time.perf_counter()
    try:
        found = time_unless_full(step, steps, row["tokens"], device)
    except BudgetTooSmall as error:
        return row | {"fits": False, "plan": str(error)}
    runtime = runtime_of(model)
    assert runtime is not None
    plan = next(iter(runtime.plans.values()))
    assert plan.step is not None
    return row | {
        "fits": True,
        "out_of_memory": found is None,
        "predicted_ms": 1e3 * plan.step_seconds,
        "predicted_peak_gib": plan.peak_memory_gib,
        # "host_gib" of what was found is what the process had in all
        "pinned_gib": plan.step.plan.host_bytes / 2**30,
        "recompute_share": plan.step.recompute_share,
        "held_layers": plan.step.held_layers,
        "held_gib": plan.step.held_bytes / 2**30,
        "seconds_in_all": time.perf_counter() - began,
        "plan": plan.step.plan.describe(),
        **{f"{name}_bytes": moment.bytes for name, moment in plan.step.moments.items()},
        "is_recorded": is_recorded(model),
        "profile": dataclasses.asdict(plan.step.batch.profile),
        **(found or {}),
    }


_HEAD = (
    *("case", "peak GiB", "predicted", "off by", "step ms", "predicted", "off by"),
    *("recomputed", "recorded"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    if not row["fits"]:
        return [row["case"], "predicted not to fit", *["-"] * 7]
    if row["out_of_memory"]:
        return [row["case"], "OUT OF MEMORY", number(row["predicted_peak_gib"]), *["-"] * 6]
    peak, ms = row["peak_gib"], row["step_ms"]
    return [
        row["case"],
        number(peak, 4),
        number(row["predicted_peak_gib"], 4),
        f"{row['predicted_peak_gib'] / peak - 1:+.1%}" if peak else "-",
        number(ms, 4),
        number(row["predicted_ms"], 4),
        f"{row['predicted_ms'] / ms - 1:+.1%}",
        f"{row['recompute_share']:.0%}",
        "yes" if row["is_recorded"] else "no",
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    return format_table(list(_HEAD), [_cells(row) for row in rows])


PEER_NAMES = {
    "hf": "transformers",
    "hf_nockpt": "transformers, all kept",
    "hf_liger": "with Liger",
    "unsloth": "Unsloth",
    "unsloth_nockpt": "Unsloth, all kept",
}


def draw(path: Path, peers: list[Path]) -> Path:
    """Write the curve of peak memory against step time beside the JSON, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = json.loads(path.read_text(encoding="utf-8"))
    shapes: dict[str, list[tuple[float, float]]] = {}
    for row in content["rows"]:
        if row["fits"] and not row["out_of_memory"] and row["peak_gib"]:
            shape = row["case"].split(" ")[0]
            shapes.setdefault(shape, []).append((row["peak_gib"], row["step_ms"]))
    if not shapes:
        raise SystemExit(f"{path} has no measured case with a GPU's peak")
    # of a peer in several files the first
    points = {
        (row["implementation"], row["shape"]): row
        for peer in reversed(peers)
        for row in json.loads(peer.read_text(encoding="utf-8"))["rows"]
        if row["shape"] in shapes and not row["out_of_memory"]
    }
    columns = min(2, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (shape, curve) in enumerate(shapes.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.plot(*zip(*sorted(curve), strict=True), "o-", color="#0072b2", label="planned")
        # what the kit does without a plan lies on the curve's ends, or near it
        others = [row for (name, at), row in points.items() if at == shape and name in PEER_NAMES]
        for row in others:
            axes.plot(row["peak_gib"], row["step_ms"], "s", color="#555555")
        axes.set(title=f"{shape} tokens", xlabel="peak GPU memory in GiB", ylabel="ms a step")
        axes.margins(x=0.1, y=0.15)
        axes.set_ylim(bottom=0)
        middle = sum(axes.get_xlim()) / 2
        for row in others:
            is_left = row["peak_gib"] > middle
            axes.annotate(
                PEER_NAMES[row["implementation"]],
                (row["peak_gib"], row["step_ms"]),
                (-7 if is_left else 7, 0),
                textcoords="offset points",
                ha="right" if is_left else "left",
                va="center",
            )
        axes.legend(loc="lower left", frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{content['model']}, {content['machine']}, {content['date']}")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


if __name__ == "__main__":
    main()
