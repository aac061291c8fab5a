"""Time one training step (forward, backward, 8-bit AdamW) of the kit and of its peers.

    python -m benchmarks.train_step MODEL [--shapes 2x2048,1x8192] [--t4] [--lean] [--profile]
    python -m benchmarks.train_step --dry

MODEL is a folder that `benchmarks.random_model` wrote, or another checkpoint. Each implementation
has a process of its own: stock transformers with PEFT and bitsandbytes (hf, hf_nockpt), the same
with Liger (hf_liger), Unsloth (unsloth, unsloth_nockpt), and the kit with only the layers' inputs
kept (ours), planned for what is free or for `--budget-gib` (ours_smart), with all kept
(ours_nockpt), and that with dynamic quantisation at +10 % (ours_dynamic; where it is named).
`--dry` runs a tiny random model in this process, on a CPU if there is no GPU, to prove the script.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.children import emit, run_child
from benchmarks.peers import PEERS, is_installed, versions
from benchmarks.table import format_table, number

MODULE = "benchmarks.train_step"
NAMES = (
    *("hf", "hf_nockpt", "hf_liger", "unsloth", "unsloth_nockpt"),
    *("ours", "ours_smart", "ours_nockpt"),
)
ALL_NAMES = (*NAMES, "ours_dynamic")
DRY_NAMES = "hf,ours,ours_nockpt,ours_dynamic"
# warm-up steps, and steps that count
STEPS, STEPS_DRY = (3, 6), (1, 2)
TIMEOUT_S = 400


def main() -> None:
    """Measure, print a row as soon as it is there, write the JSON after each implementation."""
    options = _options()
    if options.child:
        _measure(options, options.names[0], emit)
        return
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    path = None
    for name in options.names:
        problem = _run(options, name, rows)
        if problem:
            problems[name] = problem
            print(f"{name}: {problem}", flush=True)
        path = record.write(
            options.name,
            rows,
            model=Path(options.model).name,
            is_t4=options.t4,
            problems=problems,
            peers=versions(),
        )
    print(_table(rows))
    for row in rows:
        _print_details(row)
    print(f"wrote {path}")
    if not rows:
        raise SystemExit("nothing was measured")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a checkpoint")
    parser.add_argument("--implementations", help="with commas between: " + ", ".join(ALL_NAMES))
    parser.add_argument("--shapes", help="rows x tokens, such as 2x2048,8x2048,1x8192")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--optimizer", default="flat", choices=["flat", "bnb"], help="of ours")
    parser.add_argument("--t4", action="store_true", help="float16, 14.74 GiB, no flash, no cuDNN")
    parser.add_argument("--lean", action="store_true", help="ours with its low-memory settings")
    parser.add_argument("--budget-gib", type=float, help="GPU memory for ours_smart")
    parser.add_argument("--host-gib", type=float, help="pinned host memory for ours_smart")
    parser.add_argument("--no-graphs", action="store_true", help="ours, no pass recorded")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels")
    parser.add_argument("--dry", action="store_true", help="a tiny model, in this process")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    _fill_in(parser, options)
    return options


def _fill_in(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Defaults that depend on other options, and checks."""
    if options.dry == bool(options.model):
        parser.error("name one model, or pass --dry")
    options.model = options.model or "tiny"
    if Path(options.model).is_dir():  # a child runs in another folder
        options.model = str(Path(options.model).resolve())
    options.names = options.implementations or (DRY_NAMES if options.dry else ",".join(NAMES))
    options.names = options.names.split(",")
    unknown = set(options.names) - set(ALL_NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ALL_NAMES)}")
    options.shapes = options.shapes or ("2x32" if options.dry else "2x2048,8x2048,1x8192")
    usual = "float16" if options.t4 else "float32" if options.dry else "bfloat16"
    options.dtype = options.dtype or usual
    marks = [mark for mark in ("t4", "lean", "dry") if getattr(options, mark)]
    marks += ["no_graphs"] * options.no_graphs
    marks += [options.optimizer] if options.optimizer != "flat" else []
    options.name = options.name or "_".join(["train_step", Path(options.model).name, *marks])
    if not options.dry and not options.child:
        from benchmarks.gpu_timing import pick_device

        pick_device(MODULE, is_dry=False)


