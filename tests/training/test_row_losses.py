"""The loss of each eval row: against the trainer's own, and in any grouping of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import ROWS  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.training.row_losses import row_losses  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
# of different lengths, so that batches are padded
EVAL_ROWS = [
    {"prompt": f"Count to {n}:\n", "completion": " one" + " two three" * n} for n in range(1, 8)
]


@pytest.fixture
def trainer(make_trainer: Make) -> Any:
    """A trainer that evaluates row by row: the mean of its batches is the mean of the rows."""
    return make_trainer(rows=ROWS, eval_rows=EVAL_ROWS, per_device_eval_batch_size=1)


def test_the_mean_is_the_trainers(trainer: Any) -> None:
    rows = row_losses(trainer)
    assert rows.losses.mean() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    # completions alone have labels; each row has two tokens more than the one before, or so
    assert len(rows.tokens) == len(EVAL_ROWS)
    assert (rows.tokens[1:] > rows.tokens[:-1]).all()
    assert rows.tokens[-1] < len(trainer.eval_dataset[6]["input_ids"])


@pytest.mark.parametrize("rows_a_group", [1, 2, 3, 100])
def test_grouping_changes_nothing(trainer: Any, rows_a_group: int) -> None:
    expected = row_losses(trainer)
    trainer.args.per_device_eval_batch_size = 4
    lengths = [len(row["input_ids"]) for row in trainer.eval_dataset]
    vocabulary = trainer.model.config.vocab_size
    # the second batch is shorter than the longest row, so it may hold a row more
    found = row_losses(trainer, logits_bytes=4 * max(lengths) * vocabulary * rows_a_group)
    assert found.tokens.tolist() == expected.tokens.tolist()
    # padding and grouping change the order of sums, not the values
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_the_model_stays_as_it_was(trainer: Any) -> None:
    trainer.model.train()
    row_losses(trainer)
    assert trainer.model.training
    trainer.model.eval()
    row_losses(trainer)
    assert not trainer.model.training


def test_rows_without_labels_are_left_out(trainer: Any) -> None:
    collate = trainer.data_collator

    def unlabelled(rows: Any) -> Any:
        batch = collate(rows)
        batch["labels"][0] = -100
        return batch

    trainer.args.per_device_eval_batch_size = 4
    trainer.data_collator = unlabelled
    everything = row_losses(trainer)
    # the first row of each of two batches
    assert len(everything.losses) == len(EVAL_ROWS) - 2
    assert torch.isfinite(torch.tensor(everything.losses)).all()
    trainer.args.per_device_eval_batch_size = 1
    with pytest.raises(UserError, match="no eval row has a label"):
        row_losses(trainer)
