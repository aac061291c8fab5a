"""LoftQ over a base in few bits: its start, what its adapter belongs to, what it is merged into."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantization"))

from small_checkpoint import (  # noqa: E402
    RUNGS,
    layers_of,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    randomise,
    write_llama,
)

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.export.base_weights import merged_weights  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.models.adapters import attach_lora  # noqa: E402
from colab_qlora.models.settings import settings_of  # noqa: E402
from colab_qlora.quantization.merging import merge_16_bit  # noqa: E402
from colab_qlora.quantization.weight_source import WeightSource  # noqa: E402

LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("loftq") / "llama")


def _attach(base: Any, **options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 12, "use_gradient_checkpointing": False, **LOFTQ, **options}
    return attach_lora(base, **options).eval()


def _trained(folder: Path, dtype: Any = torch.float32) -> Any:
    """Started by LoftQ and then moved, as training does."""
    model = _attach(load_nf4(folder, dtype))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def _kept(layer: Any) -> Any:
    """What 4 bits are worth, by bitsandbytes itself, float64."""
    weight = layer.get_base_layer().weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def _delta(layer: Any, adapter: str = "default") -> Any:
    b, a = (part[adapter].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
    return layer.scaling[adapter] * (b @ a)


@pytest.mark.model
def test_loftq_over_4_bits_starts_with_the_best_fit_of_what_was_lost(
    tiny_model_folder: Path,
) -> None:
    from peft.utils.integrations import dequantize_module_weight
    from transformers import AutoModelForCausalLM

    rank, alpha = 8, 32
    # the weights before they were quantised, from a loader of its own
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = torch.get_rng_state()
    model = FastLanguageModel.get_peft_model(
        FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")[0],
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": 1},
    )
    assert torch.equal(torch.get_rng_state(), before)
    numbers = {"r": rank, "lora_alpha": alpha}
    # its cell may be run again
    assert FastLanguageModel.get_peft_model(model, **numbers, **LOFTQ) is model
    with pytest.raises(UserError, match="init_lora_weights 'loftq', asked True"):
        FastLanguageModel.get_peft_model(model, **numbers)
    checked = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        kept = dequantize_module_weight(module.get_base_layer()).float()
        weight = whole.get_submodule(name.removeprefix("base_model.model.")).weight
        left = (weight - kept - module.get_delta_weight("default")).norm()
        # Eckart-Young: no matrix of that rank leaves less than the singular values beyond it
        least = torch.linalg.svdvals((weight - kept).double())[rank:].norm()
        assert least * (1 - 1e-5) <= left <= 1.01 * least, name
        checked += 1
    assert checked == 14


def test_merged_into_the_weights_that_it_was_trained_over(folder: Path, tmp_path: Path) -> None:
    model = _trained(folder)
    expected = {name: _kept(layer) + _delta(layer) for name, layer in layers_of(model).items()}
    before = logits(model)
    loaded = load_plain(save_pretrained_merged(model, tmp_path / "merged"), dtype=torch.float32)
    for name, weight in expected.items():
        assert (loaded.get_submodule(name).weight.double() - weight).abs().max() <= 1e-6, name
    assert (logits(loaded) - before).abs().max() <= 2e-5
    # into the 16-bit weights it would have counted twice what they lost
    source = WeightSource.of_checkpoint(str(folder))
    twice = max(float((source(n).double() - _kept(m)).norm()) for n, m in layers_of(model).items())
    assert twice > 0.1


def test_what_files_for_llama_cpp_and_the_hub_are_made_of(folder: Path) -> None:
    model = _trained(folder)
    merge = merged_weights(model)
    for matrix in merge.parts.matrices:
        if matrix.adapters:
            exact = _kept(matrix.layer) + _delta(matrix.layer)
            assert (merge.weight(matrix).double() - exact).abs().max() <= 1e-6, matrix.name


def test_beside_another_adapter_and_without_it(folder: Path) -> None:
    model = _trained(folder)
    plain = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model.add_adapter("plain", plain)
    randomise(model)
    for active in (["default", "plain"], ["plain"]):
        model.base_model.set_adapter(active)
        source, merge = WeightSource.of_checkpoint(str(folder)), merged_weights(model)
        for matrix in merge.parts.matrices:
            if not matrix.adapters:
                continue
            is_loftq = "default" in matrix.adapters
            exact = _kept(matrix.layer) if is_loftq else source(matrix.name).double()
            exact = exact + sum(_delta(matrix.layer, name) for name in matrix.adapters)
            assert (merge.weight(matrix).double() - exact).abs().max() <= 1e-6, matrix.name


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_its_folder_loads_in_stock_peft(folder: Path, tmp_path: Path, options: dict) -> None:
    model = _trained(folder)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    # PEFT would quantise the codes anew at "loftq"
    assert saved["init_lora_weights"] is True
    loaded = peft.PeftModel.from_pretrained(
        load_nf4(folder, torch.float32), str(tmp_path / "adapter"), **options
    )
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5
    # and what was noted is still there to merge by
    again = save_pretrained_merged(loaded, tmp_path / "merged")
    assert (logits(load_plain(again, dtype=torch.float32)) - logits(model)).abs().max() <= 2e-5


def test_a_trainers_reference_copy_leaves_the_base_alone(folder: Path) -> None:
    model = _trained(folder)
    before = {name: _kept(layer) for name, layer in layers_of(model).items()}
    model.add_adapter("ref", model.peft_config["default"])
    assert all(torch.equal(_kept(m), before[name]) for name, m in layers_of(model).items())


def test_over_16_bits_it_is_refused(folder: Path, tmp_path: Path) -> None:
    _trained(folder).save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(
        load_plain(folder, dtype=torch.float32), str(tmp_path / "adapter")
    )
    with pytest.raises(UserError, match=r"started by LoftQ.*load_in_4bit=True"):
        merge_16_bit(model)


@pytest.mark.model
def test_its_folder_loads_here_over_4_bits_only(tiny_model_folder: Path, tmp_path: Path) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(base, r=4, **LOFTQ).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 64, dtype="float32")
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5
    with pytest.raises(UserError, match="adapter default was started by LoftQ"):
        FastLanguageModel.from_pretrained(
            str(tmp_path / "adapter"), 64, dtype="float32", load_in_4bit=False
        )


def test_magnitudes_of_dora_are_those_of_base_and_adapter(folder: Path) -> None:
    model = _attach(load_nf4(folder, torch.float32), use_dora=True)
    beside = _attach(load_nf4(folder, torch.float32))
    for name, layer in layers_of(model).items():
        norms = (_kept(layer) + _delta(layer)).norm(dim=1)
        found = layer.lora_magnitude_vector["default"].weight.detach()
        assert torch.allclose(found.double(), norms, rtol=1e-5), name
    # at the start DoRA is the model that plain LoRA is
    assert (logits(model) - logits(beside)).abs().max() <= 2e-5


def test_over_a_base_of_mixed_precision(folder: Path) -> None:
    model = _attach(load_mixed(folder, torch.float32, RUNGS))
    source = WeightSource.of_checkpoint(str(folder))
    seen = set()
    for name, layer in layers_of(model).items():
        base = layer.get_base_layer()
        seen.add(type(base).__name__)
        exact = source(name).double()
        if type(base) is torch.nn.Linear:
            # nothing was lost; an adapter of zeros on both sides could not learn
            assert not layer.lora_B["default"].weight.any()
            assert layer.lora_A["default"].weight.any()
            continue
        is_int8 = hasattr(base, "SCB")
        kept = base.weight.double() * base.SCB.double()[:, None] / 127 if is_int8 else _kept(layer)
        left = (exact - kept - _delta(layer)).norm()
        assert left < 0.99 * (exact - kept).norm(), name
    assert len(seen) == 3
    # embedding and head are in 16 bits here: without adapters they would come from the checkpoint
    before = logits(model)
    assert (logits(merge_16_bit(model)) - before).abs().max() <= 1e-4


def test_the_commit_that_was_loaded_is_read(folder: Path, monkeypatch: Any) -> None:
    base, asked = load_nf4(folder, torch.float32), []
    settings_of(base).model_name = "ada/tiny"
    base.config._commit_hash = "c0ffee"
    of_checkpoint = WeightSource.of_checkpoint

    def checkpoint(name: str, **hub: Any) -> WeightSource:
        asked.append((name, hub))
        return of_checkpoint(str(folder))

    monkeypatch.setattr(WeightSource, "of_checkpoint", checkpoint)
    _attach(base)
    assert asked == [("ada/tiny", {"revision": "c0ffee"})]


@pytest.mark.parametrize("size", ["same", "other"])
def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path, size: str) -> None:
    other = load_plain(folder)
    for parameter in other.parameters():
        rows = parameter if size == "same" else parameter[: len(parameter) // 2]
        parameter.data = rows.data.flip(0)
    other.save_pretrained(tmp_path / "other")
    base = load_nf4(folder, torch.float32)
    settings_of(base).model_name = str(tmp_path / "other")
    match = "q_proj differs by 1[0-9][0-9]%" if size == "same" else r"is \(36, 72\) there, and \(72"
    with pytest.raises(UserError, match=f"is not the model that was loaded.*{match}"):
        _attach(base)
    # refused before anything was attached
    settings_of(base).model_name = str(folder)
    assert layers_of(_attach(base))
