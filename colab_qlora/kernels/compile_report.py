"""What `compile_check` found for one case, and how it is shown: a table, a file, an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_COLUMNS = "{:<58} {:>3} {:>9} {:>12} {:>17} {:>6} {:>5}  {}"
_TITLES = ("kernel case", "sm", "registers", "shared bytes", "spills store/load", "ptx kB", "ms")

_STATUSES = ("compiled", "skipped", "failed")


@dataclass(frozen=True)
class Result:
    """One case for one capability.

    Attributes:
        case: the case's name, with " bf16" behind it where "*fp16" was compiled as "*bf16".
        capability: 10 * major + minor.
        status: "compiled", "skipped" or "failed".
        reason: why it was skipped or has failed.
        registers: of a thread.
        shared_bytes: of a program, as the launch asks for.
        spill_store_bytes, spill_load_bytes: of a thread.
        ptx_bytes: length of the PTX text.
        milliseconds: from the Python source to the machine code.
    """

    case: str
    capability: int
    status: str
    reason: str = ""
    registers: int | None = None
    shared_bytes: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    ptx_bytes: int | None = None
    milliseconds: float | None = None


def exit_status(results: Iterable[Result]) -> int:
    """1 if a case has failed, else 0."""
    return int(any(result.status == "failed" for result in results))


def table_head() -> str:
    """The titles of the table's columns."""
    return _COLUMNS.format(*_TITLES, "").rstrip()


def table_row(result: Result) -> str:
    """One line of the table, in columns as `table_head`."""
    note = "" if result.status == "compiled" else f"{result.status}: {result.reason}"
    numbers = ["-"] * 5
    if result.registers is not None:
        assert result.ptx_bytes is not None
        spills = f"{result.spill_store_bytes}/{result.spill_load_bytes}"
        numbers = [str(result.registers), str(result.shared_bytes), spills]
        numbers += [f"{result.ptx_bytes / 1000:.1f}", f"{result.milliseconds:.0f}"]
    return _COLUMNS.format(result.case, result.capability, *numbers, note).rstrip()


def counts_line(results: Sequence[Result]) -> str:
    """How many were compiled, skipped and failed."""
    counts = [sum(result.status == status for result in results) for status in _STATUSES]
    return ", ".join(f"{count} {status}" for count, status in zip(counts, _STATUSES, strict=True))


def write_json(path: Path, results: Sequence[Result]) -> None:
    """The results as a file, with Triton's version."""
    import triton

    rows = [asdict(result) for result in results]
    text = json.dumps({"triton": triton.__version__, "results": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
