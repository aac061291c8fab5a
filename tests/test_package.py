"""What `import colab_qlora` costs and changes: little, and nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import colab_qlora

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate")

SNAPSHOT = f"""
import importlib, json, sys
from trl import SFTTrainer, SFTConfig
import torch, transformers, peft, trl, datasets, bitsandbytes, accelerate, logging
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
import transformers.utils.notebook
libraries = {LIBRARIES!r}

def attributes():
    # every attribute of every loaded module, and of every class that it defines
    found = {{}}
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] not in libraries:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for k, v in list(vars(value).items()):
                    found[name, key, k] = id(v)
    return found

before = attributes()
keep = [dict(vars(m)) for m in list(sys.modules.values()) if m is not None]  # ids stay taken
import colab_qlora
WHAT
after = attributes()
# a submodule that is loaded later appears as a new attribute; that is not a change
changed = [".".join(k) for k, v in before.items() if k in after and after[k] != v]
removed = [".".join(k) for k in before if k not in after]
print(json.dumps({{"watched": len(before), "changed": changed, "removed": removed}}))
"""


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_loads_no_heavy_package_and_prints_nothing() -> None:
    code = "import sys, colab_qlora; print([m for m in {} if m in sys.modules])"
    heavy = [*LIBRARIES, "numpy", "matplotlib", "triton", "IPython"]
    assert _run(code.format(heavy)).strip() == "[]"
    assert _run("import colab_qlora") == ""


def test_import_is_fast() -> None:
    code = (
        "import time; t = time.perf_counter(); import colab_qlora; print(time.perf_counter() - t)"
    )
    assert min(float(_run(code)) for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "what",
    ["", "from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer, draw_curves"],
    ids=["import", "all names used"],
)
def test_no_attribute_of_another_library_changes(what: str) -> None:
    pytest.importorskip("trl")
    result = json.loads(_run(SNAPSHOT.replace("WHAT", what)).splitlines()[-1])
    assert result["watched"] > 10_000
    assert result["changed"] == []
    assert result["removed"] == []


def test_every_public_name_is_there() -> None:
    pytest.importorskip("trl")
    for name in colab_qlora.__all__:
        assert getattr(colab_qlora, name) is not None
    assert set(colab_qlora._EXPORTS) | {"__version__"} == set(colab_qlora.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = colab_qlora.nothing_of_the_kind


def test_packages_in_pyproject_are_all_there() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.split("packages = [")[1].split("]")[0]
    folders = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for p in (ROOT / "colab_qlora").rglob("__init__.py")
    }
    assert folders | {"colab_qlora.samples"} == {s.strip(' ",') for s in listed.split("\n")} - {""}


def test_samples_are_found_from_a_clone() -> None:
    from colab_qlora.samples import sample_path

    assert sample_path("train.jsonl") == ROOT / "data_samples" / "train.jsonl"
    with pytest.raises(colab_qlora.UserError, match="train.jsonl"):
        sample_path("nothing.jsonl")


def test_user_error_survives_pickling() -> None:
    import pickle

    error = colab_qlora.UserError("it is wrong", got=1, allowed=2, do="Change it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "it is wrong: got 1; allowed: 2. Change it."
    assert importlib.util.find_spec("colab_qlora.errors") is not None
