"""The random checkpoint loads like any other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parent.parent.parent


def test_random_checkpoint_loads_and_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.random_model import write_checkpoint
    from colab_qlora import FastLanguageModel

    write_checkpoint(tmp_path / "random", "tiny")
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "random"), 64)
    ids = tokenizer("t5 t6 unheard-of t7", return_tensors="pt").input_ids.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert 0 < loss < 20
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("8b", 8.03), ("1b", 1.24), ("gemma-2-2b", 2.61), ("gemma-3-1b", 1.00), ("phi-4-mini", 3.84)],
)
def test_shapes_have_the_sizes_that_their_authors_publish(
    shape: str, billions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.random_model import SHAPES

    config = AutoConfig.for_model(**SHAPES[shape], bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("shape", ["gemma-3-1b", "phi-4-mini"])
def test_other_families_load_too(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import random_model
    from colab_qlora import FastLanguageModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    words = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1024}
    small = {**random_model.SHAPES[shape], **sizes, **words}
    monkeypatch.setitem(random_model.SHAPES, shape, small)
    random_model.write_checkpoint(tmp_path, shape)
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), 64)
    ids = torch.arange(4, 36, device=model.device)[None]
    # words are as likely as each other
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(1024), abs=0.5)
