"""Gemma and Phi from a folder: in 4 bit, under the names of tutorials, planned, generating."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import FAMILIES, largest_error  # noqa: E402

from colab_qlora import FastLanguageModel, describe, plan_memory, restore  # noqa: E402
from colab_qlora.activations.gpu_profile import profile_named  # noqa: E402
from colab_qlora.activations.memory_plan import Workload  # noqa: E402
from colab_qlora.activations.model_shape import shape_of  # noqa: E402
from colab_qlora.activations.recorded_shapes import recorded_shape  # noqa: E402
from colab_qlora.models.adapters import DEFAULT_TARGETS, linear_names  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of  # noqa: E402
from colab_qlora.models.smart import workload_of  # noqa: E402

pytestmark = pytest.mark.model
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = ("phi4_mini", "gemma2", "gemma3")
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folders(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of three layers with the embedded model's tokenizer, saved as their authors do.

    Rows of 64 and 128 numbers: those that are no multiple of a block of NF4, bitsandbytes 0.50
    decodes wrongly on a CPU. The vocabulary's size is that of the tokenizer.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder)
    found = {}
    for family in NEW:
        fields = {**FAMILIES[family].to_dict(), **SIZES, "vocab_size": len(tokenizer)}
        if family == "phi4_mini":
            factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 5.0]}
            fields["rope_parameters"] = {**fields["rope_parameters"], **factors}
        config = type(FAMILIES[family])(**fields)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models") / family
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[family] = folder
    return found


def adapted(folder: Path, **options: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def tokens() -> Any:
    torch.manual_seed(4)
    return torch.randint(5, 500, (2, 12)).to(DEVICE)


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("family", NEW)
def test_four_bit_weights_train_as_in_the_models_own_code(
    folders: dict[str, Path], family: str
) -> None:
    model = adapted(folders[family], use_gradient_checkpointing=False)
    assert len(fused_layers(model)) == 3
    assert "nf4 weight, LoRA rank 4 inside" in str(describe(model))
    loss, ours = loss_and_gradients(model)
    state = state_of(model)
    assert state is not None and not state.stock_passes
    restore(model)
    stock, theirs = loss_and_gradients(model)
    assert loss == pytest.approx(stock, rel=1e-5)
    assert largest_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("family", NEW)
def test_smart_checkpointing_plans_them(
    folders: dict[str, Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(folders[family])
    _, ours = loss_and_gradients(model)
    assert "2 x 64 tokens needs" in capsys.readouterr().out
    restore(model)
    assert largest_error(ours, loss_and_gradients(model)[1]) < 1e-3


@pytest.mark.parametrize("family", NEW)
def test_what_a_plan_takes_is_known_before_and_after_loading(
    folders: dict[str, Path], family: str
) -> None:
    before = plan_memory(str(folders[family]), 2, 64, "T4", r=4)
    model = adapted(folders[family])
    after = workload_of(model)
    assert before.fits
    assert before.workload.shape == after.shape
    assert {r for r in dict(after.rank).values()} == {4}


def test_recorded_sizes_are_those_of_transformers_defaults() -> None:
    phi = transformers.Phi3Config(sliding_window=2047)
    assert recorded_shape("microsoft/Phi-3-mini-4k-instruct") == shape_of(phi)
    assert recorded_shape("google/gemma-2-2b-it") == shape_of(transformers.Gemma2Config())


def test_bounded_scores_make_a_step_longer() -> None:
    capped = recorded_shape("gemma-2-2b")
    assert capped is not None
    plain = replace(capped, has_score_cap=False)
    seconds = [
        Workload("", shape, 16, 1, 2048).batch_on(profile_named("T4")).step_s([])
        for shape in (plain, capped)
    ]
    assert seconds[0] < seconds[1]


@pytest.mark.parametrize(
    ("gpu", "length", "kernel"),
    [("T4", 2048, "math"), ("L4", 4096, "triton"), ("H100", 4096, "triton"), ("L4", 4097, "math")],
)
def test_which_kernel_bounds_scores(gpu: str, length: int, kernel: str) -> None:
    capped = recorded_shape("gemma-2-2b")
    assert capped is not None
    work = Workload("", capped, 16, 1, length)
    assert work.batch_on(profile_named(gpu)).settings.attention == kernel
    wide = replace(work, settings=replace(work.settings, itemsize=4))
    assert wide.batch_on(profile_named(gpu)).settings.attention == "math"
    # one document may be as long as the row
    packed = replace(work, document_tokens=300)
    assert packed.batch_on(profile_named(gpu)).settings.attention == kernel


def test_tutorials_names_mean_what_the_model_has(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(folders["phi4_mini"]), 64, dtype="float32")
    own = {name.rsplit(".", 1)[-1] for name in linear_names(base)}
    assert own == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    capsys.readouterr()
    model = FastLanguageModel.get_peft_model(base, r=4, target_modules=list(DEFAULT_TARGETS))
    assert model.peft_config["default"].target_modules == own
    assert "is for more" not in capsys.readouterr().out
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3 * 4 * 2  # layers x linears x (A, B)


def test_an_adapter_that_computes_more_than_was_asked_for_is_said(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(folders["phi4_mini"], target_modules=["q_proj", "v_proj"])
    assert model.peft_config["default"].target_modules == {"qkv_proj"}
    said = capsys.readouterr().out
    assert "the adapter for q_proj, v_proj is for more: this model has one linear, qkv_proj" in said


def test_stretched_positions_are_those_of_layers_without_a_window(
    folders: dict[str, Path],
) -> None:
    source = str(folders["gemma3"])
    plain, _ = FastLanguageModel.from_pretrained(source, 64, dtype="float32")
    scaling = {"rope_type": "linear", "factor": 2.0}
    longer, _ = FastLanguageModel.from_pretrained(
        source, 100, dtype="float32", rope_scaling=scaling
    )
    before, after = plain.model.rotary_emb, longer.model.rotary_emb
    assert torch.equal(after.full_attention_inv_freq, before.full_attention_inv_freq / 2)
    assert torch.equal(after.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
    assert longer.config.max_position_embeddings == 128


@pytest.mark.parametrize("family", NEW)
def test_generation_and_the_adapter_from_disk(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model = adapted(folders[family])
    FastLanguageModel.for_inference(model)
    ids = tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    fused = model.generate(input_ids=ids, **options)
    model.save_pretrained(tmp_path)
    restore(model)
    assert torch.equal(model.generate(input_ids=ids, **options), fused)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), 64, dtype="float32")
    assert len(fused_layers(again)) == 3
    FastLanguageModel.for_inference(again)
    assert torch.equal(again.generate(input_ids=ids, **options), fused)
