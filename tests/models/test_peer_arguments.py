"""Keyword arguments of tutorials: each is honoured, comes about by itself, or is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer, UserError  # noqa: E402
from colab_qlora.models import peer_arguments as peers  # noqa: E402
from colab_qlora.models.fuse import fused_layers  # noqa: E402

pytestmark = pytest.mark.model

LENGTH = 64
# every argument of from_pretrained and get_peft_model in the tutorials' cells of the last two years
IN_TUTORIALS = {
    peers.LOAD: (
        "model_name max_seq_length dtype load_in_4bit load_in_8bit load_in_16bit load_in_fp8 "
        "full_finetuning token device_map rope_scaling fix_tokenizer trust_remote_code "
        "use_gradient_checkpointing resize_model_vocab revision use_exact_model_name "
        "offload_embedding float32_mixed_precision fast_inference gpu_memory_utilization "
        "float8_kv_cache random_state max_lora_rank disable_log_stats qat_scheme "
        "unsloth_tiled_mlp attn_implementation"
    ),
    peers.ADAPT: (
        "r target_modules lora_alpha lora_dropout bias layers_to_transform layers_pattern "
        "use_gradient_checkpointing random_state max_seq_length use_rslora modules_to_save "
        "init_lora_weights loftq_config temporary_location qat_scheme finetune_vision_layers "
        "finetune_language_layers finetune_attention_modules finetune_mlp_modules "
        "finetune_last_n_layers use_dora task_type"
    ),
}


def _load(folder: Path, **kwargs: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(folder), LENGTH, **kwargs)[0]


def _rows(where: str, verdict: str) -> list[Any]:
    return [row for row in peers.TABLE if where in row.where and row.verdict == verdict]


@pytest.mark.parametrize("where", IN_TUTORIALS)
def test_every_argument_of_the_tutorials_is_in_the_table_once(where: str) -> None:
    names = [row.name for row in peers.TABLE if where in row.where]
    assert len(names) == len(set(names))
    assert set(IN_TUTORIALS[where].split()) <= set(names)


def test_what_is_honoured_is_taken_by_somebody() -> None:
    own = {
        peers.LOAD: set(inspect.signature(FastLanguageModel.from_pretrained).parameters),
        peers.ADAPT: set(inspect.signature(FastLanguageModel.get_peft_model).parameters),
    }
    further = {
        # each has a test of its own below
        peers.LOAD: {"torch_dtype", "load_in_16bit", "full_finetuning", "float32_mixed_precision"}
        | {"quantization_config", "use_auth_token", "attn_implementation"},
        peers.ADAPT: {"finetune_attention_modules", "finetune_mlp_modules"}
        | {"finetune_last_n_layers"}
        | set(inspect.signature(peft.LoraConfig).parameters),
    }
    for where, names in own.items():
        honoured = {row.name for row in _rows(where, peers.HONOURED)}
        assert honoured <= names | further[where]


def test_what_comes_about_by_itself_is_taken_and_changes_nothing(tiny_model_folder: Path) -> None:
    given = {row.name: True for row in _rows(peers.LOAD, peers.BY_ITSELF)}
    model = _load(tiny_model_folder, dtype="float32", **given)
    adapting = {row.name: object() for row in _rows(peers.ADAPT, peers.BY_ITSELF)}
    adapting["max_seq_length"] = LENGTH
    model = FastLanguageModel.get_peft_model(model, r=2, **adapting)
    plain = FastLanguageModel.get_peft_model(_load(tiny_model_folder, dtype="float32"), r=2)
    ours, theirs = model.peft_config["default"], plain.peft_config["default"]
    assert ours.to_dict() == theirs.to_dict()
    assert model.config.to_dict() == plain.config.to_dict()
    expected = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name


REFUSED = [(row.where[-1], row) for row in peers.TABLE if row.verdict == peers.REFUSED]


@pytest.mark.parametrize(("where", "row"), REFUSED, ids=[row.name for _, row in REFUSED])
def test_refused_in_one_sentence_unless_it_asks_for_nothing(
    tiny_model_folder: Path, where: str, row: Any
) -> None:
    value = False if row.harmless == (None, True) else "something"
    with pytest.raises(UserError) as caught:
        if where == peers.LOAD:
            _load(tiny_model_folder, **{row.name: value})
        else:
            peers.check_peer_arguments(where, {row.name: value})
    message = str(caught.value)
    assert message.startswith(f"{row.name} is not to be had here: {row.what}: got {value!r}. ")
    assert "\n" not in message and message.endswith(f"{row.do}.")
    given = {row.name: row.harmless[-1], "other": 1}
    peers.check_peer_arguments(where, given)
    assert given == {"other": 1}


def test_an_unknown_argument_is_named_with_what_may_be_meant(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        _load(tiny_model_folder, load_in_8bits=False)
    assert str(caught.value) == (
        "from_pretrained has no such argument: got load_in_8bits; allowed: such as load_in_8bit, "
        "load_in_4bit, load_in_16bit. Check the spelling, or leave it out."
    )
    with pytest.raises(UserError) as caught:
        # what is meant is not to be had either
        _load(tiny_model_folder, fast_inferense=False)
    assert "fast_inference." not in str(caught.value)
    # an error of another call is not one of these arguments'
    with pytest.raises(TypeError, match="other"), peers.unknown_arguments_named(["mine"]):
        (lambda: None)(other=1)  # type: ignore[call-arg]


def test_table_as_markdown_has_a_row_for_each() -> None:
    lines = peers.as_markdown().splitlines()
    assert lines[0] == "| argument of | name | here | what it does |"
    assert len(lines) == len(peers.TABLE) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert "| `from_pretrained` | `load_in_8bit` | honoured | LLM.int8;" in peers.as_markdown()


@pytest.mark.parametrize(
    ("given", "dtype", "is_4bit"),
    [
        ({"torch_dtype": "float32"}, torch.float32, True),
        ({"load_in_16bit": True, "dtype": "bfloat16"}, torch.bfloat16, False),
        ({"load_in_4bit": False, "dtype": torch.float32}, torch.float32, False),
        ({"use_auth_token": "secret", "dtype": "float32"}, torch.float32, True),
        ({"quantization_config": None, "dtype": "float32"}, torch.float32, True),
    ],
)
def test_precision_arguments(
    tiny_model_folder: Path, given: dict, dtype: torch.dtype, is_4bit: bool
) -> None:
    model = _load(tiny_model_folder, **given)
    assert model.get_input_embeddings().weight.dtype == dtype
    assert bool(getattr(model, "is_loaded_in_4bit", False)) is is_4bit


def test_quantization_config_stands_in_for_the_switches(tiny_model_folder: Path) -> None:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32
    )
    model = _load(tiny_model_folder, dtype="float32", quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"


def test_attention_of_the_models_own_code(tiny_model_folder: Path) -> None:
    model = _load(tiny_model_folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("wide", [None, True])
def test_full_finetuning_moves_every_weight(
    tiny_model_folder: Path, tmp_path: Path, wide: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_model_folder),
        LENGTH,
        full_finetuning=True,
        float32_mixed_precision=wide,
        use_gradient_checkpointing="unsloth",
    )
    same = FastLanguageModel.get_peft_model(model, r=4)
    assert same is model
    assert "no adapters are attached; it was loaded with full_finetuning" in capsys.readouterr().out
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes <= ({torch.float32} if wide else {torch.float32, torch.bfloat16})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"text": f"row number {i} of a few"} for i in range(8)]
    args = SFTConfig(str(tmp_path), max_steps=2, learning_rate=1e-2, warmup_steps=0)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=rows)
    assert trainer.args.gradient_checkpointing is True
    assert trainer.train().global_step == 2
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization": "dynamic"}, "quantization='dynamic'"),
        ({"quantization": "nf4"}, "quantization='nf4'"),
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}, "quant.*fig"),
    ],
)
def test_full_finetuning_of_few_bits_is_refused(
    tiny_model_folder: Path, given: dict, said: str
) -> None:
    with pytest.raises(UserError, match=f"few bits cannot be .*: got full_finetuning=True.*{said}"):
        _load(tiny_model_folder, full_finetuning=True, **given)


def test_full_finetuning_of_a_quantised_checkpoint_names_the_16_bit_one(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _load(tiny_model_folder, dtype="float32").save_pretrained(tmp_path / "four")
    said = "those of this checkpoint are quantised: got {};.*Load {}, or leave full_finetuning out"
    with pytest.raises(
        UserError, match=said.format(tmp_path / "four", "the checkpoint that it .*")
    ):
        _load(tmp_path / "four", full_finetuning=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "four")
    # a hub's model, of which nothing but the config is asked for
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: config)
    with pytest.raises(UserError, match=said.format("ada/tiny-bnb-4bit", "ada/tiny")):
        FastLanguageModel.from_pretrained("ada/tiny-bnb-4bit", full_finetuning=True)


def test_full_finetuning_in_float16_is_refused(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colab_qlora.models import peer_options

    # as on a T4; a CPU computes in another dtype, whatever was asked for
    monkeypatch.setattr(peer_options, "resolve_dtype", lambda *a: (torch.float16, None))
    with pytest.raises(UserError, match="float16 cannot be trained whole.*allowed: float32, and"):
        _load(tiny_model_folder, full_finetuning=True, dtype="float16")


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({"finetune_mlp_modules": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"finetune_attention_modules": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"finetune_attention_modules": True, "target_modules": ["q_proj"]}, {"q_proj"}),
        (
            {"finetune_mlp_modules": False, "target_modules": ["q_proj", "up_proj"]},
            {"q_proj"},
        ),
    ],
)
def test_parts_to_train(tiny_model_folder: Path, given: dict, trained: set[str]) -> None:
    model = FastLanguageModel.get_peft_model(_load(tiny_model_folder), r=2, **given)
    names = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in _trainable(model)}
    assert names == trained


def _trainable(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_last_layers_only(tiny_model_folder: Path) -> None:
    base = _load(tiny_model_folder)
    with pytest.raises(UserError, match="not a number of layers: got 3; allowed: an integer from"):
        FastLanguageModel.get_peft_model(base, finetune_last_n_layers=3)
    model = FastLanguageModel.get_peft_model(base, r=2, finetune_last_n_layers=1)
    names = _trainable(model)
    assert names and all(".layers.1." in name for name in names)
    assert len(fused_layers(model)) == 2


def test_nothing_left_to_train(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="no module is left to train: got finetune_attention"):
        FastLanguageModel.get_peft_model(
            _load(tiny_model_folder),
            finetune_attention_modules=False,
            finetune_mlp_modules=False,
        )


def test_embedding_and_head_among_the_targets_are_trained_whole(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["q_proj", "up_proj", "embed_tokens", "lm_head"]
    model = FastLanguageModel.get_peft_model(
        _load(tiny_model_folder), r=2, target_modules=targets, use_rslora=True, loftq_config=None
    )
    assert "embed_tokens and lm_head will be trained whole" in capsys.readouterr().out
    whole = [name for name in _trainable(model) if "modules_to_save" in name]
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in whole} == {
        "embed_tokens",
        "lm_head",
    }
    lora = next(m for m in model.modules() if hasattr(m, "lora_A"))
    assert lora.scaling["default"] == pytest.approx(16 / 2**0.5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "corda", "olora", "OLoRA", "lora_ga"])
def test_starts_that_change_a_quantised_base_are_refused(
    tiny_model_folder: Path, start: str
) -> None:
    with pytest.raises(UserError, match="changes the base's weights, which are quantised. Load"):
        FastLanguageModel.get_peft_model(_load(tiny_model_folder), init_lora_weights=start)


@pytest.mark.parametrize("start", ["orthogonal", "mica"])
def test_starts_that_need_dense_weights_are_refused(tiny_model_folder: Path, start: str) -> None:
    with pytest.raises(UserError, match="needs the base's weights, which are quantised. Load"):
        FastLanguageModel.get_peft_model(_load(tiny_model_folder), init_lora_weights=start)
    model = FastLanguageModel.get_peft_model(
        _load(tiny_model_folder, load_in_4bit=False, dtype="float32"), r=2, init_lora_weights=start
    )
    assert fused_layers(model)


def test_for_training_takes_the_checkpointing(tiny_model_folder: Path) -> None:
    model = FastLanguageModel.get_peft_model(
        _load(tiny_model_folder), r=2, use_gradient_checkpointing=False
    )
    FastLanguageModel.for_inference(model)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert model.training
    assert all(layer.gradient_checkpointing for layer in fused_layers(model))


def test_the_table_in_the_documents_is_this_one() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "coming_from_unsloth.md"
    assert "\n\n" + peers.as_markdown() + "\n" in path.read_text(encoding="utf-8")
