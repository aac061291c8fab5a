"""Every op of the kit against torch, Liger and Unsloth: ms, GB/s, share of the copy bandwidth.

    python -m benchmarks.kernels [--dtype bfloat16] [--ops rms_norm,attention] [--no-peers]
    python -m benchmarks.kernels --dry

Needs a CUDA GPU; `--dry` runs all of it at tiny sizes on the CPU, Triton off and without peers, to
prove the script. Ours, torch and bitsandbytes run in one process, and each peer that is installed
in one of its own (Unsloth patches transformers when it is imported). GB/s come from the bytes that
the op's module states, the shares are of the rate of a copy of 1 GiB and of one that moves as many
bytes as the op (a small one never comes near the large one's rate), and errors are relative to
float64 (`kernel_case.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.children import emit, run_child
from benchmarks.peers import PEERS, is_installed, versions
from benchmarks.table import exponent, format_table, number

MODULE = "benchmarks.kernels"
TIMEOUT_S = 400


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = _options()
    if options.side:
        _measure_side(options, options.side, emit)
        return
    if not options.dry:
        from benchmarks.gpu_timing import pick_device

        pick_device(MODULE, is_dry=False)
    rows: list[dict[str, Any]] = []
    problems = _run_all(options, rows)
    print(_text(rows, problems))
    print(f"wrote {_write(options, rows, problems)}")
    if "here" in problems:
        raise SystemExit("the process that measures the kit's own kernels did not end well")


def _write(
    options: argparse.Namespace, rows: list[dict[str, Any]], problems: dict[str, str]
) -> Path:
    return record.write(
        options.name or f"kernels_{options.dtype}{'_dry' if options.dry else ''}",
        [row for row in rows if "op" in row],
        optimizers=[row for row in rows if "optimizer" in row],
        copy_gb_s=_copy_gb_s(rows),
        problems=problems,
        peers=versions(),
    )


def _copy_gb_s(rows: list[dict[str, Any]]) -> float | None:
    return next((row["copy_gb_s"] for row in rows if "copy_gb_s" in row), None)


def _run_all(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Fill in the rows of all processes, merged; returns what went wrong in each of them.

    What is there is shown and written at once, so that a run that is cut short has not been for
    nothing.
    """
    if options.dry:
        _measure_side(options, "here", rows.append)
        return dict.fromkeys(PEERS, "not asked for")
    arguments = ["--dtype", options.dtype, "--ops", options.ops]
    problems: dict[str, str] = {}
    for side in ("here", *PEERS):
        if side != "here" and (options.no_peers or not is_installed(side)):
            problems[side] = "not asked for" if options.no_peers else "not installed"
            continue
        print(f"measuring {side} ...", flush=True)

        def take(row: dict[str, Any], side: str = side) -> None:
            _merge(rows, [row])
            print(f"{side}: {_line(row)}", flush=True)
            _write(options, rows, problems)

        command = ["--side", side, *arguments]
        problem = run_child(MODULE, command, timeout_s=TIMEOUT_S, on_row=take)[1]
        if problem:
            problems[side] = problem
    return problems


def _line(row: dict[str, Any]) -> str:
    if "sides" not in row:
        return str(row)
    times = ", ".join(f"{name} {_ms(side)}" for name, side in row["sides"].items())
    return f"{row['op']} {row['size']}: {times} ms"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, Triton off")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--ops", default="", help="only ops that start so, with commas between")
    parser.add_argument("--no-peers", action="store_true", help="leave Liger and Unsloth out")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--side", choices=["here", *PEERS], help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure_side(
    options: argparse.Namespace, side: str, take: Callable[[dict[str, Any]], None]
) -> None:
    """The part of one process: ours, torch and bitsandbytes ("here"), or one of the peers."""
    if side == "unsloth":
        import unsloth  # noqa: F401  # it wants to be imported before transformers
    import torch

    from benchmarks.gpu_timing import Timer, pick_device
    from benchmarks.kernel_case import measure
    from benchmarks.kernel_optimizer import measure_optimizers
    from colab_qlora.kernels.backend import use_backend

    device = pick_device(MODULE, is_dry=options.dry)
    timer, dtype = Timer(device), getattr(torch, options.dtype)
    prefixes = tuple(options.ops.split(","))
    with use_backend("torch") if options.dry else nullcontext():
        if side == "here":
            take({"copy_gb_s": timer.copy_gb_s()})
        for case in _all_cases(device, dtype, is_dry=options.dry):
            own = [name for name in case.sides if name not in PEERS]
            sides = own if side == "here" else [name for name in case.sides if name == side]
            if sides and case.op.startswith(prefixes):
                row = measure(case, sides, timer, dtype)
                if side == "here" and row["bytes_moved"]:
                    row["equal_copy_ms"] = timer.copy_ms(row["bytes_moved"])
                take(row)
        if side == "here" and "adamw".startswith(prefixes):
            for row in measure_optimizers(timer, is_dry=options.dry):
                take(row)


