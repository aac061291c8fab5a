"""Embedding and head learn at a rate of their own, as with groups made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from colab_qlora import UserError  # noqa: E402
from colab_qlora.training.embedding_rate import embedding_tables  # noqa: E402
from colab_qlora.training.optimizer import FlatAdamW  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
TABLES = {"modules_to_save": ["embed_tokens", "lm_head"]}
RATE, TABLE_RATE = 1e-2, 1e-3
STEPS = {"max_steps": 3, "learning_rate": RATE, "lr_scheduler_type": "linear", "warmup_steps": 0}


def _weights(trainer: Any) -> dict[str, Any]:
    return {
        n.replace(".default", ""): p.detach().clone()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }


def _by_hand(make_trainer: Make, out: Path) -> dict[str, Any]:
    """The same run with torch's AdamW over two groups, which transformers knows nothing of."""
    trainer = make_trainer(out, lora=TABLES, weight_decay=0.01, **STEPS)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    tables = [p for n, p in named if "embed_tokens" in n or "lm_head" in n]
    adapters = [p for n, p in named if not ("embed_tokens" in n or "lm_head" in n)]
    assert len(tables) == 2 and adapters
    groups = [{"params": adapters, "lr": RATE}, {"params": tables, "lr": TABLE_RATE}]
    trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    trainer.train()
    return _weights(trainer)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "paged_adamw_32bit"])
def test_training_is_that_of_groups_made_by_hand(
    make_trainer: Make, tmp_path: Path, optim: str
) -> None:
    options = {**STEPS, "embedding_learning_rate": TABLE_RATE, "weight_decay": 0.01}
    trainer = make_trainer(tmp_path / "ours", lora=TABLES, optim=optim, **options)
    start = _weights(trainer)
    trainer.train()
    is_flat = isinstance(trainer.optimizer.optimizer, FlatAdamW)
    assert is_flat is (not optim.startswith("paged"))
    ours, expected = _weights(trainer), _by_hand(make_trainer, tmp_path / "by hand")
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        moved = (expected[name] - start[name]).norm()
        assert moved > 0, name
        assert (weight - expected[name]).norm() <= 1e-4 * moved, name


def test_each_table_is_a_group_and_the_scheduler_moves_both_rates(make_trainer: Make) -> None:
    trainer = make_trainer(lora=TABLES, embedding_learning_rate=TABLE_RATE, **STEPS)
    optimizer = trainer.create_optimizer()
    tables = embedding_tables(trainer.model)
    assert len(tables) == 2
    alone = [g["params"] for g in optimizer.param_groups if g["lr"] == TABLE_RATE]
    assert [len(group) for group in alone] == [1, 1]
    assert {id(p) for (p,) in alone} == {id(p) for p in tables.values()}
    trainer.create_scheduler(num_training_steps=4, optimizer=optimizer)
    trainer.lr_scheduler.step()
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {RATE * 3 / 4, TABLE_RATE * 3 / 4}


def test_in_8_bits_the_embedding_keeps_32_as_with_bitsandbytes(make_trainer: Make) -> None:
    trainer = make_trainer(
        lora=TABLES, embedding_learning_rate=TABLE_RATE, optim="adamw_8bit", **STEPS
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, FlatAdamW)
    bits = {
        name.split(".")[-4]: 8 if "state1" in optimizer.state[table] else 32
        for name, table in embedding_tables(trainer.model).items()
    }
    assert bits == {"embed_tokens": 32, "lm_head": 8}


def test_a_checkpoint_of_two_rates_is_resumed(make_trainer: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **STEPS,
        "lora": TABLES,
        "embedding_learning_rate": TABLE_RATE,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = _weights(whole)
    for name, weight in _weights(resumed).items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-7), name


@pytest.mark.parametrize(
    ("lora", "rate", "message"),
    [
        ({}, 1e-5, "neither embedding nor head is trained. Pass modules_to_save="),
        (TABLES, 0.0, "embedding_learning_rate is not positive: got 0.0"),
    ],
)
def test_a_rate_for_nothing_is_refused(
    make_trainer: Make, lora: dict, rate: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(lora=lora, embedding_learning_rate=rate).train()
