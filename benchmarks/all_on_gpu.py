"""The benchmarks of a GPU, one after the other, as README and docs/measurements.md have them.

    python -m benchmarks.all_on_gpu FOLDER [--minutes 60] [--only NAME,NAME] [--list]

FOLDER gets the random checkpoints (33 GB, when they are first needed), a log of each run, and the
results, unless BENCHMARK_RESULTS names another place: copy those that shall stay. A run starts if
the time that it took on an H200 still fits into `--minutes`, and is stopped when they are over.
Peers take part where they are installed. `benchmarks.quantization` takes one seed of three a run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.table import format_table

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    *("tests/kernels", "tests/layers", "tests/activations", "tests/models/test_pass_graphs.py"),
    *("tests/models/test_kept_recordings.py", "tests/models/test_failed_recordings.py"),
    "tests/models/test_recording_policy.py",
    *("tests/decoding", "tests/quantization/test_int8_modules.py"),
    *("tests/quantization/test_weight_reader.py", "tests/training/test_optimizer.py"),
    "tests/training/test_gpu.py",
)


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        seconds: that it took on an H200, with some room.
        arguments: after `python -m`; a word in braces is that random checkpoint's folder.
    """

    name: str
    seconds: int
    arguments: str


# those whose milliseconds are shown come first
RUNS = [
    Run("planner", 220, "benchmarks.planner {8b}"),
    Run("planner_t4", 80, "benchmarks.planner {8b} --t4 --cases 2x2048,1x8192"),
    Run(
        "planner_t4_long",
        150,
        "benchmarks.planner {8b} --t4 --host-gib 7 --cases 1x40960 --steps 1,2 "
        "--name planner_8b_t4_long",
    ),
    Run("planner_1b", 60, "benchmarks.planner {1b} --cases 2x512,2x2048,4x2048@3.0"),
    Run(
        "train_step",
        330,
        "benchmarks.train_step {8b} --implementations unsloth_nockpt,unsloth,ours_nockpt,ours",
    ),
    Run(
        "train_step_others",
        330,
        "benchmarks.train_step {8b} --implementations hf,hf_nockpt,"
        "hf_liger --name train_step_8b_liger",
    ),
    Run(
        "train_step_1b",
        90,
        "benchmarks.train_step {1b} --implementations unsloth,ours_nockpt,ours_smart "
        "--shapes 2x512,2x128",
    ),
    Run(
        "train_step_1b_no_graphs",
        60,
        "benchmarks.train_step {1b} --implementations ours_nockpt --shapes 2x512,2x128 --no-graphs",
    ),
    Run(
        "dynamic",
        150,
        "benchmarks.train_step {8b} --implementations ours_nockpt,ours_dynamic --shapes 2x2048 "
        "--name train_step_8b_dynamic",
    ),
    Run(
        "dynamic_t4",
        120,
        "benchmarks.train_step {8b} --t4 --implementations ours_dynamic --shapes 2x512 "
        "--name train_step_8b_t4_dynamic",
    ),
    Run("decoding", 130, "benchmarks.decoding {8b} --batches 1 --tokens 48"),
    Run("kernels", 220, "benchmarks.kernels"),
    Run("packing", 120, "benchmarks.packing {8b} --implementations ours_nockpt,hf_nockpt"),
    Run("tutorial", 100, "benchmarks.tutorial --model {8b} --name tutorial_8b_random"),
    Run(
        "tutorial_fp16",
        100,
        "benchmarks.tutorial --model {8b} --dtype float16 --name tutorial_8b_random_fp16",
    ),
    Run("gemma", 60, "benchmarks.planner {gemma-3-1b} --cases 2x512,2x2048"),
    Run("gemma_2", 80, "benchmarks.planner {gemma-2-2b} --cases 2x512,2x2048"),
    Run("phi", 60, "benchmarks.planner {phi-4-mini} --cases 2x512,2x2048"),
    Run("layer_parity", 60, "benchmarks.layer_parity"),
    Run("curves_200", 260, "benchmarks.curves_200 --processes 4"),
    Run("export", 200, "benchmarks.export"),
    Run("export_cost", 340, "benchmarks.export_cost {8b}"),
    *(
        Run(
            f"quantization_{seed}",
            400,
            f"benchmarks.quantization --seeds {seed} --steps 32 --name quantization_cuda_{seed}",
        )
        for seed in (1, 2, 3)
    ),
    Run("tests", 300, f"pytest -q -n 6 {' '.join(TESTS)}"),
]


def main() -> None:
    """Run what fits into the time; exit with 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", help="names of runs, with commas between, in that order")
    parser.add_argument("--list", action="store_true", help="name the runs, and run nothing")
    options = parser.parse_args()
    runs = chosen(options.only)
    if options.list:
        print(
            format_table(
                ["run", "s on an H200", "python -m"],
                [[run.name, str(run.seconds), run.arguments] for run in runs],
            )
        )
        return
    results = run_all(runs, options.folder.resolve(), time.monotonic() + 60 * options.minutes)
    print(format_table(["run", "came to", "s", "last line"], results))
    if any(row[1] not in ("done", "no time left") for row in results):
        raise SystemExit(1)


def chosen(only: str | None) -> list[Run]:
    """The named runs in that order, or all."""
    if not only:
        return RUNS
    by_name = {run.name: run for run in RUNS}
    unknown = [name for name in only.split(",") if name not in by_name]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in only.split(",")]


def run_all(runs: list[Run], folder: Path, deadline: float) -> list[list[str]]:
    """A row for each run: its name, what it came to, its seconds, the last line of its log."""
    rows = []
    for run in runs:
        left = deadline - time.monotonic()
        if left < run.seconds:
            rows.append([run.name, "no time left", "-", "-"])
        else:
            rows.append(_run(run, folder, left))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def _run(run: Run, folder: Path, timeout_s: float) -> list[str]:
    began = time.monotonic()
    log = folder / "logs" / f"{run.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [_place(word, folder) for word in run.arguments.split()]
    # written by a process of its own, which takes its memory along
    commands = [
        ["benchmarks.random_model", place, "--shape", Path(place).name]
        for word, place in zip(run.arguments.split(), words, strict=True)
        if word != place and not (Path(place) / "model.safetensors.index.json").is_file()
    ]
    came_to = ""
    with log.open("w", encoding="utf-8") as out:
        for command in [*commands, words]:
            came_to = _end_of(command, out, folder, timeout_s - (time.monotonic() - began))
            if came_to != "done":
                break
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["-"]
    return [run.name, came_to, f"{time.monotonic() - began:.0f}", lines[-1][:80]]


def _end_of(words: list[str], out: IO[str], folder: Path, timeout_s: float) -> str:
    """Run `python -m words`, and say what became of it."""
    results = {"BENCHMARK_RESULTS": str(folder / "results"), "PYTHONUNBUFFERED": "1"}
    # a group of its own: a benchmark's children end with it
    child = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT, env={**results, **os.environ}, stdout=out, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = child.wait(max(0.0, timeout_s))
        return f"exit code {code}" if code else "done"
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    finally:
        # after Ctrl-C too, which a group of its own does not see
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _place(word: str, folder: Path) -> str:
    """The word, or the folder of the checkpoint that it names."""
    return str(folder / word.strip("{}")) if word.startswith("{") else word


if __name__ == "__main__":
    main()
