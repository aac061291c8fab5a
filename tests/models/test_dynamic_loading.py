"""`from_pretrained(quantization="dynamic")`: what it makes, saves, makes again and refuses."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from colab_qlora import FastLanguageModel, UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import SIXTEEN_BIT
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.map_file import FILE
from colab_qlora.quantization.placing import rung_of

pytestmark = pytest.mark.model
IDS = torch.arange(40).view(2, 20) * 7 + 3


def load(folder, budget="+10%", **options):
    return FastLanguageModel.from_pretrained(
        str(folder), 128, "float32", quantization="dynamic", quantization_budget=budget, **options
    )


@pytest.fixture(scope="module")
def loaded(tiny_model_folder, sample_rows):
    model, tokenizer = load(tiny_model_folder, calibration_data=sample_rows)
    return model, tokenizer


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_every_weight_stands_where_the_map_says(loaded):
    model, _ = loaded
    state = dynamic_state(model)
    items = weight_items(model)
    assert {item.name for item in items} == state.map.placements.keys()
    for item in items:
        assert rung_of(item) == state.map[item.name].rung
    assert state.map.bytes <= state.cap_bytes
    assert state.has_data and state.column_weights
    assert len(set(state.map.rungs.values())) > 1
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight


def test_it_is_nearer_to_16_bit_than_plain_nf4(loaded, tiny_model_folder):
    model, _ = loaded
    plain, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 128, "float32")
    truth, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_folder), 128, "float32", load_in_4bit=False
    )
    want = logits_of(truth)
    assert (logits_of(model) - want).norm() < 0.7 * (logits_of(plain) - want).norm()


def test_a_saved_adapter_brings_its_map_back(loaded, tmp_path, capsys):
    model, tokenizer = loaded
    adapted = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    want = logits_of(adapted)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file()
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), 128, "float32")
    assert dynamic_state(again).map == dynamic_state(adapted).map
    assert torch.equal(logits_of(again), want)
    # saved again, it has it still
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).is_file()
    capsys.readouterr()
    dense, _ = FastLanguageModel.from_pretrained(str(tmp_path), 128, load_in_4bit=False)
    assert dynamic_state(dense) is None
    assert "loaded over 16 bit" in capsys.readouterr().out
    with pytest.raises(UserError, match="quantization_budget is not understood"):
        FastLanguageModel.from_pretrained(str(tmp_path), 128, quantization_budget="rubbish")
    load(tmp_path, "+100%")
    assert "quantization_budget and calibration_data are for a new one" in capsys.readouterr().out
    FastLanguageModel.from_pretrained(str(tmp_path), 128, "bfloat16")
    assert "computed in float32 and now in bfloat16" in capsys.readouterr().out
    for method in (
        adapted.merge_and_unload,
        adapted.merge_adapter,
        adapted.base_model.merge_adapter,
    ):
        with pytest.raises(UserError, match="would round the merged weights once more.*merge_16_b"):
            method()
    assert torch.equal(logits_of(adapted), want)
    with pytest.raises(UserError, match="stock transformers would misread.*save_stock_checkpoint"):
        adapted.get_base_model().save_pretrained(tmp_path / "base")
    adapted.unload()


def test_without_data_it_says_so(tiny_model_folder, capsys):
    model, _ = load(tiny_model_folder)
    assert "without calibration_data: scales are searched for unweighted" in capsys.readouterr().out
    assert not dynamic_state(model).has_data
    assert dynamic_state(model).map.bytes <= dynamic_state(model).cap_bytes


def test_budgets(tiny_model_folder, capsys):
    with pytest.raises(UserError, match="below what plain NF4 needs: got 0.0001 GiB"):
        load(tiny_model_folder, 0.0001)
    with pytest.raises(UserError, match="quantization_budget is not understood: got 'much'"):
        load(tiny_model_folder, "much")
    model, _ = load(tiny_model_folder, 1.0)
    assert set(dynamic_state(model).map.rungs.values()) == {SIXTEEN_BIT}
    load(tiny_model_folder, "auto")
    if not torch.cuda.is_available():
        assert "and there is none: +0%" in capsys.readouterr().out


def test_arguments_that_contradict_each_other(tiny_model_folder, sample_rows):
    name = str(tiny_model_folder)
    with pytest.raises(UserError, match="quantization is not understood: got 'int4'"):
        FastLanguageModel.from_pretrained(name, quantization="int4")
    with pytest.raises(UserError, match="calibration_data are for dynamic quantisation"):
        FastLanguageModel.from_pretrained(name, calibration_data=sample_rows)
    with pytest.raises(UserError, match="dynamic quantisation starts from 4 bit"):
        FastLanguageModel.from_pretrained(name, load_in_4bit=False, quantization="dynamic")


def test_a_quantised_checkpoint_says_what_it_cannot_do(tiny_model_folder, tmp_path):
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for stored, said in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4"),
    ):
        text = json.dumps(config | {"quantization_config": stored})
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"quantised already.*got {said}.*scale search"):
            load(folder)


def test_what_cannot_be_trained_in_8_bits_is_said_before(tiny_model_folder, sample_rows):
    model, _ = load(tiny_model_folder, calibration_data=sample_rows)
    assert "int8" in dynamic_state(model).map.rungs.values()
    with pytest.raises(UserError, match="held in 8 bits, which cannot be trained: got model.embed"):
        FastLanguageModel.get_peft_model(model, modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="DoRA needs the norms of weights"):
        FastLanguageModel.get_peft_model(model, use_dora=True)


def test_data_are_looked_at_before_the_weights_are(tiny_model_folder, monkeypatch):
    def loads(*args, **kwargs):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("colab_qlora.models.loading._load_model", loads)
    with pytest.raises(UserError, match="calibration_data is empty"):
        load(tiny_model_folder, calibration_data=[])


def test_auto_takes_what_the_planner_leaves(tiny_model_folder, monkeypatch):
    monkeypatch.setattr("colab_qlora.models.dynamic_loading._spare_bytes", lambda *_: 12_345)
    model, _ = load(tiny_model_folder, "auto")
    state = dynamic_state(model)
    assert state.cap_bytes == state.plain_bytes + 12_345


def test_a_table_of_8_bits_does_not_grow(tiny_model_folder):
    model, tokenizer = load(tiny_model_folder)
    assert dynamic_state(model).map["model.embed_tokens"].rung == "int8"
    rows = len(tokenizer)
    assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
    with pytest.raises(UserError, match=f"cannot be given more rows: got {rows + 1} tokens"):
        model.resize_token_embeddings(rows + 1)
    dense, _ = load(tiny_model_folder, 1.0)
    dense.resize_token_embeddings(rows + 1)
    assert dense.get_input_embeddings().num_embeddings == rows + 1


@pytest.mark.parametrize(("gib", "spares"), [(40, True), (9, False)])
def test_auto_is_what_a_plan_leaves_that_saves_no_memory(monkeypatch, gib, spares):
    from colab_qlora.activations.gpu_profile import profile_named
    from colab_qlora.activations.memory_plan import GIB, Machine, Workload, plan_for
    from colab_qlora.activations.recorded_shapes import RECORDED_SHAPES
    from colab_qlora.models.dynamic_loading import _spare_bytes

    workload = Workload("8b", RECORDED_SHAPES["llama-3-8b"], 16, 2, 2048)
    plan = plan_for(workload, Machine(profile_named("A100"), gib * GIB, 0))
    monkeypatch.setattr("colab_qlora.models.memory_planning.plan_memory", lambda *_: plan)
    on_a_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    model = SimpleNamespace(parameters=lambda: iter([on_a_gpu]))
    assert any(plan.step.plan.recompute) is not spares
    # weights that stay decoded make way for precision
    needed = plan.step.peak_bytes - plan.step.held_bytes
    assert _spare_bytes(model, 2048) == (gib * GIB - needed if spares else 0)
    assert bool(plan.step.held_layers) is spares
