"""What only a GPU can show: float16 training that skips no step, bfloat16 where there is some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import losses_of  # noqa: E402

from colab_qlora.training.trainer import INITIAL_LOSS_SCALE  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.gpu]


def test_float16_training_skips_no_step(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(dtype="float16", max_steps=12)
    assert (trainer.args.fp16, trainer.args.bf16) == (True, False)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    # the scale is halved at each step that overflows and is skipped
    assert trainer.accelerator.scaler.get_scale() == INITIAL_LOSS_SCALE
    losses = losses_of(trainer)
    assert all(loss == loss and loss < 20 for loss in losses)
    assert losses[-1] < losses[0]


def test_bfloat16_training_where_the_gpu_has_it(make_trainer: Callable[..., Any]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    trainer = make_trainer(dtype="bfloat16", max_steps=4)
    assert (trainer.args.fp16, trainer.args.bf16) == (False, True)
    assert trainer.accelerator.scaler is None
    trainer.train()
    assert len(losses_of(trainer)) == 4
