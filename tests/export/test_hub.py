"""Uploads to a stand-in of a model hub on this machine: what arrives, and what a failure leaves."""

from __future__ import annotations

import shutil
import socket
import sys
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")
huggingface_hub = pytest.importorskip("huggingface_hub")

from hub_server import READ_ONLY, TOKEN, running_hub  # noqa: E402
from model_files import adapted, byte_level, write_model  # noqa: E402
from small_checkpoint import load_nf4  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.export import hub as hub_module  # noqa: E402
from colab_qlora.export.hub import (  # noqa: E402
    push_to_hub,
    push_to_hub_gguf,
    push_to_hub_merged,
)
from colab_qlora.export.hub_token import find_token  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.export.save_gguf import save_pretrained_gguf  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("smollm")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hub") / "tiny", "llama", tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return adapted(load_nf4(folder))


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch, tmp_path):
    """No token of the machine that runs the tests, and a hub that may be asked."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # large files by the protocol that the stand-in speaks
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setitem(sys.modules, "google.colab", None)


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made; has to be empty afterwards."""
    import tempfile

    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


def on_disk(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


def test_the_adapter(model, tokenizer, hub, tmp_path, scratch):
    address = push_to_hub(model, "ada/adapter", tokenizer, token=TOKEN, endpoint=hub.endpoint)
    assert address == f"{hub.endpoint}/ada/adapter"
    saved = save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method="lora")
    # the card would name a folder of this machine as the base model, which a hub refuses
    assert hub.files("ada/adapter") == on_disk(saved)
    assert (saved / "README.md").is_file()
    assert hub.messages == ["Upload by colab_qlora"]


def test_a_base_without_adapters(folder, hub, scratch):
    push_to_hub(load_nf4(folder), "ada/base", token=TOKEN, endpoint=hub.endpoint)
    assert {"config.json", "model.safetensors"} <= hub.files("ada/base").keys()


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "lora"])
def test_merged(model, tokenizer, hub, tmp_path, scratch, method):
    push_to_hub_merged(
        model, "ada/merged", tokenizer, save_method=method, token=TOKEN, private=True,
        commit_message="Mine", max_shard_size="30KB", endpoint=hub.endpoint,
    )  # fmt: skip
    saved = save_pretrained_merged(
        model, tmp_path / "out", tokenizer, method, max_shard_size="30KB"
    )
    assert hub.files("ada/merged") == on_disk(saved)
    assert hub.private == {"ada/merged"} and hub.messages == ["Mine"]


def test_gguf(model, tokenizer, hub, tmp_path, scratch):
    push_to_hub_gguf(
        model,
        "ada/gguf",
        tokenizer,
        quantization_type=["F16", "q8_0"],
        token=TOKEN,
        endpoint=hub.endpoint,
    )
    save_pretrained_gguf(model, tmp_path / "out", tokenizer, ["f16", "q8_0"])
    assert hub.files("ada/gguf") == on_disk(tmp_path / "out")
    assert {"tiny.F16.gguf", "tiny.Q8_0.gguf", "Modelfile"} == hub.files("ada/gguf").keys()


def test_saving_that_pushes_too(model, tokenizer, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"push_to_hub": True, "token": TOKEN, "endpoint": hub.endpoint}
    # what a kill of an earlier export left
    left = tmp_path / "ada" / "merged" / ".0123abcd.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    merged = save_pretrained_merged(model, "ada/merged", tokenizer, **options)
    shutil.rmtree(left)
    assert hub.files("ada/merged") == on_disk(merged)
    # a folder may hold other things
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "notes.txt").write_text("mine")
    [file] = save_pretrained_gguf(model, "gguf", tokenizer, **options)
    assert hub.files("ada/gguf")[file.name] == file.read_bytes()
    assert hub.files("ada/gguf").keys() == {file.name, "Modelfile"}


def test_a_name_of_ones_own_a_branch_and_again(model, hub, scratch):
    for _ in range(2):
        address = push_to_hub(model, "again", token=TOKEN, revision="second", endpoint=hub.endpoint)
    assert address.endswith("/ada/again")
    assert hub.files("ada/again") == {}
    assert "adapter_model.safetensors" in hub.files("ada/again", "second")


def test_the_address_of_the_environment(model, hub, monkeypatch, scratch):
    from huggingface_hub import constants

    # what HF_ENDPOINT sets when the library is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert push_to_hub(model, "ada/x") == f"{hub.endpoint}/ada/x"
    assert {token for _, path, token in hub.requests if path.startswith("/api")} == {TOKEN}


