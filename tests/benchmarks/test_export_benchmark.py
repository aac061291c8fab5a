"""The export benchmark: its measures on logits whose answer is known, and a dry run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from benchmarks import export, export_logits, llama_cpp_logits  # noqa: E402

HAS_LLAMA_CPP = llama_cpp_logits.version() is not None


def _logits(*shares: float) -> Any:
    return np.log(np.array([shares], dtype=np.float32))


def test_distance_of_known_distributions() -> None:
    half, quarter = _logits(0.5, 0.5), _logits(0.25, 0.75)
    found = export_logits.compare([half, half], [half, quarter])
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert found["max_kl"] == found["prompt_kl"] == pytest.approx(kl, rel=1e-6)
    assert found["mean_kl"] == pytest.approx(kl / 2, rel=1e-6)
    assert found["max_logit"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["mean_logit"] == pytest.approx((math.log(2) + math.log(1.5)) / 4, rel=1e-6)
    # of two that are as likely the first counts
    assert found["same_first"] == 0.5
    together = export_logits.compare(
        [np.concatenate([half, half])], [np.concatenate([half, quarter])]
    )
    assert together["prompt_kl"] == together["mean_kl"] == pytest.approx(kl / 2, rel=1e-6)
    # the same number added to all logits changes no probability
    moved = export_logits.compare([quarter], [quarter + 3])
    assert moved["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert moved["max_logit"] == pytest.approx(3, rel=1e-6)


def test_positions_that_all_prompts_share_do_not_count() -> None:
    class Words:
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return "start " + messages[0]["content"]

        def __call__(self, text: str, **options: Any) -> Any:
            words = {"start": 0, "one": 1, "two": 2, "three": 3}
            return type("Encoded", (), {"input_ids": [words[word] for word in text.split()]})

    rows = [{"prompt": [{"content": text}]} for text in ("one two", "one three three")]
    prompts = export_logits.Prompts.of(Words(), rows)
    assert prompts.ids == [[0, 1, 2], [0, 1, 3, 3]]
    assert (prompts.first, prompts.positions) == (2, 3)


def test_no_prompt_was_trained_on() -> None:
    from colab_qlora.data import read_records
    from colab_qlora.samples import sample_path

    asked = [json.dumps(record) for record in export._records_to_ask()]
    trained = read_records(sample_path("train.jsonl"))[: export.TRAINED_ROWS]
    assert len(set(asked)) == len(asked) >= 50
    assert not set(asked) & {json.dumps(record) for record in trained}


@pytest.fixture(scope="module")
def dry(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run wrote, and what it printed under "text"."""
    folder = tmp_path_factory.mktemp("results")
    command = ["export", "--dry", "--model", str(tiny_model_folder)]
    command += ["--methods", "f32,f16,q8_0,q4_0,q4_k_m"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("BENCHMARK_RESULTS", str(folder))
        patch.setattr(sys, "argv", command)
        export.main()
    return json.loads((folder / "export_dry.json").read_text("utf-8")) | {"text": said.getvalue()}


@pytest.mark.model
def test_merged_into_16_bit_it_is_the_adapters_beside_16_bit(dry: dict[str, Any]) -> None:
    base, trained, merged, four_bit = dry["merged"]
    assert [row["model"] for row in dry["merged"]][2:] == ["merged_16bit", "merged_4bit"]
    assert base["to_16_bit"]["mean_kl"] > 10 * merged["to_16_bit"]["mean_kl"] > 0
    assert base["to_as_trained"]["mean_kl"] > 0
    assert 0 < merged["to_16_bit"]["mean_kl"] <= 1e-3
    # what 4 bits cost is the distance from one side to the other, whichever is merged
    cost = trained["to_16_bit"]["mean_kl"]
    assert merged["to_16_bit"]["mean_kl"] < 0.05 * cost
    assert merged["to_as_trained"]["mean_kl"] == pytest.approx(cost, rel=0.5)
    assert four_bit["to_16_bit"]["mean_kl"] > 10 * merged["to_16_bit"]["mean_kl"]
    assert four_bit["bytes"] < merged["bytes"]
    assert "KL to as trained" in dry["text"]


@pytest.mark.model
def test_files_of_fewer_bits_are_farther(dry: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in dry["rows"] if row["read_by"] == "transformers"}
    kls = [rows[name]["mean_kl"] for name in ("f32", "f16", "q8_0", "q4_0")]
    assert kls[0] < 1e-9 and kls == sorted(kls)
    assert rows["f32"]["max_logit"] < 1e-4 < rows["q4_0"]["max_logit"]
    sizes = [rows[name]["bytes"] for name in ("f32", "f16", "q8_0")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.model
def test_llama_cpp_agrees_or_is_named_as_missing(dry: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in dry["rows"] if row["read_by"] != "transformers"}
    assert list(rows) == ["f32", "f16", "q8_0", "q4_0", "q4_k_m"]
    if HAS_LLAMA_CPP:
        assert rows["f32"]["mean_kl"] < 1e-6 < rows["q4_k_m"]["mean_kl"]
        return
    assert dry["llama_cpp_python"] is None
    assert {rows[name]["skipped"] for name in ("f32", "q4_0")} == {
        "llama-cpp-python is not installed"
    }
    assert "q4_k_m is made by llama.cpp's quantizer" in rows["q4_k_m"]["skipped"]
    assert "f32, read by llama.cpp: skipped: llama-cpp-python is not" in dry["text"]


def test_a_process_that_ends_badly_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"no model")
    monkeypatch.setattr(llama_cpp_logits, "version", lambda: "1")
    with pytest.raises(llama_cpp_logits.NoLogits, match=r"llama\.cpp ended with 1: \S"):
        llama_cpp_logits.llama_cpp_logits(file, [[1, 2]], 0)
