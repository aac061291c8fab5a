"""The benchmarks run from end to end at tiny sizes, all of them in one process to save imports."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import packing, planner

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parent.parent.parent

COMMANDS = {
    "kernels_bfloat16_dry": ["benchmarks.kernels", "--dry"],
    "train_step_tiny_dry": ["benchmarks.train_step", "--dry"],
    "planner_dry": ["benchmarks.planner", "--dry"],
    "packing_dry": ["benchmarks.packing", "--dry", "--implementations", "ours_nockpt"],
    "decoding_dry": ["benchmarks.decoding", "--dry"],
    "export_cost_dry": ["benchmarks.export_cost", "--dry"],
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
        "rms_norm backward + residual + output",
        *("swiglu forward", "swiglu backward", "swiglu backward + product"),
        *("swiglu backward + lora", "copy rows", "rope", "qkv gradients"),
        *("nf4 decode", "lora borders", "nf4 decode + lora borders", "linear_cross_entropy"),
        *("int8 nf4 decode + lora borders", "16 bit int8 nf4 decode + lora borders"),
        *("attention forward", "attention backward"),
    }
    for row in result["rows"]:
        assert "ours" in row["sides"]
        assert row["bytes_moved"] or row["operations"]
        assert ("equal_copy_ms" in row) == bool(row["bytes_moved"])
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
    assert list(rows) == ["hf", "ours", "ours_nockpt", "ours_dynamic"]
    for row in rows.values():
        assert not row["out_of_memory"]
        assert not row["stock_passes"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["step_ms"])
        # the same checkpoint and the same tokens; adapters have hardly moved
        assert row["loss"] == pytest.approx(rows["hf"]["loss"], abs=0.02)
    assert [row["optimizer"] for row in rows.values()] == ["bnb", "flat", "flat", "flat"]


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


def test_plans_are_held_against_measurements(results: dict[str, Any]) -> None:
    fits, misfit = results["planner_dry"]["rows"]
    assert (fits["case"], fits["fits"], fits["out_of_memory"]) == ("2x32", True, False)
    assert fits["step_ms"] > 0
    assert fits["predicted_peak_gib"] > 0
    assert fits["recompute_share"] == 0
    assert "layers 0-1: keep" in fits["plan"]
    assert not misfit["fits"]
    assert "no plan fits" in misfit["plan"]
    assert "predicted not to fit" in results["text"]


def test_the_curve_of_plans_is_drawn(tmp_path: Path) -> None:
    def row(case: str, peak_gib: float, step_ms: float) -> dict[str, Any]:
        about = {"fits": True, "out_of_memory": False}
        return about | {"case": case, "peak_gib": peak_gib, "step_ms": step_ms}

    about = {"model": "m", "machine": "a GPU", "date": "2026-01-01"}
    rows = [row("2x2048 @ 7 GiB", 6.9, 310.0), row("2x2048", 18.0, 250.0)]
    rows += [row("1x8192", 30.0, 500.0), {"case": "8x2048 @ 1 GiB", "fits": False}]
    path, peer = tmp_path / "planner.json", tmp_path / "peer.json"
    path.write_text(json.dumps({**about, "rows": rows}), "utf-8")
    other = {"implementation": "hf", "shape": "2x2048", "out_of_memory": False}
    other |= {"peak_gib": 13.5, "step_ms": 786.0}
    peer.write_text(json.dumps({"rows": [other]}), "utf-8")
    drawn = planner.draw(path, [peer])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({**about, "rows": rows[3:]}), "utf-8")
    with pytest.raises(SystemExit, match="no measured case"):
        planner.draw(path, [])


def test_cases_are_read() -> None:
    assert planner.parse_cases("2x32,1x8192@7.9") == [(2, 32, None), (1, 8192, 7.9)]


def test_packed_rows_hold_no_padding(results: dict[str, Any]) -> None:
    rows = {row["layout"]: row for row in results["packing_dry"]["rows"]}
    assert rows.keys() == packing.LAYOUTS.keys()
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    for layout, row in rows.items():
        has_padding = layout.startswith("padded")
        assert (row["padding_share"] > 0) is has_padding, layout
    assert rows["packed, 1 row"]["tokens_per_step"] > 8 * packing.MEDIAN_TOKENS


def test_both_decoders_are_timed_and_write_the_same(results: dict[str, Any]) -> None:
    rows = results["decoding_dry"]["rows"]
    found = [(row["implementation"], row["batch"]) for row in rows]
    assert found == [("generate", 1), ("graph", 1), ("generate", 4), ("graph", 4)]
    for row in rows:
        assert row["ms_per_token"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
        assert row["agreeing_share"] == 1


def test_every_form_of_a_saved_model_has_its_cost(results: dict[str, Any]) -> None:
    rows = {row["form"]: row for row in results["export_cost_dry"]["rows"]}
    whole = rows["merged_16bit"]["disk_gb"]
    assert rows.keys() == {"adapter", "merged_16bit", "merged_4bit", "GGUF q8_0", "GGUF q4_0"}
    assert all(0 < rows[form]["disk_gb"] < whole for form in rows.keys() - {"merged_16bit"})


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    import torch

    from benchmarks import decoding

    written = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = torch.tensor([[1, 9, 3, 4], [5, 6, 7, 8]])
    assert decoding.agreement(written, written) == 1
    assert decoding.agreement(written, other) == 5 / 8


def test_lengths_are_those_of_the_stated_distribution() -> None:
    lengths = packing.draw_lengths(20_000)
    assert abs(statistics.median(lengths) - packing.MEDIAN_TOKENS) <= 2
    assert abs(statistics.mean(lengths) - 126) <= 2
    assert abs(sum(length > 326 for length in lengths) / 20_000 - 0.05) <= 0.005
