"""A text that brings its own start token is trained on with one, as the model will meet it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from word_model import write_word_model  # noqa: E402

from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer  # noqa: E402
from colab_qlora.data.encode import encode  # noqa: E402
from colab_qlora.data.start_tokens import adds_start, without_second_start  # noqa: E402

pytestmark = pytest.mark.model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} [{{ message['role'] }}] {{ message['content'] }}"
    " {{ eos_token }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} and {i}"}]
    for i in range(6)
]
TEXTS = ["[user] [assistant] say and", " ".join(str(i) for i in range(6))]
PAIRS = [{"prompt": f"<s> say {i}", "completion": f" {i} and {i}"} for i in range(6)]


@pytest.fixture(scope="module", params=[True, False], ids=["adds", "adds none"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("words") / "words-llama"
    return write_word_model(made, TEXTS, adds_start=request.param)


def _trainer(folder: Path, out: Path, rows: Any, **options: Any) -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32")
    tokenizer.chat_template = TEMPLATE
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=False)
    formatting = options.pop("formatting_func", None)
    args = SFTConfig(str(out), max_steps=1, per_device_train_batch_size=2, **options)
    rows = rows(tokenizer) if callable(rows) else rows
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        formatting_func=formatting,
    )


def _texts(tokenizer: Any) -> list[dict[str, str]]:
    """As a tutorial makes them."""
    return [{"text": tokenizer.apply_chat_template(chat, tokenize=False)} for chat in CHATS]


@pytest.mark.parametrize("options", [{}, {"dataset_text_field": "text"}, {"packing": True}])
def test_texts_are_the_tokens_that_the_template_gives(
    folder: Path, tmp_path: Path, options: dict
) -> None:
    trainer = _trainer(folder, tmp_path, _texts, **options)
    tokenizer = trainer.processing_class
    expected = [
        tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        for chat in CHATS
    ]
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        found = [list(row) for row in rows["input_ids"]]
        if options.get("packing"):
            assert sorted(sum(found, [])) == sorted(sum(expected, []))
        else:
            assert found == expected
    said = [note for note in trainer.notes if "begin with <s> themselves" in note]
    assert len(said) == (2 if adds_start(tokenizer) else 0)
    assert trainer.train().global_step == 1


def test_prompt_and_completion(folder: Path, tmp_path: Path) -> None:
    trainer = _trainer(folder, tmp_path, PAIRS)
    tokenizer = trainer.processing_class
    for row, given in zip(trainer.train_dataset, PAIRS, strict=True):
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert words == [*(given["prompt"] + given["completion"]).split(), "</s>"]
        # TRL 1.x writes the labels at once
        mask = row.get("completion_mask") or [label != -100 for label in row["labels"]]
        learnt = [word for word, is_learnt in zip(words, mask, strict=True) if is_learnt]
        assert learnt == words[3:]
    assert trainer.train().global_step == 1


def test_formatting_function(folder: Path, tmp_path: Path) -> None:
    trainer = _trainer(
        folder,
        tmp_path,
        [{"n": i} for i in range(6)],
        formatting_func=lambda r: f"<s> say {r['n']}",
    )
    for i, ids in enumerate(trainer.train_dataset["input_ids"]):
        words = trainer.processing_class.convert_ids_to_tokens(ids)
        assert words == ["<s>", "say", str(i), "</s>"]


def test_rows_without_a_start_of_their_own_are_left_to_trl(folder: Path, tmp_path: Path) -> None:
    trainer = _trainer(folder, tmp_path, [{"text": f"say {i} </s>"} for i in range(6)])
    tokenizer = trainer.processing_class
    expected = [tokenizer(f"say {i} </s>")["input_ids"] for i in range(6)]
    assert [list(ids) for ids in trainer.train_dataset["input_ids"]] == expected
    assert not [note for note in trainer.notes if "<s>" in note]


def test_lengths_are_counted_as_they_are_trained_on(folder: Path) -> None:
    _, tokenizer = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32")
    ids, labels_begin = encode({"text": "<s> say 1 </s>"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "say", "1", "</s>"]
    assert labels_begin == 0
    ids, labels_begin = encode({"prompt": "<s> say 1", "completion": " 1 </s>"}, tokenizer)
    assert (len(ids), labels_begin) == (5, 3)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 1, 5], [1, 5]),
        ([1, 1, 1, 5], [1, 5]),
        ([1, 5, 1, 1], [1, 5, 1, 1]),
        ([1], [1]),
        ([1, 1], [1]),
        ([], []),
        ([5, 1, 1], [5, 1, 1]),
    ],
)
def test_without_second_start(ids: list[int], expected: list[int]) -> None:
    class Tokenizer:
        bos_token_id = 1

    assert without_second_start(ids, Tokenizer()) == expected
    Tokenizer.bos_token_id = None  # type: ignore[assignment]
    assert without_second_start(ids, Tokenizer()) == ids
