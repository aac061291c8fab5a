"""Write a benchmark's rows with what they depend on: machine, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
)


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The GPU's name, or the CPU's with its core count."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def folder() -> Path:
    """Where results are written: the results of a run elsewhere come back through another one."""
    return Path(os.environ.get("BENCHMARK_RESULTS", RESULTS))


def write(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Write rows to benchmarks/results/<name>.json and return the path.

    Of each of the `problems`, by name, the first line and the last: a traceback is for the screen.
    """
    if "problems" in about:
        about["problems"] = {name: _short(text) for name, text in about["problems"].items()}
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"{name}.json"
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **about,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _short(problem: str) -> str:
    lines = problem.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0].strip()}: {lines[-1].strip()}"
