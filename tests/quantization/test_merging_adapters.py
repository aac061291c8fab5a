"""Merging of what PEFT can put on a model: each kind exactly, or an error that says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from small_checkpoint import (  # noqa: E402
    adapt,
    assert_same_weights,
    exact_weights,
    is_tied,
    layers_of,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    randomise,
    write_llama,
)

from colab_qlora import UserError  # noqa: E402
from colab_qlora.quantization.merging import merge_16_bit, save_merged_16_bit  # noqa: E402

LOADS = {"nf4": load_nf4, "mixed": load_mixed}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merging") / "llama", biased=True)


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("merging") / "untied", tied=False)


@pytest.mark.parametrize("table", ["int8", "16bit"])
def test_adapters_on_embedding_and_head_untie_them(folder, tmp_path, table):
    base = load_mixed(folder, torch.float32, table=table)
    model = adapt_peft(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    source = exact_weights(folder, model_of_linears(model))
    embedding = layers_of(model)["model.embed_tokens"]
    table_16 = load_plain(folder, dtype=torch.float64).model.embed_tokens.weight.detach()
    a = embedding.lora_embedding_A["default"].double().detach()
    b = embedding.lora_embedding_B["default"].double().detach()
    source["model.embed_tokens"] = table_16 + embedding.scaling["default"] * (b @ a).T
    head = layers_of(model)["lm_head"]
    a, b = (m["default"].weight.double().detach() for m in (head.lora_A, head.lora_B))
    source["lm_head"] = table_16 + head.scaling["default"] * (b @ a)
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged, loaded = merge_16_bit(model), load_plain(saved)
    assert not is_tied(merged) and not is_tied(loaded)
    assert not loaded.config.tie_word_embeddings and not merged.config.tie_word_embeddings
    for name, weight in source.items():
        error = (merged.get_submodule(name).weight.double() - weight).abs().max()
        assert error <= 1e-6, name
    assert_same_weights(merged, loaded)


def model_of_linears(model):
    """Only the adapters that `exact_weights` knows the formula of."""
    layers = {n: m for n, m in model.named_modules() if n.endswith("q_proj")}
    return SimpleNamespace(named_modules=lambda: layers.items())


def adapt_peft(base, seed=1, **options):
    """By PEFT itself, which takes targets that the kit's own call refuses."""
    options = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    randomise(model, seed)
    return model


def test_modules_to_save_are_taken_over(untied_folder, tmp_path):
    model = adapt(load_nf4(untied_folder), modules_to_save=["lm_head", "norm"])
    trained = {}
    for name in ("lm_head", "model.norm"):
        copy = model.get_submodule(f"base_model.model.{name}").modules_to_save["default"]
        copy.weight.data += 0.25
        trained[name] = copy.weight.detach().clone()
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged = merge_16_bit(model)
    for name, weight in trained.items():
        assert torch.equal(merged.get_submodule(name).weight, weight.bfloat16()), name
    assert_same_weights(merged, load_plain(saved))


def test_rows_of_new_tokens_are_taken_over_and_stay_tied(folder, tmp_path):
    model = adapt_peft(
        load_nf4(folder),
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5, 130]},
    )
    wrapper = model.base_model.model.model.embed_tokens
    wrapper.token_adapter.trainable_tokens_delta["default"].data.fill_(0.5)
    before = load_plain(folder).model.embed_tokens.weight.detach().clone()
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged = merge_16_bit(model)
    before[[5, 130]] = 0.5
    assert torch.equal(merged.model.embed_tokens.weight, before)
    assert is_tied(merged)
    assert_same_weights(merged, load_plain(saved))


def test_active_adapters_are_added_and_others_are_not(folder):
    model = adapt(load_nf4(folder, torch.float32))
    for number, name in enumerate(("second", "third"), start=2):
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=LINEARS, task_type="CAUSAL_LM")
        model.add_adapter(name, config)
        for layer in layers_of(model).values():
            torch.manual_seed(number)
            layer.lora_B[name].weight.data.normal_(std=0.05)
    model.base_model.set_adapter(["default", "third"])
    exact = exact_weights(folder, model, ("default", "third"))
    merged = merge_16_bit(model)
    for name, weight in exact.items():
        error = (merged.get_submodule(name).weight.double() - weight).abs().max()
        assert error <= 1e-6, name


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "all"}])
def test_biases_come_along(folder, tmp_path, options):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = adapt(load_nf4(folder, torch.float32), target_modules=targets, **options)
    beside = adapt(load_plain(folder, dtype=torch.float32), target_modules=targets, **options)
    for number, pair in enumerate(zip(*map(trainable, (model, beside)), strict=True)):
        torch.manual_seed(number)
        noise = 0.1 * torch.randn(pair[0].shape)
        for parameter in pair:
            parameter.data += noise
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged = merge_16_bit(model)
    assert (logits(merged) - logits(beside)).abs().max() <= 2e-5
    assert_same_weights(merged, load_plain(saved))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_dora_is_what_peft_makes_of_it_on_dense_weights(folder, tmp_path):
    def adapted(base):
        model = adapt(base, use_dora=True, use_fused_layers=False)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                # that of the dense weights: what it starts with over quantised ones differs
                dense = load_plain(folder, dtype=torch.float32)
                module = name.split("base_model.model.")[1].split(".lora_magnitude")[0]
                norms = dense.get_submodule(module).weight.norm(dim=1)
                parameter.data.copy_(norms * torch.linspace(0.8, 1.2, len(norms)))
        return model

    model, beside = (
        adapted(load_nf4(folder, torch.float32)),
        adapted(load_plain(folder, dtype=torch.float32)),
    )
    expected = logits(beside)
    theirs = beside.merge_and_unload()
    saved = save_merged_16_bit(model, tmp_path / "merged")
    merged = merge_16_bit(model)
    for name, weight in theirs.state_dict().items():
        assert (merged.state_dict()[name] - weight).abs().max() <= 1e-6, name
    assert (logits(merged) - expected).abs().max() <= 2e-5
    assert_same_weights(merged, load_plain(saved))


def test_adapters_that_cannot_be_merged(folder):
    nf4 = load_nf4(folder)
    model = peft.get_peft_model(
        nf4, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(UserError, match="got IA3; allowed: LORA"):
        merge_16_bit(model)
    model = adapt(load_nf4(folder))
    with pytest.raises(UserError, match="Pass what get_peft_model gave"):
        merge_16_bit(model.get_base_model())
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    layer.lora_variant["default"] = SimpleNamespace()
    with pytest.raises(UserError, match="adapter default on .*up_proj is no plain LoRA"):
        merge_16_bit(model)
    layer.lora_variant.clear()
    model.peft_config["default"].init_lora_weights = "olora"
    with pytest.raises(UserError, match="started with a part of the base.*got .*'olora'"):
        merge_16_bit(model)
    model.peft_config["default"].init_lora_weights = True
    model.merge_adapter()
    with pytest.raises(UserError, match=r"is merged into .* Call model.unmerge_adapter\(\) first"):
        merge_16_bit(model)
    model.unmerge_adapter()
    assert merge_16_bit(model) is not None


def test_broken_adapters_are_not_written(folder, tmp_path):
    model = adapt(load_nf4(folder))
    layers_of(model)["model.layers.1.mlp.down_proj"].lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="down_proj has numbers that are infinite or NaN"):
        save_merged_16_bit(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
