"""Models that were loaded in 4 bits: their adapters go into the 16-bit checkpoint, or nowhere."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from model_files import adapted, byte_level, read_gguf, write_model  # noqa: E402
from small_checkpoint import (  # noqa: E402
    assert_same_weights,
    load_mixed,
    load_nf4,
    load_plain,
    logits,
    randomise,
)

from colab_qlora import UserError  # noqa: E402
from colab_qlora.export import base_weights  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.export.save_gguf import save_pretrained_gguf  # noqa: E402
from colab_qlora.models.settings import settings_of  # noqa: E402
from colab_qlora.quantization.stock_checkpoint import save_stock_checkpoint  # noqa: E402

HUB_NAME = "ada/tiny-unsloth-bnb-4bit"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("smollm")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "tiny", "llama", tokenizer)


@pytest.fixture(scope="module")
def four_bit_folder(folder, tmp_path_factory):
    return save_stock_checkpoint(load_nf4(folder), tmp_path_factory.mktemp("base") / "four")


def from_four_bits(four_bit_folder, seed=1):
    """An adapted model whose own checkpoint is quantised."""
    return adapted(load_nf4(four_bit_folder, quantization_config=None), seed)


def test_into_the_checkpoint_that_is_named(folder, four_bit_folder, tmp_path):
    model = from_four_bits(four_bit_folder)
    truth = save_pretrained_merged(adapted(load_nf4(folder)), tmp_path / "truth")
    saved = save_pretrained_merged(model, tmp_path / "out", base_model=str(folder))
    assert_same_weights(load_plain(saved), load_plain(truth))


def test_gguf_too(folder, four_bit_folder, tokenizer, tmp_path):
    [ours] = save_pretrained_gguf(
        from_four_bits(four_bit_folder), tmp_path / "a", tokenizer, "f32", base_model=str(folder)
    )
    [truth] = save_pretrained_gguf(adapted(load_nf4(folder)), tmp_path / "b", tokenizer, "f32")
    found, wanted = read_gguf(ours)[1], read_gguf(truth)[1]
    assert found.keys() == wanted.keys()
    assert all((found[name][1] == wanted[name][1]).all() for name in wanted)


def test_without_it_rounded_weights_are_not_merged_into(four_bit_folder, tmp_path):
    with pytest.raises(UserError, match=r"loaded from a checkpoint that is quantised"):
        save_pretrained_merged(from_four_bits(four_bit_folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_by_its_name_on_a_hub(folder, four_bit_folder, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    fetched = []

    def fetch(name, **options):
        fetched.append((name, options["token"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(base_weights, "_check_room", lambda *args: None)
    model = from_four_bits(four_bit_folder)
    settings_of(model).model_name = HUB_NAME
    saved = save_pretrained_merged(model, tmp_path / "out", token="hf_mine")
    assert fetched == [("ada/tiny", "hf_mine")]
    assert capsys.readouterr().out.count("16-bit weights of ada/tiny.") == 1
    truth = save_pretrained_merged(adapted(load_nf4(folder)), tmp_path / "truth")
    assert_same_weights(load_plain(saved), load_plain(truth))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "unsloth/llama-3-8b-Instruct"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("ada/tiny-4bit", None),
    ],
)
def test_names(four_bit_folder, name, plain):
    model = from_four_bits(four_bit_folder)
    settings_of(model).model_name = name
    assert base_weights.name_in_16_bits(model) == plain


def test_a_model_that_was_quantised_on_the_way_has_its_own(folder):
    for load in (load_nf4, load_mixed, load_plain):
        model = load(folder)
        if settings_of(model):
            settings_of(model).model_name = HUB_NAME
        assert base_weights.name_in_16_bits(model) is None


def test_the_checkpoint_of_another_model(four_bit_folder, tokenizer, tmp_path):
    other = load_plain(write_model(tmp_path / "plain", "llama", tokenizer))
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is not the model that was loaded.*differs by 1\d\d%"):
        save_pretrained_merged(
            from_four_bits(four_bit_folder), tmp_path / "out", base_model=str(tmp_path / "other")
        )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_4_bits_is_none(four_bit_folder, tmp_path):
    with pytest.raises(UserError, match="in the checkpoint is quantised already"):
        save_pretrained_merged(
            from_four_bits(four_bit_folder), tmp_path / "out", base_model=str(four_bit_folder)
        )


def test_a_base_of_ones_own_for_a_16_bit_model(folder, tmp_path):
    model = adapted(load_plain(folder, dtype=torch.float32))
    saved = save_pretrained_merged(model, tmp_path / "out", base_model=str(folder))
    assert (logits(load_plain(saved)) - logits(model)).abs().max() < 1e-4


def test_a_disk_that_is_too_small_for_it(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants

    files = {
        "model-00001-of-00002.safetensors": 9 * 2**30,
        "model-00002-of-00002.safetensors": 7 * 2**30,
        "consolidated.safetensors": 16 * 2**30,
        "config.json": 1000,
    }
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    info = SimpleNamespace(siblings=siblings)
    api = SimpleNamespace(model_info=lambda name, files_metadata: info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=15 * 2**30))
    with pytest.raises(UserError, match=r"15.00 GiB free; allowed: 16.00 GiB or more.*HF_HOME"):
        base_weights._check_room("ada/tiny", None, tmp_path / "not" / "there")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=17 * 2**30))
    base_weights._check_room("ada/tiny", None, tmp_path / "not" / "there")


def test_other_adapters_give_other_weights(folder, four_bit_folder, tmp_path):
    model = from_four_bits(four_bit_folder)
    first = save_pretrained_merged(model, tmp_path / "a", base_model=str(folder))
    randomise(model, seed=5)
    second = save_pretrained_merged(model, tmp_path / "b", base_model=str(folder))
    assert (logits(load_plain(first)) - logits(load_plain(second))).abs().max() > 0.1
