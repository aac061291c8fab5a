"""A pad token that is the end-of-text token: it is said, and texts still learn to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402
from word_model import SPECIAL, write_word_model  # noqa: E402

from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer  # noqa: E402
from colab_qlora.models.settings import settings_of  # noqa: E402
from colab_qlora.training.responses_only import train_on_responses_only  # noqa: E402

END, IGNORED = "</s>", -100
NOTE = (
    "colab_qlora: the pad token is </s>, the end-of-text token: this checkpoint {}; padding is "
    "hidden from the loss by its place in a batch, so a text's own </s> still counts in training; "
    "a data_collator that hides padding by its token would hide it too\n"
)
MISSING, SO = "has no spare token to pad with", "has it so"
ANSWERS = ["one", "two three", "four five six seven", "eight"]
TEMPLATE = (
    "{% for m in messages %}{{ ' ask: ' if m['role'] == 'user' else ' say: ' }}{{ m['content'] }} "
    "{{ eos_token }}{% endfor %}"
)


def write(folder: Path, why: str) -> Path:
    """A model whose tokenizer pads with its end token, or has nothing to pad with."""
    write_word_model(folder, [" ".join(ANSWERS), "ask: say: count"])
    made = transformers.AutoTokenizer.from_pretrained(folder)
    content = json.loads(made.backend_tokenizer.to_str())
    names = {"eos_token": END, "bos_token": "<s>"}
    if why == MISSING:
        # the same ids under names that nothing is padded with
        words = content["model"]["vocab"]
        for name in SPECIAL:
            if name not in names.values():
                number = words.pop(name)
                words[f"word{number}"] = number
        content["model"]["unk_token"] = "word3"
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in words]
    else:
        names["pad_token"] = END
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=TEMPLATE, **names
    )
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(str(folder), 64, "float32", load_in_4bit=False)


def make_trainer(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    model, tokenizer = load(folder)
    model = FastLanguageModel.get_peft_model(
        model, r=8, use_gradient_checkpointing=False, target_modules="all-linear"
    )
    config = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 50, **options}
    config = {"learning_rate": 1e-2, "save_strategy": "no", "optim": "adamw_torch", **config}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder.parent / "out"), **config),
        train_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("why", [MISSING, SO])
def test_it_is_said_once_when_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    model, tokenizer = load(write(tmp_path / "model", why))
    assert tokenizer.pad_token == tokenizer.eos_token == END
    assert capsys.readouterr().out.count(NOTE.format(why)) == 1
    settings = settings_of(model)
    assert settings is not None and [NOTE.format(why)] == [
        f"colab_qlora: {note}\n" for note in settings.notes
    ]


def test_it_is_said_of_a_tokenizer_that_was_saved_with_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the base's own pads otherwise
    model, tokenizer = load(write_word_model(tmp_path / "model", ANSWERS))
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    model.save_pretrained(tmp_path / "adapter")
    for pad, said in ((tokenizer.pad_token, 0), (tokenizer.eos_token, 1)):
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(tmp_path / "adapter")
        capsys.readouterr()
        _, again = load(tmp_path / "adapter")
        assert again.pad_token == pad
        assert capsys.readouterr().out.count(NOTE.format(SO)) == said


def test_nothing_is_said_of_a_pad_token_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load(write_word_model(tmp_path / "model", ANSWERS))
    assert tokenizer.pad_token == "<pad>" and "pad token" not in capsys.readouterr().out


def rows_of(kind: str) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": "count"}]
    said = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    if kind == "text":
        return [{"text": f"count {text}"} for text in ANSWERS]
    if kind == "completion":
        return [{"prompt": "count ", "completion": text} for text in ANSWERS]
    return [{"messages": asked + answer} for answer in said]


@pytest.mark.parametrize("why", [MISSING, SO])
@pytest.mark.parametrize("kind", ["text", "completion", "messages", "responses"])
def test_the_end_of_each_text_has_its_label_and_padding_has_none(
    tmp_path: Path, why: str, kind: str
) -> None:
    trainer = make_trainer(write(tmp_path / "model", why), rows_of(kind))
    if kind == "responses":
        trainer = train_on_responses_only(trainer, "ask: ", "say: ")
    tokenizer = trainer.processing_class
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == len(ANSWERS)
    seen = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        # by hand: the words of the row, one id each, and its end tokens
        words = tokenizer.convert_ids_to_tokens(ids)
        answer = next(text for text in ANSWERS if f"{text} {END}" in " ".join(words))
        row = {
            "text": f"count {answer} {END}",
            "completion": f"count {answer} {END}",
            "messages": f"ask: count {END} say: {answer} {END}",
        }
        expected = row.get(kind, row["messages"]).split()
        assert words == expected + [END] * (len(words) - len(expected))
        count = len(expected)
        answers = len(answer.split()) + 1
        labelled = answers if kind in ("completion", "responses") else count
        end = tokenizer.eos_token_id
        assert labels[count - 1] == end == ids[count - 1]
        assert labels[count - labelled : count] == ids[count - labelled : count]
        assert set(labels[: count - labelled] + labels[count:]) <= {IGNORED}
        seen.append(answer)
    assert sorted(seen) == sorted(ANSWERS)


def test_a_collator_that_goes_by_the_token_would_hide_it(tmp_path: Path) -> None:
    # what the note warns of
    _, tokenizer = load(write(tmp_path / "model", SO))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([tokenizer(f"count {text} {END}") for text in ANSWERS])
    assert tokenizer.eos_token_id not in batch["labels"].flatten().tolist()


def test_a_model_that_pads_with_the_end_token_learns_to_stop(tmp_path: Path) -> None:
    trainer = make_trainer(
        write(tmp_path / "model", MISSING), rows_of("completion"), max_steps=60, seed=1
    )
    trainer.train()
    tokenizer, model = trainer.processing_class, FastLanguageModel.for_inference(trainer.model)
    asked = tokenizer("count eight", return_tensors="pt")
    made = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0]) == f"count eight {END}"
