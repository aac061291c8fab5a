"""Turn Alpaca rows into training examples, as one prompt text or as chat messages.

A row has an "instruction", an "output" and, sometimes, an "input" with material to work on:

    {"instruction": "Name the capital.", "input": "France", "output": "Paris"}

An example has a "prompt", which the model only reads, and a "completion", which it learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from colab_qlora.data.records import where
from colab_qlora.data.wording import counted, first_few, kind_of, shown
from colab_qlora.errors import UserError

FIELDS = ("instruction", "output")

# the wording of Stanford Alpaca: models tuned on its many descendants know these very sentences
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def validate_alpaca(records: Sequence[Mapping[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Refuse rows that would train the model on nothing or on something else than text.

    Args:
        records: the rows; `Records` lets the faults name file and line.
        fields: the fields that each row must fill. "input" may be missing, null or blank, but
            where it is given it must be text.

    Raises:
        UserError: there is no row, or a field is missing, blank or not text. The first three faults
            are named, the rest counted.
    """
    if len(records) == 0:
        raise UserError(
            "there is no row to format",
            got="0 rows",
            allowed="at least one",
            do="Read a file with read_records(path)",
        )
    faults: list[str] = []
    faulty_rows = 0
    for index, row in enumerate(records):
        found = [f"{where(records, index)}: {fault}" for fault in _faults(row, fields)]
        faulty_rows += bool(found)
        faults += found
    if faults:
        names = " and ".join(repr(field) for field in fields)
        raise UserError(
            f"{faulty_rows:,} of {counted(len(records), 'row')} cannot be used",
            got=first_few(faults),
            allowed=f"text that is not blank in {names}; 'input' is text, blank or missing",
            do="Mend or delete each row named here",
        )


def _faults(row: object, fields: Sequence[str]) -> list[str]:
    if not isinstance(row, Mapping):
        return [f"{kind_of(row)}, not an object"]
    faults = []
    for field in fields:
        if field not in row:
            has = ", ".join(shown(key) for key in row) or "no field"
            faults.append(f"{field!r} is missing (has {has})")
            continue
        value = row[field]
        if not isinstance(value, str):
            faults.append(f"{field!r} is {kind_of(value)} ({shown(value)}), not text")
        elif not value:
            faults.append(f"{field!r} is empty")
        elif not value.strip():
            faults.append(f"{field!r} is only white space ({shown(value)})")
    value = row.get("input")
    if "input" not in fields and value is not None and not isinstance(value, str):
        faults.append(f"'input' is {kind_of(value)} ({shown(value)}), not text")
    return faults


def alpaca_prompt(instruction: str, input: str | None = None) -> str:
    """Return the prompt of one row, which ends just after "### Response:" and a line break.

    Use it for generation too: a prompt that differs from training costs quality.
    """
    if input and input.strip():
        return PROMPT_WITH_INPUT.format(instruction=instruction, input=input)
    return PROMPT_WITHOUT_INPUT.format(instruction=instruction)


def format_alpaca(
    records: Sequence[Mapping[str, Any]], eos_token: str | None
) -> list[dict[str, str]]:
    """Turn Alpaca rows into prompt and completion texts.

    Args:
        records: rows with "instruction", "output" and optionally "input".
        eos_token: the tokenizer's end token as text, put behind each completion once.

    Returns:
        One {"prompt": text, "completion": text} a row.

    Raises:
        UserError: a row cannot be used (see `validate_alpaca`), or `eos_token` is None or empty.

    Example:
        >>> rows = [{"instruction": "Add 1 and 2.", "output": "3"}]
        >>> format_alpaca(rows, "</s>")[0]["completion"]
        '3</s>'
    """
    if not isinstance(eos_token, str) or not eos_token:
        raise UserError(
            "eos_token is not set, and a model that never sees its end token never stops",
            got=repr(eos_token),
            allowed="the end token as text, such as '</s>' or '<|im_end|>'",
            do="Pass eos_token=tokenizer.eos_token, and set it on the tokenizer if it is None",
        )
    validate_alpaca(records)
    return [
        {
            "prompt": alpaca_prompt(row["instruction"], row.get("input")),
            # a second end token behind the first would only ever be met after the model stopped
            "completion": row["output"].removesuffix(eos_token) + eos_token,
        }
        for row in records
    ]


def format_chat(records: Sequence[Mapping[str, Any]]) -> list[dict[str, list[dict[str, str]]]]:
    """Turn Alpaca rows into conversational prompt and completion, as TRL takes them.

    The tokenizer's chat template adds the role marks and the end token later. An input follows its
    instruction after an empty line.

    Args:
        records: rows with "instruction", "output" and optionally "input".

    Returns:
        One {"prompt": [user message], "completion": [assistant message]} a row; a message is
        {"role": text, "content": text}.

    Raises:
        UserError: a row cannot be used (see `validate_alpaca`).
    """
    validate_alpaca(records)
    examples = []
    for row in records:
        content = row["instruction"]
        if (row.get("input") or "").strip():
            content += "\n\n" + row["input"]
        examples.append(
            {
                "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
        )
    return examples


def to_text(examples: Iterable[Mapping[str, Any]], tokenizer: Any = None) -> list[dict[str, str]]:
    """Join prompt and completion into one text, for trainers that know only "text".

    The border between the two is lost, so such a trainer learns the prompt as well. Prefer prompt
    and completion where you can.

    Args:
        examples: what `format_alpaca` or `format_chat` returned.
        tokenizer: a Hugging Face tokenizer with a chat template; needed for chat examples only.

    Returns:
        One {"text": text} an example.

    Raises:
        UserError: chat examples without a tokenizer, or a tokenizer without a chat template.
    """
    texts = []
    for example in examples:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str):
            texts.append({"text": prompt + completion})
        else:
            require_chat_template(tokenizer)
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            texts.append({"text": text})
    return texts


def require_chat_template(tokenizer: Any) -> None:
    """Raise UserError unless `tokenizer` can lay out chat messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat examples need a chat template",
            got="no tokenizer" if tokenizer is None else "a tokenizer whose chat_template is None",
            allowed="a tokenizer with a chat template",
            do="Pass the tokenizer of an instruction-tuned model, or use format_alpaca",
        )
