"""What `SFTTrainer` is given to train and to evaluate on, as datasets that were looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colab_qlora.training.dataset_checks import as_dataset, check_dataset, with_messages
from colab_qlora.training.message_checks import checked_messages
from colab_qlora.training.one_start_token import with_one_start
from colab_qlora.training.trainer_checks import check_completions


def checked_rows(
    given: dict[str, Any],
    tokenizer: Any,
    args: Any,
    formatting: Any,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The rows as datasets, by the name of their argument.

    Args:
        given: "train_dataset" and "eval_dataset", as `SFTTrainer` takes them.
        tokenizer: None where nothing is to be tokenised.
        args: an `SFTConfig`.
        formatting: the caller's `formatting_func`, if any.
        say: is told what was noted of the rows.

    Raises:
        UserError: no rows, rows of another kind, messages with images or tools, or no labels left
            after truncation.
    """
    found: dict[str, Any] = {}
    for name, rows in given.items():
        # a missing train set is an error there, and a missing eval set none
        is_left_out = rows is None and name == "eval_dataset"
        kind, field = name.removesuffix("_dataset"), args.dataset_text_field
        # rows that TRL is told to leave alone are left alone here too
        is_laid_out = formatting is None and not args.dataset_kwargs
        # before they become a table, which cannot hold texts beside lists of parts
        rows = checked_messages(rows, kind, tokenizer, field, is_laid_out=is_laid_out)
        found[name] = None if is_left_out else as_dataset(rows, name)
        if is_laid_out:
            found[name], note = with_messages(found[name], kind, field)
            if note:
                say(note)
    check_completions(args, found["train_dataset"])
    for name, dataset in found.items():
        kind = name.removesuffix("_dataset")
        note = check_dataset(dataset, kind, tokenizer, args, formatting) if dataset else None
        one_start = None
        if dataset and tokenizer is not None and formatting is None:
            found[name], one_start = with_one_start(dataset, tokenizer, args)
        for line in filter(None, (note, one_start)):
            say(line)
    return found
