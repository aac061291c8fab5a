"""Loading: a plain transformers model in 4 bit, and one clear error for each thing wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.models import loading  # noqa: E402
from colab_qlora.models.settings import settings_of  # noqa: E402

pytestmark = pytest.mark.model


def test_four_bit_model_is_plain_transformers(tiny_model_folder: Path) -> None:
    import bitsandbytes
    import transformers

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 128)
    assert type(model) is transformers.LlamaForCausalLM
    q_proj = model.model.layers[0].self_attn.q_proj
    assert type(q_proj) is bitsandbytes.nn.Linear4bit
    assert q_proj.weight.quant_state.quant_type == "nf4"
    assert q_proj.weight.quant_state.nested  # double quantisation
    assert q_proj.weight.quant_state.blocksize == 64
    assert type(model.lm_head) is torch.nn.Linear
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 128
    settings = settings_of(model)
    assert settings is not None
    assert (settings.max_seq_length, settings.use_gradient_checkpointing) == (128, None)
    assert q_proj.compute_dtype == getattr(torch, settings.compute_dtype) == model.dtype


@pytest.mark.parametrize("dtype", ["float32", "bf16", torch.float32, torch.bfloat16])
def test_asked_dtype_is_used(tiny_model_folder: Path, dtype: object) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype=dtype)
    wanted = torch.bfloat16 if "b" in str(dtype).split(".")[-1][:1] else torch.float32
    assert model.model.layers[1].mlp.up_proj.compute_dtype == wanted


def test_float16_is_never_used_on_a_cpu(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, where float16 is fine")
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float16")
    assert model.dtype != torch.float16
    assert "float16" in capsys.readouterr().out
    settings = settings_of(model)
    assert settings is not None and len(settings.notes) == 1


def test_sixteen_bit_on_request(tiny_model_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, load_in_4bit=False)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_stored_quantisation_gets_this_machines_compute_dtype() -> None:
    # hub checkpoints store bfloat16, which a T4 does not have
    config = SimpleNamespace(
        quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    )
    assert loading._quantization(config, torch.float16, True, False) is None
    assert config.quantization_config["bnb_4bit_compute_dtype"] == "float16"


def test_quantised_checkpoint_loads_again_with_the_same_logits(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    model.save_pretrained(tmp_path / "quantised")
    tokenizer.save_pretrained(tmp_path / "quantised")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "quantised"), 64)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_positions_can_be_stretched(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"got 1000; allowed: at most 512 tokens.*factor.*2\.0"):
        FastLanguageModel.from_pretrained(str(tiny_model_folder), 1000)
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny_model_folder), 1000, rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    assert model.config.max_position_embeddings == 1024
    assert model.config.rope_parameters["factor"] == 2.0


@pytest.mark.parametrize("length", [0, -1, 2.5, "512", True, None])
def test_length_must_be_a_number_of_tokens(length: object) -> None:
    with pytest.raises(UserError, match="max_seq_length is not a number of tokens"):
        FastLanguageModel.from_pretrained("embedded", length)  # type: ignore[arg-type]


def test_four_and_eight_bit_exclude_each_other() -> None:
    with pytest.raises(UserError, match="both set"):
        FastLanguageModel.from_pretrained("embedded", 64, load_in_8bit=True)


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"not a model folder: it has no config.json.*notes.txt"):
        FastLanguageModel.from_pretrained(str(tmp_path), 64)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got nothing at that path"):
        FastLanguageModel.from_pretrained(str(tmp_path / "missing"), 64)


def test_cut_off_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_model_folder, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(UserError, match="weights of .* are cut off or damaged"):
        FastLanguageModel.from_pretrained(str(folder), 64)


def test_hub_name_without_network() -> None:
    with pytest.raises(UserError, match="some-one/some-model could not be loaded.*embedded"):
        FastLanguageModel.from_pretrained("some-one/some-model", 64)


class _Mark:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_refused_and_not_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "it_ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Mark(str(marker))))
    with pytest.raises(UserError, match="holds no safetensors weights: got pytorch_model.bin"):
        FastLanguageModel.from_pretrained(str(folder), 64)
    assert not marker.exists()


def test_remote_code_is_not_run_unless_asked_for(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(tiny_model_folder, folder)
    marker = tmp_path / "it_ran"
    (folder / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "unheard_of"
    config["auto_map"] = {
        "AutoConfig": "modeling_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.X",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trust_remote_code=True"):
        FastLanguageModel.from_pretrained(str(folder), 64)
    assert not marker.exists()


def test_tokenizer_without_end_token_is_refused(tiny_model_folder: Path) -> None:
    model = SimpleNamespace(config=SimpleNamespace(), generation_config=None)
    tokenizer = SimpleNamespace(eos_token=None, pad_token=None)
    with pytest.raises(UserError, match="could not learn to stop"):
        loading._prepare_tokenizer(tokenizer, model, 64)


def test_tokenizer_alone(tiny_model_folder: Path) -> None:
    tokenizer = loading.load_tokenizer(str(tiny_model_folder))
    assert tokenizer("a b").input_ids


def test_evaluating_first_does_not_change_what_is_learned(tiny_model_folder: Path) -> None:
    ids = torch.arange(64).reshape(2, 32)
    gradients = []
    for evaluate_first in (False, True):
        model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
        model = FastLanguageModel.get_peft_model(
            model, r=4, random_state=0, use_gradient_checkpointing=False
        )
        if evaluate_first:
            with torch.no_grad():
                model.eval()(input_ids=ids, labels=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
