"""Prompt and completion: the loss is that of the labelled tokens, computed here from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import losses_of  # noqa: E402

from colab_qlora import UserError, restore  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
# of very different lengths, in one batch
TEXTS = [
    {"prompt": "Count to three:\n", "completion": "one two three"},
    {"prompt": "Say a long thing about it, please:\n", "completion": "no"},
    {"prompt": "A\n", "completion": "b c d e f g h i j k l m n"},
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in TEXTS
]


def _tokens(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """All ids, and how many of them are the prompt's."""
    if isinstance(row["prompt"], str):
        full = row["prompt"] + row["completion"] + tokenizer.eos_token
        return tokenizer(full)["input_ids"], len(tokenizer(row["prompt"])["input_ids"])
    full, prompt = (
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        for messages, options in (
            (row["prompt"] + row["completion"], {}),
            (row["prompt"], {"add_generation_prompt": True}),
        )
    )
    return full["input_ids"], len(prompt["input_ids"])


def _expected(trainer: Any, rows: list[dict], *, completion_only: bool) -> float:
    """Mean cross-entropy of the labelled tokens, row by row through the model's own code."""
    model = restore(trainer.model).eval()
    total, count = 0.0, 0
    for row in rows:
        ids, prompt = _tokens(trainer.processing_class, row)
        inputs = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            log_probabilities = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        first = prompt if completion_only else 1
        for place in range(first, len(ids)):
            total -= float(log_probabilities[place - 1, ids[place]])
            count += 1
    return total / count


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize("completion_only", [None, True, False])
def test_loss_of_a_batch(make_trainer: Make, rows: list, completion_only: bool | None) -> None:
    trainer = make_trainer(
        rows=rows,
        eval_rows=rows,
        completion_only_loss=completion_only,
        per_device_train_batch_size=len(rows),
        per_device_eval_batch_size=len(rows),
        gradient_accumulation_steps=1,
        max_steps=1,
        max_length=None,
    )
    trainer.train()
    trained, evaluated = losses_of(trainer)[0], trainer.state.log_history[0]["eval_loss"]
    # the adapters' start changes nothing, so both are the loss of the base
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    expected = _expected(trainer, rows, completion_only=completion_only is not False)
    assert trained == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("row", [{"text": "none here"}, {"messages": CHATS[0]["prompt"]}])
def test_completion_only_without_a_completion_is_refused(make_trainer: Make, row: dict) -> None:
    with pytest.raises(UserError, match="needs rows with a prompt and a completion: got"):
        make_trainer(rows=[row] * 4, completion_only_loss=True)
