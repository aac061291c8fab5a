"""The list of GPU benchmarks: every command exists, and a run's end is told as it was."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import all_on_gpu  # noqa: E402
from benchmarks.all_on_gpu import RUNS, Run, chosen, run_all  # noqa: E402
from benchmarks.random_model import SHAPES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_modules_options_and_checkpoints_exist(run: Run) -> None:
    module, *words = run.arguments.split()
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    assert {word.strip("{}") for word in words if word.startswith("{")} <= set(SHAPES)


def test_names_are_unique_and_unknown_ones_refused() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    assert [run.name for run in chosen("phi,kernels")] == ["phi", "kernels"]
    with pytest.raises(SystemExit, match="unknown: speed; there are planner, "):
        chosen("speed,kernels")


def test_what_each_run_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "works.py").write_text("print('one')\nprint('all well')\n")
    (tmp_path / "fails.py").write_text("raise SystemExit('no luck')\n")
    (tmp_path / "hangs.py").write_text(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(all_on_gpu, "ROOT", tmp_path)
    runs = [Run("a", 0, "works"), Run("b", 0, "fails"), Run("c", 500, "works")]
    rows = run_all(runs, tmp_path, time.monotonic() + 100)
    assert [row[:2] for row in rows] == [["a", "done"], ["b", "exit code 1"], ["c", "no time left"]]
    assert [row[3] for row in rows] == ["all well", "no luck", "-"]
    assert (tmp_path / "logs" / "a.txt").read_text() == "one\nall well\n"
    (row,) = run_all([Run("d", 0, "hangs")], tmp_path, time.monotonic() + 10)
    assert re.fullmatch(r"stopped after (9|10) s", row[1])
    # what it had started ends with it
    deadline = time.monotonic() + 10
    while _runs(int(row[3])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_checkpoints_are_written_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    (tmp_path / "shows.py").write_text(
        "import os, pathlib, sys\n"
        "print(sorted(path.suffix for path in pathlib.Path(sys.argv[1]).iterdir()))\n"
        "print(os.environ['BENCHMARK_RESULTS'])\n"
    )
    monkeypatch.delenv("BENCHMARK_RESULTS", raising=False)
    runs = [
        Run("a", 0, "shows {tiny}"),
        Run("b", 0, "shows {tiny}"),
        Run("c", 0, "shows {nothing}"),
    ]
    rows = run_all(runs, tmp_path / "work", time.monotonic() + 100)
    assert [row[1] for row in rows] == ["done", "done", "exit code 2"]
    first, second = ((tmp_path / f"work/logs/{name}.txt").read_text() for name in "ab")
    assert ".safetensors" in first and "wrote tiny" in first
    assert ".safetensors" in second and "wrote tiny" not in second
    assert second.splitlines()[-1] == str(tmp_path / "work" / "results")
    assert "invalid choice: 'nothing'" in rows[2][3]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_lists_them() -> None:
    command = [sys.executable, "-m", "benchmarks.all_on_gpu", "nowhere", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [run.name for run in RUNS if run.name not in done.stdout] == []
