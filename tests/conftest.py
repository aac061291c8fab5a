"""Shared fixtures: the embedded model once a session, a tiny model, no network to a model hub."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# whoever started the tests said that there is no network, and this is not CI, where a download that
# fails has to be seen; kept for the workers of pytest-xdist, which find the next line's value
_OFFLINE = "COLAB_QLORA_TESTS_OFFLINE"
os.environ.setdefault(
    _OFFLINE, str(int(os.environ.get("HF_HUB_OFFLINE") == "1" and not os.environ.get("CI")))
)

# tests never ask a model hub; what they need is embedded or built on the spot
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


# Triton reads this when a kernel is decorated, so it has to stand before any kernel is imported
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


# minutes each: first, so that no process is left with one of them at the end
_LONGEST = ("test_execution.py", "test_tutorial_script.py", "test_compile_check.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; skip GPU tests where there is no GPU, with the reason."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    if _has_gpu():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _process_settings() -> dict[str, object]:
    """What a test could leave behind in torch, and what would change the numbers of all others."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def leaves_torch_as_it_was() -> Iterator[None]:
    """Fail the test that leaves a process-wide setting changed, not the one that meets it later."""
    before = _process_settings()
    yield
    after = _process_settings()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"left behind (before, after): {changed}"


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The converted embedded model (fetched and converted on the first use).

    It is skipped for want of a network only where HF_HUB_OFFLINE=1 was set before the tests began.
    """
    pytest.importorskip("transformers")
    from colab_qlora.errors import UserError
    from colab_qlora.models.embedded import embedded_model_path

    try:
        return embedded_model_path()
    except UserError as error:
        if os.environ[_OFFLINE] == "1" and "could not be downloaded" in error.problem:
            pytest.skip(f"HF_HUB_OFFLINE=1, and {error}")
        raise


@pytest.fixture(scope="session")
def sample_rows() -> list[dict[str, str]]:
    """The rows of data_samples/train.jsonl."""
    lines = (ROOT / "data_samples" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny_model_folder(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama with the embedded model's tokenizer: loads and trains in seconds."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB, of which more is said to be free than there is.

    What writes there meets a disk that becomes full meanwhile. Where mounting is not allowed, the
    test is skipped.
    """
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount to make a small file system with")
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
        mounted.append(place)
        return place

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def adapted_embedded(embedded_folder: Path) -> tuple[Any, Any]:
    """The embedded model with fused layers and an adapter that says something, in training mode."""
    import torch

    from colab_qlora import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        "embedded", 256, dtype="float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # the same numbers on a GPU
            parameter.data.copy_(torch.randn(parameter.shape) * 0.003)
    return model, tokenizer
