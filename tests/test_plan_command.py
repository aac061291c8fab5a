"""`python -m colab_qlora plan` and `plan_memory`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from colab_qlora import plan_memory
from colab_qlora.__main__ import main
from colab_qlora.activations.gpu_profile import profile_named
from colab_qlora.activations.recorded_profiles import PROFILES
from colab_qlora.errors import UserError


def test_it_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama-3-8b", "--gpu", "T4", "--batch", "1", "--rows", "1000"]
    assert main([*arguments, "--epochs", "2"]) == 0
    text = capsys.readouterr().out
    plan = plan_memory("llama-3-8b", 1, 2048, "T4")
    assert str(plan) in text
    assert f"1,000 rows, 2 epochs: {plan.hours(1000, 2):.2f} hours" in text


def test_a_misfit_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-8b", "--gpu", "T4", "--batch", "64", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    plan = plan_memory("llama-3-8b", 64, 2048, "T4")
    assert found["fits"] is False
    assert found["step_seconds"] is None
    assert found["cheapest_change"] == plan.cheapest_change.text
    assert found["peak_memory_gib"] == pytest.approx(plan.peak_memory_gib)


def test_the_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    assert main(["plan", "embedded", "--gpu", "T4", "--out", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    for wrong, words in (
        (str(tmp_path / "none" / "plan.png"), "cannot be written"),
        ("plan.docx", "no picture"),
    ):
        assert main(["plan", "embedded", "--gpu", "T4", "--out", wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--gpu", "Voodoo 2"], "no rates are recorded for this GPU: got 'Voodoo 2'"),
        (["--gpu", "T4", "--batch", "0"], "batch_size is not a size"),
        (["--gpu", "T4", "--seq", "-4"], "seq_length is not a size"),
        (["--gpu", "T4", "--rank", "0"], "--rank is not a rank"),
        (["--gpu", "T4", "--memory-budget-gib", "40"], "more than a T4 has"),
        (["--gpu", "T4", "--host-budget-gib", "-1"], "host_budget_gib is not a size"),
    ],
)
def test_mistakes(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-8b", *more]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_needs_its_config_alone(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    config.save_pretrained(tmp_path)
    found = plan_memory(tmp_path, 2, 2048, "T4")
    named = plan_memory("llama-3-8b", 2, 2048, "T4")
    assert found.peak_memory_gib == named.peak_memory_gib
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type"):
        plan_memory(tmp_path, 2, 2048, "T4")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        plan_memory(str(tmp_path), 2, 2048, "T4")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("t4", "T4"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
    ],
)
def test_gpus_by_the_names_that_drivers_give_them(name: str, key: str) -> None:
    assert profile_named(name) is PROFILES[key]


def test_recorded_rates_are_below_the_data_sheets() -> None:
    peaks = {
        "T4": (65e12, 320e9, 15.8e9),
        "L4": (121e12, 300e9, 31.5e9),
        "A100": (312e12, 1555e9, 31.5e9),
        "A100-80GB": (312e12, 2039e9, 31.5e9),
        "H100": (989e12, 3350e9, 63e9),
    }
    assert peaks.keys() == PROFILES.keys()
    for key, (flops, memory, copies) in peaks.items():
        found = PROFILES[key]
        assert found.attention_backward_flops_per_s < found.attention_flops_per_s
        assert found.attention_flops_per_s < found.gemm_flops_per_s < flops
        assert found.decode_bytes_per_s <= found.move_bytes_per_s < memory
        assert max(found.copy_down_bytes_per_s, found.copy_up_bytes_per_s) < copies
        assert found.is_measured == (key == "H100")
        assert ("data sheet" in found.source) != found.is_measured