def _all_cases(device: Any, dtype: Any, *, is_dry: bool) -> list[Any]:
    from benchmarks import (
        kernel_cases_attention,
        kernel_cases_head,
        kernel_cases_lora,
        kernel_cases_norm,
        kernel_cases_rows,
        kernel_cases_weights,
    )

    return [
        *kernel_cases_norm.cases(is_dry=is_dry),
        *kernel_cases_rows.cases(is_dry=is_dry),
        *kernel_cases_lora.cases(device, is_dry=is_dry),
        *kernel_cases_weights.cases(is_dry=is_dry),
        *kernel_cases_head.cases(is_dry=is_dry),
        *kernel_cases_attention.cases(device, dtype, is_dry=is_dry),
    ]


def _merge(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Put a process's results into the rows of the same op and size."""
    at = {(row["op"], row["size"]): row for row in rows if "op" in row}
    for other in others:
        row = at.get((other.get("op"), other.get("size")))
        if row is None:
            rows.append(other)
        else:
            row["sides"] |= other["sides"]


def _text(rows: list[dict[str, Any]], problems: dict[str, str]) -> str:
    copy_gb_s = _copy_gb_s(rows)
    optimizers = [row for row in rows if "optimizer" in row]
    cases = [row for row in rows if "op" in row]
    lines = [f"copy bandwidth: {number(copy_gb_s)} GB/s", ""]
    if cases:
        lines += [_case_table(cases, copy_gb_s, problems), ""]
    if optimizers:
        lines += [_optimizer_table(optimizers), ""]
    lines += [
        f"{row['op']} {row['size']}, {name}: {side['failed']}"
        for row in cases
        for name, side in row["sides"].items()
        if "failed" in side
    ]
    lines += [f"{side}: {problem}" for side, problem in problems.items()]
    return "\n".join(lines)


def _case_table(
    cases: list[dict[str, Any]], copy_gb_s: float | None, problems: dict[str, str]
) -> str:
    head = ["op", "size", "dtype", "ours ms", "GB/s", "of copy", "of equal copy"]
    head += ["TFLOP/s", "torch ms", "liger ms", "unsloth ms", "error", "torch's", "others"]
    rows = [_cells(row, copy_gb_s, problems) for row in cases]
    return format_table(head, rows, left=("size", "dtype", "others"))


def _cells(row: dict[str, Any], copy_gb_s: float | None, problems: dict[str, str]) -> list[str]:
    sides = row["sides"]
    ours = sides.get("ours", {})
    ms = ours.get("ms")
    speed = row["bytes_moved"] / ms / 1e6 if ms and row["bytes_moved"] else None
    rate = row["operations"] / ms / 1e9 if ms and row["operations"] else None
    share = f"{speed / copy_gb_s:.0%}" if speed and copy_gb_s else "-"
    named = ("ours", "torch", *PEERS)
    others = [f"{name} {_ms(side)}" for name, side in sides.items() if name not in named]
    return [
        row["op"],
        row["size"],
        row["dtype"],
        _ms(ours),
        number(speed),
        share,
        f"{row['equal_copy_ms'] / ms:.0%}" if ms and "equal_copy_ms" in row else "-",
        number(rate),
        _ms(sides.get("torch")),
        *(_ms(sides.get(peer), problems.get(peer, "")) for peer in PEERS),
        exponent(ours.get("error")),
        exponent(sides.get("torch", {}).get("error")),
        "; ".join(filter(None, [row["notes"], *others])) or "-",
    ]


def _ms(side: dict[str, Any] | None, problem: str = "") -> str:
    if side is None:
        # the whole report stands below the table
        return problem if problem == "not installed" else "-"
    return "failed" if "failed" in side else number(side["ms"])


def _optimizer_table(rows: list[dict[str, Any]]) -> str:
    head = ["AdamW step", "tensors", "host ms", "until done ms", "GPU ms", "launches", "copies"]
    return format_table(
        head,
        [
            [
                row["optimizer"],
                str(row["tensors"]),
                number(row["host_ms"]),
                number(row["wall_ms"]),
                number(row["gpu_ms"]),
                *("-" if row[name] is None else str(row[name]) for name in ("launches", "copies")),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
