"""The random checkpoint loads like any other."""

from __future__ import annotations

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
