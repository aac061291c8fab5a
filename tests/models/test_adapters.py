"""Adapters: a plain PeftModel in float32 over a frozen base, and back from disk unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.models.adapters import count_parameters, linear_names  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of  # noqa: E402
from colab_qlora.models.settings import settings_of  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture
def base(tiny_model_folder: Path):
    return FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)[0]


def _adapters(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_plain_peft_model_in_float32_over_a_frozen_base(base) -> None:
    model = FastLanguageModel.get_peft_model(base, r=8, lora_alpha=16)
    assert type(model) is peft.PeftModelForCausalLM
    trained = _adapters(model)
    assert len(trained) == 2 * 7 * 2  # layers x linears x (A, B)
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert all("lora_" in name for name in trained)
    assert all(not t.any() for n, t in trained.items() if "lora_B" in n)


def test_same_random_state_same_start_and_global_stream_untouched(tiny_model_folder: Path) -> None:
    starts = []
    for _ in range(2):
        model, _tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
        torch.manual_seed(7)
        before = torch.get_rng_state()
        starts.append(_adapters(FastLanguageModel.get_peft_model(model, r=4, random_state=1)))
        assert torch.equal(before, torch.get_rng_state())
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    model, _tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    other = _adapters(FastLanguageModel.get_peft_model(model, r=4, random_state=2))
    assert any(not torch.equal(starts[0][n], other[n]) for n in other)


def test_unknown_target_lists_those_that_exist(base) -> None:
    with pytest.raises(UserError) as caught:
        FastLanguageModel.get_peft_model(base, target_modules=["q_proj", "query"])
    message = str(caught.value)
    assert "got query;" in message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in message
    assert "lm_head" not in message


def test_full_names_and_shorthand_are_taken(base) -> None:
    target = "model.layers.1.mlp.up_proj"
    assert target in linear_names(base)
    model = FastLanguageModel.get_peft_model(base, r=2, target_modules=[target])
    assert len(_adapters(model)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "rank r is not positive"),
        ({"r": 2.5}, "rank r is not positive"),
        ({"lora_dropout": 1.0}, "lora_dropout is not a share"),
        ({"bias": "some"}, "bias is not understood"),
        ({"target_modules": []}, "no target module"),
        ({"target_modules": "query"}, "unknown target module: got query; allowed: down_proj"),
        ({"use_gradient_checkpointing": "clever"}, "use_gradient_checkpointing is not understood"),
        ({"use_rslora_": True}, "unknown LoRA option: got use_rslora_"),
    ],
)
def test_bad_arguments(base, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FastLanguageModel.get_peft_model(base, **arguments)


def test_a_cell_that_is_run_again_keeps_its_adapters(base, capsys) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2, use_rslora=True)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    capsys.readouterr()
    again = FastLanguageModel.get_peft_model(
        model, r=2, use_rslora=True, loftq_config={}, use_gradient_checkpointing=False
    )
    assert again is model
    assert "has these adapters already" in capsys.readouterr().out
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = settings_of(model)
    assert settings is not None and settings.use_gradient_checkpointing is False


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": [0]},
        {"modules_to_save": ["lm_head"], "init_lora_weights": "gaussian"},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_whatever_the_options_the_same_ones_are_the_same(base, options: dict, capsys) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2, **options)
    assert FastLanguageModel.get_peft_model(model, r=2, **options) is model
    with pytest.raises(UserError, match="has adapters already"):
        FastLanguageModel.get_peft_model(model, r=2, target_modules=["k_proj"])
    for name in set(options) - {"target_modules"}:
        others = {key: value for key, value in options.items() if key != name}
        with pytest.raises(UserError, match=f"has adapters already: got .*{name} .*, asked "):
            FastLanguageModel.get_peft_model(model, r=2, **others)


def test_layers_that_were_fused_stay_so_and_a_line_says_it(base, capsys) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2, use_fused_layers=False)
    assert not fused_layers(model)
    assert FastLanguageModel.get_peft_model(model, r=2) is model
    assert fused_layers(model)
    capsys.readouterr()
    FastLanguageModel.get_peft_model(model, r=2, use_fused_layers=False)
    assert fused_layers(model)
    assert "its layers stay fused: restore(model) undoes it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("again", "named"),
    [
        ({"r": 4}, "r 2, asked 4"),
        ({"r": 2, "lora_alpha": 8}, "lora_alpha 16, asked 8"),
        ({"r": 2, "use_rslora": True}, "use_rslora False, asked True"),
        ({"r": 2, "target_modules": ["q_proj"]}, r"target_modules down_proj, .*, asked q_proj\. "),
        ({"r": 2, "target_modules": r".*q_proj"}, "asked .*q_proj"),
    ],
)
def test_other_adapters_are_not_attached_on_top(base, again: dict, named: str) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2)
    with pytest.raises(UserError, match=f"has adapters already: got .*{named}"):
        FastLanguageModel.get_peft_model(model, **again)


def test_a_second_adapter_beside_the_first_is_none_of_ours(base) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2)
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(UserError, match="has adapters already: got default, other"):
        FastLanguageModel.get_peft_model(model, r=2)


def test_without_a_seed_adapters_start_differently(base) -> None:
    starts = []
    for _ in range(2):
        state = torch.get_rng_state()
        model = FastLanguageModel.get_peft_model(base, r=2, random_state=None)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(next(p for n, p in model.named_parameters() if "lora_A" in n).clone())
        base = model.unload()
    assert not torch.equal(*starts)


@pytest.mark.parametrize(
    ("asked", "stored", "layers_checkpoint"),
    [
        (False, False, False),
        (True, True, True),
        ("smart", "smart", True),
        ("unsloth", "smart", True),
        ("False", False, False),
    ],
)
def test_checkpointing_modes(base, asked: object, stored: object, layers_checkpoint: bool) -> None:
    model = FastLanguageModel.get_peft_model(base, r=2, use_gradient_checkpointing=asked)
    settings = settings_of(model)
    assert settings is not None and settings.use_gradient_checkpointing == stored
    layers = base.model.layers
    assert {layer.gradient_checkpointing for layer in layers} == {layers_checkpoint}

    FastLanguageModel.for_inference(model)
    assert not model.training and model.config.use_cache
    assert not any(layer.gradient_checkpointing for layer in layers)
    FastLanguageModel.for_training(model)
    assert model.training and not model.config.use_cache
    assert {layer.gradient_checkpointing for layer in layers} == {layers_checkpoint}


def test_checkpointing_gives_the_same_gradients(tiny_model_folder: Path) -> None:
    ids = torch.arange(64).reshape(2, 32)
    gradients = []
    for mode in (False, "smart"):
        model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
        model = FastLanguageModel.get_peft_model(
            model, r=4, random_state=0, use_gradient_checkpointing=mode
        )
        FastLanguageModel.for_training(model)
        state = state_of(model)
        assert state is not None
        # the same cuts of the work: by itself, recomputation takes smaller ones
        state.max_weight_bytes, state.mlp_tokens = 2**40, 2**20
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(g.any() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_saved_adapter_comes_back_with_its_base(base, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(base, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 64)
    assert isinstance(again, peft.PeftModel)
    assert sum(p.requires_grad for p in again.parameters()) == 28  # it can be trained further
    settings = settings_of(again)
    assert settings is not None and settings.use_gradient_checkpointing == "smart"
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, expected)


def test_revision_is_that_of_the_adapters_base(
    base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    FastLanguageModel.get_peft_model(base, r=2).save_pretrained(tmp_path)
    asked: dict[str, object] = {}

    def watch(kind: type) -> None:
        own = kind.from_pretrained

        def load(source: str, **options: object) -> object:
            # the first of each kind is the base's; the tokenizer beside the adapter may follow
            asked.setdefault(kind.__name__, options.get("revision"))
            return own(source, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)

    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in kinds:
        watch(getattr(transformers, name))
    FastLanguageModel.from_pretrained(str(tmp_path), 64, revision="v2")
    assert asked == dict.fromkeys(kinds, "v2")


def test_adapter_folder_without_weights(base, tmp_path: Path) -> None:
    FastLanguageModel.get_peft_model(base, r=2).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no adapter weights"):
        FastLanguageModel.from_pretrained(str(tmp_path), 64)


def test_parameters_are_counted_unpacked(base) -> None:
    model = FastLanguageModel.get_peft_model(base, r=4)
    trainable, total = count_parameters(model)
    hidden, inner, kv = 64, 128, 32
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    vocabulary = model.config.vocab_size * hidden
    norms = (2 * 2 + 1) * hidden
    assert trainable == sum(p.numel() for p in _adapters(model).values())
    assert total - trainable == 2 * per_layer + vocabulary + norms
