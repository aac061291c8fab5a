"""Training on the answers alone: labels, what is refused, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
)

from colab_qlora import UserError  # noqa: E402
from colab_qlora.data import show_tokens  # noqa: E402
from colab_qlora.training.dataset_checks import data_hash  # noqa: E402
from colab_qlora.training.responses_only import train_on_responses_only  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
PARTS = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def _row(index: int, turns: int = 2) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Count."}]
    for turn in range(turns):
        question = f"What comes after {index + turn}?" + " Say why." * turn
        answer = f"{index + turn + 1} comes after it." + " It is so." * (index % 3)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages}


ROWS = [_row(index, turns=1 + index % 3) for index in range(6)]
UNANSWERED = {"messages": [{"role": "user", "content": "Is anyone there?"}]}


def _oracle(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation, from parts that are tokenised apart."""
    ids: list[int] = []
    labels: list[int] = []
    if messages[0]["role"] != "system":  # the template's own system prompt, not looked at
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False)
        head = prompt[: prompt.index("<|im_start|>user")]
        ids += tokenizer(head)["input_ids"]
        labels += [-100] * len(ids)
    for message in messages:
        is_answer = message["role"] == "assistant"
        for text, is_trained in (
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", is_answer),
            ("\n", False),
        ):
            part = tokenizer(text)["input_ids"]
            ids += part
            labels += part if is_trained else [-100] * len(part)
    return ids, labels


def _oracles(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    return [_oracle(tokenizer, row["messages"]) for row in rows]


def _pairs(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


@pytest.fixture
def make(make_trainer: Make) -> Make:
    """A trainer over conversations of at most 256 tokens."""

    def build(rows: Any = ROWS, **options: Any) -> Any:
        return make_trainer(rows=rows, **{"max_length": 256, **options})

    return build


@pytest.fixture
def make_stock(tiny_model_folder: Path, tmp_path: Path) -> Make:
    """TRL's own trainer over the tiny model."""

    def build(rows: list[dict[str, Any]], collator: Any = None, **config: Any) -> trl.SFTTrainer:
        options = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 256}
        return trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
            args=trl.SFTConfig(str(tmp_path / "stock"), **{**options, **config}),
            train_dataset=Dataset.from_list(rows),
            data_collator=collator,
        )

    return build