def _run(options: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> str:
    """Measure one implementation; what went wrong, if anything."""
    peer = next((peer for peer in PEERS if peer in name), None)
    if peer is not None and not is_installed(peer):
        return "not installed"

    def take(row: dict[str, Any]) -> None:
        rows.append(row)
        print(_line(row), flush=True)

    if options.dry:
        with tempfile.TemporaryDirectory() as folder:
            from benchmarks.random_model import write_checkpoint

            write_checkpoint(Path(folder), "tiny")
            options.model = folder
            _measure(options, name, take)
            options.model = "tiny"
        return ""
    arguments = ["--child", "--implementations", name, "--shapes", options.shapes]
    arguments += ["--dtype", options.dtype, "--optimizer", options.optimizer]
    if options.budget_gib is not None:
        arguments += ["--budget-gib", str(options.budget_gib)]
    if options.host_gib is not None:
        arguments += ["--host-gib", str(options.host_gib)]
    arguments += [f"--{flag}" for flag in ("t4", "lean", "profile") if getattr(options, flag)]
    arguments += ["--no-graphs"] * options.no_graphs
    return run_child(MODULE, [*arguments, options.model], timeout_s=TIMEOUT_S, on_row=take)[1]


def _measure(options: argparse.Namespace, name: str, take: Any) -> None:
    import torch

    from benchmarks.train_step_measure import imitate_t4, measure_implementation
    from benchmarks.train_step_models import Request

    if options.t4:
        imitate_t4()
    shapes = []
    for shape in options.shapes.split(","):
        batch, length = (int(number) for number in shape.split("x"))
        shapes.append((batch, length))
    is_ours = name.startswith("ours")
    request = Request(
        folder=options.model,
        dtype=getattr(torch, options.dtype),
        longest=max(length for _, length in shapes),
        is_lean=options.lean and is_ours,
        memory_budget_gib=options.budget_gib,
        host_budget_gib=options.host_gib,
        records=not options.no_graphs,
    )
    optimizer = options.optimizer if is_ours else "bnb"
    steps = STEPS_DRY if options.dry else STEPS
    measure_implementation(
        name, request, optimizer, shapes, steps, take, shows_kernels=options.profile
    )


_COLUMNS = {
    "step ms": "step_ms",
    "tokens/s": "tokens_per_s",
    "peak GiB": "peak_gib",
    "base GiB": "base_gib",
    "first s": "first_step_s",
    "load s": "load_s",
    "host ms": "host_ms",
    "GPU ms": "device_ms",
    "launches/layer": "launches_per_layer",
    "loss": "loss",
}


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["implementation", "optimizer", "shape", *_COLUMNS]
    return format_table(head, [_cells(row) for row in rows], left=("optimizer", "shape"))


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["implementation"] + (", lean" if row["is_lean"] else "")
    cells = [name, row["optimizer"], row["shape"]]
    if row["out_of_memory"]:
        return [*cells, "out of memory", *["-"] * (len(_COLUMNS) - 1)]
    return cells + [number(row.get(key), 4) for key in _COLUMNS.values()]


def _line(row: dict[str, Any]) -> str:
    cells = _cells(row)
    named = [f"{name} {cell}" for name, cell in zip(_COLUMNS, cells[3:], strict=True)]
    return " | ".join(cells[:3] + (cells[3:4] if row["out_of_memory"] else named))


def _print_details(row: dict[str, Any]) -> None:
    where = f"{row['implementation']} {row['shape']}"
    if row.get("is_recorded"):
        print(f"{where}: layers recorded as CUDA graphs, {row['reserved_gib']:.2f} GiB reserved")
    for reason, count in row["stock_passes"].items():
        print(f"{where}: {count} layer passes ran the model's own code: {reason}")
    for ms, count, kernel in row.get("kernels", []):
        print(f"{where}: {ms:8.2f} ms {count:5d}x  {kernel[:100]}")


if __name__ == "__main__":
    main()