def writes_nothing(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was written")

    monkeypatch.setattr(hub_module, "save_pretrained_merged", fail)
    monkeypatch.setattr(hub_module, "save_pretrained_gguf", fail)


PUSHES = [push_to_hub, push_to_hub_merged, push_to_hub_gguf]


@pytest.mark.parametrize("push", PUSHES)
def test_no_token(model, hub, monkeypatch, push):
    writes_nothing(monkeypatch)
    with pytest.raises(UserError, match=r"no token|there is none.*HF_TOKEN.*Colab"):
        push(model, "ada/x", endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize("push", PUSHES)
def test_a_refused_token_is_said_before_anything_is_written(model, hub, monkeypatch, push):
    writes_nothing(monkeypatch)
    with pytest.raises(UserError, match=r"refused the access token: got 401.*write perm") as caught:
        push(model, "ada/x", token="hf_wrong", endpoint=hub.endpoint)
    assert "hf_wrong" not in str(caught.value)
    assert hub.repositories == {}


@pytest.mark.parametrize("is_there", [False, True])
def test_a_token_that_may_only_read(model, hub, monkeypatch, is_there):
    writes_nothing(monkeypatch)
    if is_there:
        hub.repositories["ada/x"] = {"main": {}}
    with pytest.raises(UserError, match=r"may not write to ada/x: got 403: You .*Choose a repo"):
        push_to_hub(model, "ada/x", token=READ_ONLY, endpoint=hub.endpoint)


@pytest.mark.parametrize("push", PUSHES)
def test_no_network(model, monkeypatch, push):
    writes_nothing(monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=rf"connection to {endpoint} failed.*push again"):
        push(model, "ada/x", token=TOKEN, endpoint=endpoint)


@pytest.mark.parametrize("part", ["/preupload", "/commit"])
def test_a_connection_that_breaks_leaves_the_repository_as_it_was(
    model, hub, monkeypatch, scratch, part
):
    from huggingface_hub.utils import _http

    # it tries several times, and waits longer each time
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.breaks_at = part
    with pytest.raises(UserError, match="connection to .* failed"):
        push_to_hub(model, "ada/x", token=TOKEN, endpoint=hub.endpoint)
    assert hub.files("ada/x") == {}
    hub.breaks_at = None
    push_to_hub(model, "ada/x", token=TOKEN, endpoint=hub.endpoint)
    assert "adapter_model.safetensors" in hub.files("ada/x")


def test_a_hub_that_is_out_of_order(model, hub, scratch):
    hub.fails_at = {"/commit": 400}
    with pytest.raises(UserError, match=r"did not take ada/x: got 400: out of order"):
        push_to_hub(model, "ada/x", token=TOKEN, endpoint=hub.endpoint)


def test_offline(model, hub, monkeypatch):
    from huggingface_hub import constants

    writes_nothing(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"switched off: got HF_HUB_OFFLINE=1. Unset"):
        push_to_hub(model, "ada/x", token=TOKEN, endpoint=hub.endpoint)


def test_a_name_that_is_none(model, hub, monkeypatch):
    writes_nothing(monkeypatch)
    with pytest.raises(UserError, match=r"no name of a repository: got 'a/b/c'"):
        push_to_hub(model, "a/b/c", token=TOKEN, endpoint=hub.endpoint)


def test_unknown_methods_are_said_before_the_hub_is_asked(model, hub):
    with pytest.raises(UserError, match="save_method is unknown"):
        push_to_hub_merged(model, "ada/x", save_method="8bit", token=TOKEN, endpoint=hub.endpoint)
    with pytest.raises(UserError, match="quantization_method is unknown"):
        push_to_hub_gguf(
            model, "ada/x", quantization_method="q9", token=TOKEN, endpoint=hub.endpoint
        )
    with pytest.raises(UserError, match="unknown keyword argument: got privat"):
        push_to_hub(model, "ada/x", privat=True, token=TOKEN, endpoint=hub.endpoint)
    assert hub.requests == []


def test_an_error_of_the_export_passes(folder, hub, scratch):
    base = load_nf4(folder)
    with pytest.raises(UserError, match="no adapter to save"):
        push_to_hub_merged(base, "ada/x", save_method="lora", token=TOKEN, endpoint=hub.endpoint)
    assert hub.files("ada/x") == {}


def colab_with(monkeypatch, get):
    """Imitate google.colab.userdata."""
    userdata = types.SimpleNamespace(get=get)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    module = types.ModuleType("google.colab")
    module.userdata = userdata
    monkeypatch.setitem(sys.modules, "google.colab", module)


def test_where_the_token_comes_from(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "login").write_text("hf_login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    assert find_token() == "hf_login"
    asked = []
    colab_with(monkeypatch, lambda name: asked.append(name) or "hf_secret")
    assert find_token() == "hf_secret" and asked == ["HF_TOKEN"]
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert find_token() == "hf_environment"
    assert find_token(" hf_argument ") == "hf_argument"
    assert asked == ["HF_TOKEN"]


def test_a_secret_that_is_not_granted(monkeypatch):
    def refuse(name):
        raise RuntimeError("NotebookAccessError")

    colab_with(monkeypatch, refuse)
    with pytest.raises(UserError, match="there is none: allowed: token=.*notebook access"):
        find_token()