@pytest.mark.parametrize("parts", [(), PARTS], ids=["template", "given"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_only_the_answers_of_all_sets_have_labels(make: Make, parts: tuple, num_proc: Any) -> None:
    evals = {"short": ROWS[:2], "long": ROWS[2:]}
    trainer = make(eval_rows=evals)
    assert train_on_responses_only(trainer, *parts, num_proc=num_proc) is trainer
    tokenizer = trainer.processing_class
    assert _pairs(trainer.train_dataset) == _oracles(tokenizer, ROWS)
    assert list(trainer.eval_dataset) == list(evals)
    for name, rows in evals.items():
        assert _pairs(trainer.eval_dataset[name]) == _oracles(tokenizer, rows)
    assert not [note for note in trainer.notes if "left out" in note]


def test_the_batches_have_these_labels_and_padding_has_none(make: Make) -> None:
    trainer = make(eval_rows=ROWS, per_device_eval_batch_size=3)
    train_on_responses_only(trainer)
    oracles = _oracles(trainer.processing_class, ROWS)
    seen = 0
    for batch in trainer.get_eval_dataloader():
        longest = batch["input_ids"].shape[1]
        for labels, mask in zip(batch["labels"].tolist(), batch["attention_mask"], strict=True):
            expected = oracles[seen][1]
            assert labels == expected + [-100] * (longest - len(expected))
            assert int(mask.sum()) == len(expected)
            seen += 1
    assert seen == len(ROWS)


def _mean_loss(model: Any, rows: list[tuple[list[int], list[int]]], all_tokens: bool) -> float:
    """The mean loss over the tokens with a label, or over all, from a row's logits by itself."""
    losses = []
    for ids, labels in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for position in range(1, len(ids)):
            if all_tokens or labels[position] != -100:
                wanted = torch.tensor(ids[position])
                losses.append(cross_entropy(logits[position - 1], wanted))
    return float(torch.stack(losses).mean())


def test_the_loss_is_the_mean_over_the_answers_tokens(make: Make) -> None:
    trainer = make(
        eval_rows=ROWS,
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=len(ROWS),
    )
    train_on_responses_only(trainer)
    rows = _oracles(trainer.processing_class, ROWS)
    trainer.model.eval()
    before = _mean_loss(trainer.model, rows, all_tokens=False)
    assert abs(before - _mean_loss(trainer.model, rows, all_tokens=True)) > 1e-3
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(before, abs=2e-5)
    trainer.model.eval()
    after = _mean_loss(trainer.model, rows, all_tokens=False)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, abs=2e-5)
    assert after < losses[1] < before


def test_rows_without_an_answer_are_left_out_and_counted(make: Make) -> None:
    trainer = make(rows=[UNANSWERED, *ROWS, UNANSWERED], eval_rows=[*ROWS, UNANSWERED])
    train_on_responses_only(trainer)
    oracles = _oracles(trainer.processing_class, ROWS)
    assert _pairs(trainer.train_dataset) == _pairs(trainer.eval_dataset) == oracles
    assert [note for note in trainer.notes if "left out" in note] == [
        "2 of 8 train rows are left out: nothing in them is a response to train on",
        "1 of 7 eval rows is left out: nothing in them is a response to train on",
    ]


def test_the_log_tells_of_the_rows_that_are_trained_on(make: Make) -> None:
    trainer = make(rows=[UNANSWERED, *ROWS])
    before = trainer._loss_log.run["data_hash"]
    train_on_responses_only(trainer)
    run = trainer._loss_log.run
    assert run["train_rows"] == len(ROWS)
    assert run["data_hash"] == data_hash(trainer.train_dataset) != before


@pytest.mark.parametrize(
    "rows, parts, hint",
    [
        (ROWS, ("[INST]", "[/INST]"), "Pass instruction_part and response_part as they stand"),
        ([UNANSWERED], (), "Pass instruction_part and response_part as they stand"),
    ],
    ids=["other markers", "no answer"],
)
def test_nothing_to_learn_is_refused_with_a_row_and_the_markers(
    make: Make, rows: list, parts: tuple, hint: str
) -> None:
    trainer = make(rows=rows)
    tokenized = trainer.train_dataset
    with pytest.raises(UserError, match="no train row has anything left to train on") as caught:
        train_on_responses_only(trainer, *parts)
    message = str(caught.value)
    instruction, response = parts or PARTS
    assert f"instruction_part={instruction!r}, response_part={response!r}" in message
    assert f"0 of {len(tokenized[0]['input_ids'])} tokens trained" in message
    question = rows[0]["messages"][-1 if rows[0] is UNANSWERED else 1]["content"]
    assert "<|im_start|>user\u21b5" + question.replace(" ", "\u00b7") in message
    assert hint in message and "\n" not in message
    assert trainer.train_dataset is tokenized


def test_an_eval_set_with_nothing_to_learn_leaves_the_trainer_as_it_was(make: Make) -> None:
    trainer = make(eval_rows={"good": ROWS, "bare": [UNANSWERED]})
    train_set, eval_sets = trainer.train_dataset, trainer.eval_dataset
    with pytest.raises(UserError, match="no eval 'bare' row has anything left"):
        train_on_responses_only(trainer)
    assert trainer.train_dataset is train_set and trainer.eval_dataset is eval_sets


def test_labels_that_are_masked_already_stay_so(make: Make) -> None:
    # of a prompt with two answers in it and a completion, the completion alone is trained on
    rows = [{"prompt": _row(1)["messages"][:-1], "completion": _row(1)["messages"][-1:]}]
    trainer = make(rows=rows)
    train_on_responses_only(trainer)
    ids, labels = _oracle(trainer.processing_class, _row(1)["messages"])
    last_question = max(i for i, token in enumerate(ids) if token == ids[0])
    expected = [-100] * last_question + labels[last_question:]
    assert expected != labels
    assert _pairs(trainer.train_dataset) == [(ids, expected)]
    (batch,) = [trainer.data_collator([trainer.train_dataset[0]])]
    assert batch["labels"].tolist() == [expected]


def test_prompts_are_searched_too_where_they_are_trained_on(make: Make) -> None:
    rows = [{"prompt": _row(1)["messages"][:-1], "completion": _row(1)["messages"][-1:]}]
    trainer = make(rows=rows, completion_only_loss=False)
    train_on_responses_only(trainer)
    assert _pairs(trainer.train_dataset) == [_oracle(trainer.processing_class, _row(1)["messages"])]


@pytest.mark.parametrize("hidden", ["labels", "assistant_masks"])
def test_responses_that_lost_their_labels_before_are_shown(make: Make, hidden: str) -> None:
    trainer = make()
    ids, labels = _oracle(trainer.processing_class, ROWS[0]["messages"])
    column = [t if label == -100 else -100 for t, label in zip(ids, labels, strict=True)]
    if hidden == "assistant_masks":
        column = [int(label == -100) for label in labels]
    trainer.train_dataset = Dataset.from_list([{"input_ids": ids, hidden: column}])
    with pytest.raises(UserError, match="without labels or masks that leave") as caught:
        train_on_responses_only(trainer)
    assert "[1][\u00b7comes][\u00b7after]" in str(caught.value)
    assert f"{sum(label != -100 for label in labels)} of {len(ids)} tokens" in str(caught.value)


def test_rows_cut_before_their_answers_say_so(make: Make) -> None:
    trainer = make()
    ids, labels = _oracle(trainer.processing_class, ROWS[0]["messages"])
    start = next(index for index, label in enumerate(labels) if label != -100)
    trainer.train_dataset = Dataset.from_list([{"input_ids": ids[:start]}])
    with pytest.raises(UserError, match="Raise max_length"):
        train_on_responses_only(trainer)


def test_packed_rows_are_labelled_by_their_borders(make: Make) -> None:
    trainer = make(packing=True, max_length=512, padding_free=True)
    tokenizer = trainer.processing_class
    whole = trainer.train_dataset
    assert len(whole) == 1 and len(whole[0]["seq_lengths"]) == len(ROWS)
    train_on_responses_only(trainer)
    (row,) = trainer.train_dataset
    expected = {tuple(ids): labels for ids, labels in _oracles(tokenizer, ROWS)}
    start = 0
    for length in row["seq_lengths"]:
        ids, labels = row["input_ids"][start:], row["labels"][start:]
        assert labels[:length] == expected.pop(tuple(ids[:length]))
        start += length
    assert not expected
    batch = trainer.data_collator([row])
    assert batch["labels"].tolist() == [row["labels"]]


def test_an_answer_does_not_go_on_in_the_next_packed_conversation(make: Make) -> None:
    trainer = make(packing=True, max_length=512, padding_free=True)
    ids, labels = _oracle(trainer.processing_class, ROWS[0]["messages"])
    cut = max(index for index, label in enumerate(labels) if label != -100) - 1
    # both are without their beginning or end, so nothing but the border stands between them
    second = trainer.processing_class(" no answer of mine")["input_ids"]
    row = {"input_ids": ids[:cut] + second, "seq_lengths": [cut, len(second)]}
    trainer.train_dataset = Dataset.from_list([row])
    train_on_responses_only(trainer)
    assert trainer.train_dataset[0]["labels"] == labels[:cut] + [-100] * len(second)


def test_rows_packed_without_borders_are_refused(make: Make) -> None:
    trainer = make(packing=True, packing_strategy="wrapped", max_length=64)
    with pytest.raises(UserError, match="packed without the borders.*got packing_strategy='wrapp"):
        train_on_responses_only(trainer)


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_collator_that_takes_labels_from_the_rows_works(make_stock: Make, has_mask: bool) -> None:
    tokenizer = make_stock(ROWS).processing_class
    rows = ROWS
    if has_mask:  # a completion_mask, which this collator cannot pad
        cuts = [row["messages"] for row in ROWS]
        rows = [{"prompt": messages[:2], "completion": messages[2:]} for messages in cuts]
    trainer = make_stock(rows, DataCollatorForSeq2Seq(tokenizer), per_device_train_batch_size=6)
    train_on_responses_only(trainer)
    (batch,) = trainer.get_train_dataloader()
    found = sorted([x for x in row if x != -100] for row in batch["labels"].tolist())
    oracles = _oracles(tokenizer, ROWS)
    assert found == sorted([x for x in labels if x != -100] for _, labels in oracles)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["fails to pad", "labels all tokens"])
