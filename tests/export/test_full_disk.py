"""Every saving function on a file system that really becomes full: one clear line, nothing left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))

from small_checkpoint import adapt, load_nf4, logits, write_llama  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.models.peer_methods import save_lora  # noqa: E402

FULL = r"^the disk became full while \S+/out was written: got .*No space left on device.*removed\.$"
METHODS = ["lora", "merged_16bit", "merged_4bit"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return adapt(load_nf4(write_llama(tmp_path_factory.mktemp("full") / "llama")))


@pytest.fixture(scope="module")
def large_tokenizer():
    """With a tokenizer.json of about 0.5 MB."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(20_000)}
    inner = Tokenizer(models.WordLevel({**words, "</s>": 20_000}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_do_not_fit(model, small_disk, method):
    disk = small_disk(16)
    with pytest.raises(UserError, match=FULL):
        save_pretrained_merged(model, disk / "out", save_method=method)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_tokenizer_that_does_not_fit(model, large_tokenizer, small_disk, method):
    disk = small_disk(256)
    with pytest.raises(UserError, match=FULL):
        save_pretrained_merged(model, disk / "out", large_tokenizer, save_method=method)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_link_to_an_empty_folder_of_another_disk(model, small_disk, tmp_path, method):
    disk = small_disk(1024)
    (tmp_path / "out").symlink_to(disk)
    save_pretrained_merged(model, tmp_path / "out", save_method=method)
    assert (tmp_path / "out").is_symlink()
    names = {entry.name for entry in disk.iterdir()}
    assert names & {"adapter_model.safetensors", "model.safetensors"}
    assert not any(name.startswith(".") for name in names)
    if method == "lora":
        # and over what is there
        save_lora(model, tmp_path / "out")
        assert {entry.name for entry in disk.iterdir()} == names


@pytest.mark.parametrize("method", METHODS)
def test_an_earlier_folder_stays(model, large_tokenizer, small_disk, method):
    disk = small_disk(256)
    out = save_pretrained_merged(model, disk / "out", save_method="lora")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match=FULL):
        save_pretrained_merged(model, out, large_tokenizer, save_method=method, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(disk.iterdir()) == [out]


def test_a_plain_exception_of_tokenizers(model, tmp_path, monkeypatch):
    """Where nothing can be mounted: the class that tokenizers raises, in each of the methods."""
    from transformers import PreTrainedTokenizerFast

    def full(tokenizer, folder, **options):
        (Path(folder) / "tokenizer.json").write_text("half")
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    for method in METHODS:
        with pytest.raises(UserError, match=FULL):
            save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method=method)
        assert list(tmp_path.iterdir()) == []


def test_save_lora_writes_all_or_nothing(model, small_disk):
    disk = small_disk(16)
    with pytest.raises(UserError, match=FULL):
        save_lora(model, disk / "out")
    assert list(disk.iterdir()) == []
    assert logits(model).isfinite().all()


def test_save_lora_leaves_what_was_there(model, small_disk):
    disk = small_disk(16)
    (disk / "out").mkdir()
    (disk / "out" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=FULL):
        save_lora(model, disk / "out")
    assert [entry.name for entry in disk.rglob("*")] == ["out", "README.md"]
    assert (disk / "out" / "README.md").read_text() == "mine"
