"""Batches are padded to few lengths where that costs nothing, and only there."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import losses_of  # noqa: E402

from colab_qlora.models.fuse import state_of  # noqa: E402
from colab_qlora.training import padding  # noqa: E402
from colab_qlora.training.padding import PADDING_MULTIPLE, padding_multiple  # noqa: E402

pytestmark = pytest.mark.model


def waiting(model: Any, rows: int, length: int) -> tuple[float, float]:
    """A host that takes five times as long as its GPU."""
    return 5e-3, 1e-3


def busy(model: Any, rows: int, length: int) -> tuple[float, float]:
    return 1e-3, 5e-3


def test_padded_where_the_gpu_waits(make_trainer):
    trainer = make_trainer()
    assert padding_multiple(trainer, waiting) == PADDING_MULTIPLE
    assert padding_multiple(trainer, busy) is None


def test_asked_about_the_batches_that_come(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=3)
    asked: list[tuple[int, int]] = []
    padding_multiple(
        trainer, lambda model, *shape: (asked.append(shape), waiting(model, *shape))[1]
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert asked == [(3, round(sum(lengths) / len(lengths)))]


def test_a_cpu_never_pads(make_trainer):
    trainer = make_trainer()
    if not torch.cuda.is_available():
        assert trainer.data_collator.pad_to_multiple_of is None
        assert padding_multiple(trainer) is None


@pytest.mark.parametrize(
    "config",
    [
        {"packing": True},
        {"padding_free": True},
        {"pad_to_multiple_of": 8},
        {"lora": {"use_fused_layers": False}},
    ],
    ids=str,
)
def test_left_as_it_is(make_trainer, config):
    assert padding_multiple(make_trainer(**config), waiting) is None


def test_left_as_it_is_without_recordings(make_trainer):
    trainer = make_trainer()
    state = state_of(trainer.model)
    assert state is not None
    state.graphs.is_on = False
    assert padding_multiple(trainer, waiting) is None


def test_padded_batches_train_as_others_do(make_trainer, tmp_path, monkeypatch):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    monkeypatch.setattr(padding, "_by_rates", waiting)
    padded = make_trainer(tmp_path / "padded")
    assert any("padded to multiples of 32" in note for note in padded.notes)
    widths = {batch["input_ids"].shape[1] for batch in padded.get_train_dataloader()}
    assert all(width % PADDING_MULTIPLE == 0 for width in widths)
    padded.train()
    assert losses_of(padded) == pytest.approx(losses_of(plain), rel=2e-5)
