"""Merging: against W16 + scaling B A in float64, the same in memory and on disk."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from small_checkpoint import (  # noqa: E402
    TOKENS,
    VOCABULARY,
    adapt,
    assert_same_weights,
    exact_model,
    exact_weights,
    is_tied,
    layers_of,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    write_llama,
)

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of  # noqa: E402
from colab_qlora.quantization import merged_weights  # noqa: E402
from colab_qlora.quantization.dynamic import dynamic_state  # noqa: E402
from colab_qlora.quantization.merged_weights import MergedWeights  # noqa: E402
from colab_qlora.quantization.merging import merge_16_bit, save_merged_16_bit  # noqa: E402
from colab_qlora.quantization.stock_checkpoint import save_stock_checkpoint  # noqa: E402
from colab_qlora.quantization.weight_source import SourceGone  # noqa: E402

LOADS = {"nf4": load_nf4, "mixed": load_mixed}
TEXT = (
    "The river rises in the hills, turns the wheels of two old mills, and runs down to the sea. "
    "In spring it floods the meadows; in a dry summer children walk across it on stones."
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merging") / "llama", biased=True)


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merging") / "untied", tied=False)


def half_ulp(exact):
    """Of bfloat16: 7 stored bits."""
    return torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 8)


@pytest.mark.parametrize("load", LOADS)
def test_weights_are_rounded_once_from_the_exact_sum(folder, load):
    model = adapt(LOADS[load](folder))
    exact = exact_weights(folder, model)
    assert len(exact) == 14
    merged = merge_16_bit(model)
    for name, weight in exact.items():
        ours = merged.get_submodule(name).weight
        assert ours.dtype == torch.bfloat16
        # float32's own rounding of the sum, whose terms are below 1
        assert ((ours.double() - weight).abs() <= half_ulp(weight) + 1e-7).all(), name


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_exact_model(folder, untied_folder, load, tied):
    place = folder if tied else untied_folder
    model = adapt(LOADS[load](place, torch.float32))
    truth = logits(exact_model(place, exact_weights(place, model)))
    # the plain result: PEFT's LoRA beside the dense weights in float32
    beside = adapt(load_plain(place, dtype=torch.float32))
    plain = (logits(beside) - truth).abs().max()
    quantised = (logits(model) - truth).abs().max()
    merged = merge_16_bit(model)
    ours = (logits(merged) - truth).abs().max()
    assert ours <= plain + 1e-5
    assert quantised > 1000 * ours
    assert is_tied(merged) == tied


def test_the_result_is_a_plain_model(folder, tmp_path):
    model = attach_smart(load_nf4(folder))
    assert fused_layers(model)
    merged = merge_16_bit(model)
    assert type(merged).__module__.startswith("transformers.models.llama")
    assert state_of(merged) is None and not fused_layers(merged)
    assert not hasattr(merged.config, "quantization_config")
    for flag in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "peft_config"):
        assert not getattr(merged, flag, False), flag
    for name, module in merged.named_modules():
        assert "lora" not in name
        if isinstance(module, torch.nn.Linear):
            assert type(module) is torch.nn.Linear, name
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in merged.parameters())
    assert merged.config.use_cache and not merged.is_gradient_checkpointing
    merged.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert_same_weights(merged, load_plain(tmp_path / "plain"))
    # nothing is left that would keep it from being adapted again
    assert logits(adapt(merged)).isfinite().all()


def attach_smart(model):
    return adapt(model, use_gradient_checkpointing="smart").train()


def test_dynamic_state_goes_with_the_quantised_weights(folder):
    model = adapt(load_mixed(folder))
    assert dynamic_state(model) is not None
    assert dynamic_state(merge_16_bit(model)) is None


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_on_disk_bit_for_bit_what_is_in_memory(folder, untied_folder, tmp_path, load, dtype, tied):
    model = adapt(LOADS[load](folder if tied else untied_folder, dtype))
    before = logits(model)
    saved = save_merged_16_bit(model, tmp_path / "new" / "merged", max_shard_bytes=50_000)
    assert torch.equal(logits(model), before)
    assert len(fused_layers(model)) == 2
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = {path.name for path in saved.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 3
    assert ("lm_head.weight" in index["weight_map"]) == (not tied)
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (saved / "generation_config.json").is_file()
    merged, loaded = merge_16_bit(model), load_plain(saved)
    assert_same_weights(merged, loaded)
    assert torch.equal(logits(merged), logits(loaded))
    assert is_tied(loaded) == tied
    assert [path.name for path in saved.parent.iterdir()] == ["merged"]


def test_chunks_of_rows_change_nothing_but_rounding(folder, monkeypatch):
    model = adapt(load_nf4(folder, torch.float32))
    exact = exact_weights(folder, model)
    # 5 rows of 72: the last chunk is a short one
    monkeypatch.setattr(merged_weights, "_CHUNK_NUMBERS", 5 * 72)
    merged = merge_16_bit(model)
    for name, weight in exact.items():
        error = (merged.get_submodule(name).weight.double() - weight).abs().max()
        assert error <= 1e-6, name


def test_one_shard_where_it_fits(folder, tmp_path):
    saved = save_merged_16_bit(adapt(load_nf4(folder)), tmp_path / "one")
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_dense_weight_that_was_changed_stays_changed(folder):
    model = load_nf4(folder)
    model.model.embed_tokens.weight.data[7] = 0.5
    merged = merge_16_bit(adapt(model))
    assert (merged.model.embed_tokens.weight[7] == 0.5).all()
    assert is_tied(merged)


def test_a_resized_vocabulary(folder, tmp_path):
    model = load_nf4(folder)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    model = adapt(model)
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged = merge_16_bit(model)
    assert merged.model.embed_tokens.weight.shape[0] == VOCABULARY + 5
    assert_same_weights(merged, load_plain(saved))


def test_a_base_without_adapters_is_its_checkpoint_again(folder):
    assert_same_weights(merge_16_bit(load_mixed(folder)), load_plain(folder))


def test_at_most_one_shard_is_in_memory(folder, tmp_path, monkeypatch):
    made, sizes = [], []
    weight = MergedWeights.weight

    def counted(self, matrix):
        found = weight(self, matrix)
        made.append(weakref.ref(found))
        alive = [ref() for ref in made]
        sizes.append(sum(t.nbytes for t in alive if t is not None))
        return found

    monkeypatch.setattr(MergedWeights, "weight", counted)
    saved = save_merged_16_bit(adapt(load_nf4(folder)), tmp_path / "m", max_shard_bytes=40_000)
    assert len(made) == 15
    assert max(sizes) <= 40_000
    assert sum(f.stat().st_size for f in saved.glob("*.safetensors")) > 4 * 40_000


def test_a_quantised_checkpoint_has_no_16_bit_weights(folder, tmp_path):
    stock = save_stock_checkpoint(load_nf4(folder), tmp_path / "stock")
    model = adapt(load_nf4(stock, quantization_config=None))
    for merge in (merge_16_bit, lambda m: save_merged_16_bit(m, tmp_path / "merged")):
        with pytest.raises(UserError, match="loaded from a checkpoint that is quantised.*Save the"):
            merge(model)
    assert not (tmp_path / "merged").exists()


def test_a_source_that_is_gone_leaves_the_model_as_it_was(folder, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    plain, mixed = adapt(load_nf4(place)), adapt(load_mixed(place))
    before = logits(plain), logits(mixed)
    shutil.rmtree(place)
    with pytest.raises(UserError, match="not a model folder"):
        merge_16_bit(plain)
    with pytest.raises(SourceGone, match="cannot be read any more"):
        merge_16_bit(mixed)
    with pytest.raises(SourceGone, match="cannot be read any more"):
        save_merged_16_bit(mixed, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(plain), before[0]) and torch.equal(logits(mixed), before[1])
    assert len(fused_layers(plain)) == 2


def test_another_checkpoint_in_its_place(folder, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    model = adapt(load_nf4(place))
    loaded = load_plain(folder)
    torch.nn.Module.__setattr__(
        loaded.model.layers[1].mlp, "up_proj", torch.nn.Linear(72, 60, False, dtype=torch.bfloat16)
    )
    loaded.save_pretrained(place)
    with pytest.raises(UserError, match=r"up_proj has another shape.*got \(60, 72\)"):
        merge_16_bit(model)


@pytest.mark.model
def test_embedded_model_merged_is_the_dense_model_with_lora_beside(embedded_folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(embedded_folder), 128, dtype="bfloat16"
    )
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model).values():
        weight = layer.lora_B["default"].weight.data
        weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    # unmerged, beside dense weights: in float32 the truth, in bfloat16 the plain result
    exact, beside = (
        with_the_same_adapters(model, load_plain(embedded_folder, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    tokens = tokenizer(TEXT).input_ids
    truth = log_probabilities(exact, tokens)
    with exact.disable_adapter():
        effect = divergence(truth, log_probabilities(exact, tokens))
    plain = divergence(truth, log_probabilities(beside, tokens))
    quantised = divergence(truth, log_probabilities(model, tokens))
    merged = load_plain(save_merged_16_bit(model, tmp_path / "merged", tokenizer))
    ours = divergence(truth, log_probabilities(merged, tokens))
    # rounding weights and rounding activations weigh about the same
    assert ours <= 1.5 * plain
    assert ours < quantised / 20 and ours < effect / 20
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()


def with_the_same_adapters(model, dense):
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    adapted, ours = peft.get_peft_model(dense, config), layers_of(model)
    for name, layer in layers_of(adapted).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(ours[name], part)["default"].weight
            getattr(layer, part)["default"].weight.data.copy_(weight)
    return adapted


def log_probabilities(model, tokens):
    return logits(model, torch.tensor([tokens])).double().log_softmax(-1)


def divergence(truth, other):
    """KL in nats a token."""
    return float((truth.exp() * (truth - other)).sum(-1).mean())


def test_tokens_are_in_the_vocabulary():
    assert int(TOKENS.max()) < VOCABULARY
