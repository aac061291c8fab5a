"""What the benchmarks share: processes of their own, the reading of a profile, tables."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent.parent

CHILD = """
import sys, time
from benchmarks.children import emit
emit({"number": 1})
print("beside it")
emit({"number": 2})
sys.stdout.flush()
if sys.argv[1] == "fails":
    raise RuntimeError("no luck")
if sys.argv[1] == "hangs":
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(
    ("way", "problem"),
    [("works", ""), ("fails", "RuntimeError: no luck"), ("hangs", "stopped after 3 s")],
)
def test_rows_outlive_the_process_that_measured_them(
    way: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.children import run_child

    (tmp_path / "the_child.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: list[dict[str, Any]] = []
    timeout_s = 3 if way == "hangs" else 50
    rows, found = run_child("the_child", [way], timeout_s=timeout_s, on_row=seen.append)
    assert rows == seen == [{"number": 1}, {"number": 2}]
    assert problem in found
    assert bool(found) == bool(problem)


def _event(name: str, us: float, *, on_device: bool = True, is_range: bool = False) -> Any:
    kinds = torch.autograd.DeviceType
    return SimpleNamespace(
        name=name,
        device_type=kinds.CUDA if on_device else kinds.CPU,
        is_user_annotation=is_range,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_a_profile_counts_kernels_but_no_copies_and_no_ranges() -> None:
    from benchmarks.gpu_timing import summarise

    events = [
        _event("gemm", 1000),
        _event("gemm", 3000),
        _event("norm", 500),
        _event("Memcpy DtoD", 200),
        _event("Memset", 100),
        _event("Optimizer.step", 9000, is_range=True),
        _event("aten::mm", 9000, on_device=False),
    ]
    found = summarise(events)
    assert (found.launches, found.copies) == (3, 2)
    assert found.device_ms == pytest.approx(4.8)
    assert found.kernels[0] == (4.0, 2, "gemm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_message_names_the_dry_run() -> None:
    from benchmarks.gpu_timing import pick_device

    with pytest.raises(SystemExit, match=r"none on this machine[^-]*-m benchmarks\.kernels --dry"):
        pick_device("benchmarks.kernels", is_dry=False)


def test_of_a_problem_its_two_ends_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import record

    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    text = 'exit status 1\n  File "/home/me/x.py", line 3\n    y()\nImportError: no y\n'
    path = record.write("parts", [], problems={"peer": text, "other": "not installed"})
    found = json.loads(path.read_text("utf-8"))["problems"]
    assert found == {"peer": "exit status 1: ImportError: no y", "other": "not installed"}


def test_memory_counts_beyond_what_was_held_before() -> None:
    from benchmarks.export_cost import _watched_memory

    gc.collect()  # what an earlier test left would be let go meanwhile
    with _watched_memory() as peak:
        held = bytearray(b"1" * 50_000_000)
        deadline = time.monotonic() + 20
        while peak[0] < 40e6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert held and peak[0] > 40e6


def test_numbers_keep_their_digits() -> None:
    from benchmarks.table import format_table, number

    shown = [number(x) for x in (0.01234, 1.5, 12.34, 1234.5, None, 0.0)]
    assert shown == ["0.0123", "1.50", "12.3", "1,234", "-", "0.0"]
    table = format_table(["op", "ms", "notes"], [["norm", "1.0", "a"]], left=("notes",))
    assert table == "op     ms  notes\nnorm  1.0  a"