def test_a_collator_that_makes_labels_of_its_own_is_refused(make_stock: Make, rows: list) -> None:
    tokenizer = make_stock(ROWS).processing_class
    trainer = make_stock(rows, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    with pytest.raises(UserError, match="got DataCollatorForLanguageModeling") as caught:
        train_on_responses_only(trainer)
    assert "does not use the rows' labels" in str(caught.value)


def test_a_stock_trainer_trains_on_the_answers(
    make_stock: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_stock(
        [*ROWS, UNANSWERED], per_device_train_batch_size=6, max_steps=1, logging_steps=1
    )
    rows = _oracles(trainer.processing_class, ROWS)
    assert train_on_responses_only(trainer, *PARTS) is trainer
    assert "colab_qlora: 1 of 7 train rows is left out" in capsys.readouterr().out
    expected = _mean_loss(trainer.model.eval(), rows, all_tokens=False)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_the_function_alone_needs_no_trainer(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    label = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    oracles = _oracles(tokenizer, ROWS)
    batch = {"input_ids": [ids for ids, _ in oracles]}
    assert label(batch) == {"labels": [labels for _, labels in oracles]}
    rows = Dataset.from_dict(batch).map(label, batched=True)
    assert rows["labels"][:] == [labels for _, labels in oracles]


def test_the_function_alone_leaves_the_trainer_as_it_is(make: Make) -> None:
    trainer = make()
    rows = trainer.train_dataset
    assert callable(train_on_responses_only(trainer, return_function=True))
    assert trainer.train_dataset is rows


def test_another_tokenizer_may_have_the_markers(make: Make) -> None:
    trainer = make(rows=[{"text": "Q: one?\nA: yes"}, {"text": "Q: two?\nA: no"}])
    tokenizer = trainer.processing_class
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="markers of the turns are not known.*instruction_part="):
        train_on_responses_only(trainer)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = (
        "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else '\nA: ' }}{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    )
    train_on_responses_only(trainer, tokenizer=other)
    texts = [
        tokenizer.decode([label for label in labels if label != -100])
        for labels in trainer.train_dataset["labels"]
    ]
    assert texts == [" yes<|im_end|>", " no<|im_end|>"]


def test_labelled_rows_are_shown_token_by_token(make: Make) -> None:
    trainer = make()
    train_on_responses_only(trainer)
    row = trainer.train_dataset[0]
    view = show_tokens(row, trainer.processing_class)
    assert [token for _, token, _ in view.rows] == row["input_ids"]
    assert [trained for _, _, trained in view.rows] == [label != -100 for label in row["labels"]]
    assert "[.][<|im_end|>]\u21b5" in str(view)
    assert view._repr_html_().count('<ins class="cq-token" title=') == sum(
        label != -100 for label in row["labels"]
    )
    assert show_tokens(row, trainer.processing_class, 5).tokens_cut == len(row["input_ids"]) - 5


def test_rows_that_cannot_be_labelled_are_refused(make: Make) -> None:
    trainer = make()
    for rows, got in (
        (trainer.train_dataset.to_iterable_dataset(), "got IterableDataset"),
        (Dataset.from_list(ROWS), "got messages"),
        (None, "got NoneType"),
    ):
        trainer.train_dataset = rows
        with pytest.raises(UserError, match=f"train rows cannot be labelled: {got}"):
            train_on_responses_only(trainer)


@pytest.mark.parametrize("options", [{}, {"return_function": True}])
def test_without_a_trainer_it_says_what_it_needs(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs a trainer with a tokenizer.*Make the trainer first"):
        train_on_responses_only(None, **options)
    if not options:
        with pytest.raises(UserError, match="got a NoneType with object as its tokenizer"):
            train_on_responses_only(None, tokenizer=object())
