"""The benchmarks run from end to end at tiny sizes, all of them in one process to save imports."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parent.parent.parent

COMMANDS = {
    "kernels_bfloat16_dry": ["benchmarks.kernels", "--dry"],
    "train_step_tiny_dry": ["benchmarks.train_step", "--dry"],
    "parity": [
        *("benchmarks.layer_parity", "--families", "llama,qwen3"),
        *("--dtypes", "float64,float32,bfloat16", "--batches", "2", "--name", "parity"),
    ],
}
RUN = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of every command, and all that was printed under "text"."""
    folder = tmp_path_factory.mktemp("results")
    # the interpreter would run the attention kernels that a dry run leaves out
    environment = {**os.environ, "BENCHMARK_RESULTS": str(folder), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(list(COMMANDS.values()))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in COMMANDS}
    return found | {"text": done.stdout}


def test_every_op_is_timed_and_compared(results: dict[str, Any]) -> None:
    result = results["kernels_bfloat16_dry"]
    assert result["copy_gb_s"] > 0
    ops = {row["op"].split(",")[0] for row in result["rows"]}
    assert ops == {
        *(
            f"rms_norm {way}{more}"
            for way in ("forward", "backward")
            for more in ("", " + residual")
        ),
        *("swiglu forward", "swiglu backward", "swiglu backward + product", "rope"),
        *("nf4 decode", "lora borders", "linear_cross_entropy"),
        *("attention forward", "attention backward"),
    }
    for row in result["rows"]:
        assert "ours" in row["sides"]
        assert row["bytes_moved"] or row["operations"]
        for name, side in row["sides"].items():
            assert "failed" not in side, (row["op"], name, side)
            # bfloat16 has an eps of 0.0078; a wrong result is off by about 1
            assert side["error"] < 0.008, (row["op"], name, side)
            assert side["ms"] > 0
    assert "bitsandbytes" in next(r for r in result["rows"] if r["op"].startswith("nf4"))["sides"]
    packed = [row for row in result["rows"] if row["size"].endswith("8 packed")]
    assert len(packed) == 2
    assert all({"cpu_flash", "math", "F.sdpa by document"} <= set(r["sides"]) for r in packed)


def test_every_optimizer_is_timed(results: dict[str, Any]) -> None:
    rows = results["kernels_bfloat16_dry"]["optimizers"]
    assert [row["optimizer"] for row in rows][:2] == ["FlatAdamW(bits=8)", "FlatAdamW(bits=32)"]
    assert all(row["wall_ms"] >= row["host_ms"] > 0 for row in rows)
    assert len({row["numbers"] for row in rows}) == 1


def test_a_step_is_timed_by_each_implementation(results: dict[str, Any]) -> None:
    rows = {row["implementation"]: row for row in results["train_step_tiny_dry"]["rows"]}
    assert list(rows) == ["hf", "ours", "ours_nockpt"]
    for row in rows.values():
        assert not row["out_of_memory"]
        assert not row["stock_passes"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"])
        # the same checkpoint and the same tokens; adapters have hardly moved
        assert row["loss"] == pytest.approx(rows["hf"]["loss"], abs=0.02)
    assert [row["optimizer"] for row in rows.values()] == ["bnb", "flat", "flat"]


def test_parity_shows_the_precision_of_each_dtype(results: dict[str, Any]) -> None:
    rows = results["parity"]["rows"]
    assert len(rows) == 2 * 4  # bfloat16 with adapters of both kinds
    largest = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 0.3}
    for row in rows:
        assert not row["stock_passes"]
        assert row["adapters"] in (row["dtype"], "float32")
        for name in ("ours", "kept"):
            assert row["sides"][name]["worst"] < largest[row["dtype"]]
        # rounded weights are the truth's weights: stock too is right but for its arithmetic
        assert row["sides"]["stock"]["loss"] < 0.01
    assert all(math.isfinite(e) for row in rows for s in row["sides"].values() for e in s.values())


def test_tables_are_printed(results: dict[str, Any]) -> None:
    for head in ("ours ms", "launches/layer", "until done ms", "gradients: ours"):
        assert head in results["text"]
