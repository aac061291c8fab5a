"""The saving functions, and others that tutorials call, as methods of one model."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")
safetensors_torch = pytest.importorskip("safetensors.torch")

from model_files import adapted, byte_level, write_model  # noqa: E402
from small_checkpoint import load_nf4  # noqa: E402

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.export import bind_methods  # noqa: E402
from colab_qlora.export.methods import METHODS  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("methods") / "tiny", "llama", byte_level("smollm"))


def test_a_tutorials_calls(folder, tmp_path):
    tokenizer = byte_level("smollm")
    model = bind_methods(adapted(load_nf4(folder)))
    model.save_pretrained_merged(tmp_path / "m", tokenizer, save_method="merged_16bit")
    model.save_pretrained_merged(str(tmp_path / "l"), tokenizer, save_method="lora")
    model.save_pretrained_gguf(str(tmp_path / "g"), tokenizer, quantization_method="f16")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert (tmp_path / "l" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "g" / "tiny.F16.gguf").is_file()


def test_instances_only(folder):
    model, other = adapted(load_nf4(folder)), adapted(load_nf4(folder))
    kinds = [type(model), type(model.get_base_model())]
    before = [dict(vars(kind)) for kind in kinds]
    assert bind_methods(model) is model
    assert [dict(vars(kind)) for kind in kinds] == before
    assert not set(METHODS) & set(vars(other))
    assert not hasattr(other, "save_pretrained_gguf")
    # the model inside has none either, and what both have is the PeftModel's own
    assert not hasattr(model.get_base_model(), "save_pretrained_merged")


def test_a_model_inside_has_its_own(folder):
    base = bind_methods(load_nf4(folder))
    model = bind_methods(adapted(base))
    assert model.save_pretrained_merged.model is model
    assert base.save_pretrained_merged.model is base


def test_copies_belong_to_the_copy(folder):
    model = bind_methods(torch.nn.Linear(2, 2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.push_to_hub.model is twin
    assert model.push_to_hub.model is model


def test_a_copied_adapter_is_saved_as_the_copy_is(folder, tmp_path):
    model = bind_methods(adapted(load_nf4(folder)))
    twin = copy.deepcopy(model)
    name, changed = next((n, p) for n, p in twin.named_parameters() if "lora_B" in n)
    changed.data.fill_(7.0)
    assert twin.save_pretrained_merged.model is twin
    twin.save_pretrained_merged(tmp_path / "twin", save_method="lora")
    model.save_pretrained_merged(tmp_path / "model", save_method="lora")
    key = name.replace(".default", "")
    saved = {
        which: safetensors_torch.load_file(tmp_path / which / "adapter_model.safetensors")[key]
        for which in ("twin", "model")
    }
    assert (saved["twin"] == 7.0).all() and not (saved["model"] == 7.0).any()


def _dies_on_del(make):
    """Whether what `make` gives is freed with its last name, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        made = make()
        alive = weakref.ref(made)
        del made
        return alive() is None
    finally:
        gc.enable()


def test_a_deleted_model_is_freed_at_once(folder):
    assert _dies_on_del(lambda: bind_methods(torch.nn.Linear(2, 2)))
    options = {"max_seq_length": 32, "load_in_4bit": False, "dtype": "float32"}
    load = FastLanguageModel.from_pretrained
    assert _dies_on_del(lambda: load(str(folder), **options)[0])


def test_a_method_of_a_deleted_model_says_so():
    method = bind_methods(torch.nn.Linear(2, 2)).push_to_hub
    with pytest.raises(UserError, match=r"push_to_hub belongs to was deleted. Keep the model in a"):
        method("name")
    assert "of a deleted model" in repr(method) and "hub" in method.__doc__
    model = bind_methods(torch.nn.Linear(2, 2))
    assert copy.deepcopy(model.push_to_hub).model is model


def test_help_is_the_functions():
    model = bind_methods(torch.nn.Linear(2, 2))
    for name in METHODS:
        module = importlib.import_module(f"colab_qlora.{METHODS[name]}")
        function = getattr(module, name)
        assert inspect.getdoc(getattr(model, name)) == inspect.getdoc(function)
        assert name in repr(getattr(model, name))
        assert next(iter(inspect.signature(function).parameters)) == "model"


def test_binding_imports_nothing_heavy():
    program = (
        "import sys; import colab_qlora.export; from colab_qlora.export import bind_methods;"
        "bind_methods(type('M', (), {})());"
        "print([m for m in ('torch', 'gguf', 'peft', 'huggingface_hub') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
