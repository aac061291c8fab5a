"""What rows are taken for before the first step."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from colab_qlora.errors import UserError  # noqa: E402
from colab_qlora.training.dataset_checks import with_messages  # noqa: E402

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize("turns", [TURNS, SHAREGPT], ids=["role", "from"])
def test_conversations_are_trained_on_as_messages(turns: list[dict[str, str]]) -> None:
    found, note = with_messages(Dataset.from_list([{"conversations": turns}]), "train", "text")
    assert found.to_list() == [{"messages": TURNS}]
    assert note == "the train rows' conversations are trained on as messages"


@pytest.mark.parametrize("column", ["text", "body", "messages", "prompt", "input_ids"])
def test_rows_that_have_something_else_to_train_on_stay(column: str) -> None:
    rows = Dataset.from_list([{"conversations": TURNS, column: "x"}])
    found, note = with_messages(rows, "train", "body" if column == "body" else "text")
    assert set(found.column_names) == {"conversations", column}
    assert note is None


@pytest.mark.parametrize("rows", [None, [{"conversations": TURNS}]])
def test_other_kinds_of_rows_are_left_alone(rows: Any) -> None:
    assert with_messages(rows, "eval", "text") == (rows, None)


def test_each_of_several_eval_sets_is_read() -> None:
    texts = Dataset.from_list([{"text": "x"}])
    rows = {"a": Dataset.from_list([{"conversations": SHAREGPT}]), "b": texts}
    found, note = with_messages(rows, "eval", "text")
    assert found["a"].to_list() == [{"messages": TURNS}]
    assert found["b"] is texts
    assert note == "the eval rows' conversations are trained on as messages"


def test_a_conversation_that_cannot_be_read_is_named() -> None:
    bad = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]
    with pytest.raises(UserError, match="row 1"):
        with_messages(
            Dataset.from_list([{"conversations": TURNS}, {"conversations": bad}]), "train", "text"
        )


@pytest.mark.model
@pytest.mark.parametrize("is_left_alone", [False, True])
def test_a_trainer_reads_conversations_unless_told_to_leave_rows_alone(
    is_left_alone: bool, make_trainer: Any
) -> None:
    rows = [{"conversations": TURNS}] * 4
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}} if is_left_alone else {}
    columns = make_trainer(rows=rows, remove_unused_columns=False, **options).train_dataset.features
    assert ("conversations" in columns) == is_left_alone
    assert ("input_ids" in columns) != is_left_alone
