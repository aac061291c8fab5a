"""`train_on_responses_only`: a trainer whose labels are the assistants' answers alone.

The rows get a "labels" column, because that is what TRL's collator takes in every version that the
kit works with (1.x no longer looks at masks) and what transformers' DataCollatorForSeq2Seq takes.
Which tokens are labelled: `colab_qlora/data/response_spans.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset

from colab_qlora.data.response_markers import TurnMarkers, choose_markers
from colab_qlora.data.response_spans import ResponseFinder
from colab_qlora.data.token_view import show_tokens, trained_tokens
from colab_qlora.data.wording import counted
from colab_qlora.errors import UserError
from colab_qlora.training.callbacks import LossLogCallback
from colab_qlora.training.run_settings import run_settings

__all__ = ["train_on_responses_only"]

_IGNORED = -100
_MASKS = ("completion_mask", "assistant_masks")
# what a message shows of a row, in characters
_SHOWN = 600


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    *,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Leave labels on the assistants' answers only, in the train set and in every eval set.

    Tokens without a label before stay so. Rows in which nothing is left to learn are dropped, and
    their number is said. `show_tokens(trainer.train_dataset[0], tokenizer)` shows the outcome.

    Args:
        trainer: an SFTTrainer, of this package or TRL's, whose rows are tokenised.
        instruction_part: the text before a user's text; None: as in the chat template.
        response_part: the text before an answer; None: as in the chat template.
        force_match: False: white space around the two parts may differ from theirs in the rows.
        tokenizer: the tokenizer of the rows; None: the trainer's.
        return_function: return what labels a batch of rows, a dict of lists, and leave the
            trainer, which may be None then, as it is.
        num_proc: number of processes that label rows; None: this one.

    Returns:
        The trainer.

    Raises:
        UserError: the markers are not known, nothing is left to learn in a set, its rows are not
            tokenised or packed without borders, or the data collator does not use their labels.

    Example:
        >>> trainer = train_on_responses_only(trainer)  # doctest: +SKIP
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(trainer, "processing_class", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor for images
    _check_trainer(trainer, tokenizer, return_function)
    markers = choose_markers(tokenizer, instruction_part, response_part)
    finder = ResponseFinder(tokenizer, markers, force_match=force_match)
    # TRL takes no notice of this mask where it is told to train on prompts too
    unheeded = () if getattr(trainer, "completion_only_loss", True) else ("completion_mask",)
    label = _Labeller(finder, unheeded)
    if return_function:
        return label
    given = trainer.eval_dataset
    eval_sets = given if isinstance(given, dict) else {} if given is None else {None: given}
    # all are labelled before the trainer is touched, so that an error leaves it as it was
    train_set = _labelled(trainer.train_dataset, "train", trainer, label, num_proc)
    labelled = {
        name: _labelled(
            rows, "eval" if name is None else f"eval {name!r}", trainer, label, num_proc
        )
        for name, rows in eval_sets.items()
    }
    trainer.train_dataset = train_set
    if given is not None:
        trainer.eval_dataset = labelled if isinstance(given, dict) else labelled[None]
    _refresh_log(trainer)
    return trainer


class _Labeller:
    """Maps a batch of rows to their labels; an object, so that other processes can be sent it."""

    def __init__(self, finder: ResponseFinder, unheeded: Sequence[str]) -> None:
        self.finder, self.unheeded = finder, unheeded

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        names = [name for name in batch if name not in self.unheeded]
        rows = zip(*(batch[name] for name in names), strict=True)
        return {"labels": [self.row_labels(dict(zip(names, row, strict=True))) for row in rows]}

    def row_labels(self, row: Mapping[str, Any]) -> list[int]:
        ids = list(row["input_ids"])
        # one conversation at a time: in a packed row the next one begins without a warning
        ends = list(accumulate(row.get("seq_lengths") or [len(ids)]))
        answers: list[bool] = []
        for start, end in zip([0, *ends], ends, strict=False):
            answers += self.finder.mask(ids[start:end])
        labels = row.get("labels") or ids
        both = zip(labels, answers, trained_tokens(row), strict=True)
        return [label if answer and trained else _IGNORED for label, answer, trained in both]


def _labelled(
    rows: Any, name: str, trainer: Any, label: _Labeller, num_proc: int | None
) -> Dataset:
    """The rows that have something left to learn, with their labels."""
    _check_rows(rows, name, trainer)
    labelled = rows.map(label, batched=True, num_proc=num_proc, desc=f"Labelling {name} responses")
    kept = labelled.filter(_has_label, input_columns=["labels"], num_proc=num_proc)
    if not len(kept):
        raise _nothing_left(rows[0], name, label.finder)
    # the labels have them in already, and some collators take no column that they do not know
    kept = kept.remove_columns([mask for mask in _MASKS if mask in kept.column_names])
    _check_collator(kept, trainer)
    dropped = len(rows) - len(kept)
    if dropped:
        verb = "is" if dropped == 1 else "are"
        _say(
            trainer,
            f"{dropped:,} of {counted(len(rows), f'{name} row')} {verb} left out: "
            "nothing in them is a response to train on",
        )
    return kept


def _has_label(labels: Sequence[int]) -> bool:
    return any(label != _IGNORED for label in labels)


def _check_trainer(trainer: Any, tokenizer: Any, return_function: bool) -> None:
    if tokenizer is None or not (return_function or hasattr(trainer, "train_dataset")):
        raise UserError(
            "train_on_responses_only needs a trainer with a tokenizer",
            got=f"a {type(trainer).__name__} with {type(tokenizer).__name__} as its tokenizer",
            allowed="an SFTTrainer; or a tokenizer with return_function=True",
            do="Make the trainer first: SFTTrainer(model=..., processing_class=tokenizer, ...)",
        )


def _check_rows(rows: Any, name: str, trainer: Any) -> None:
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        is_dataset = isinstance(rows, Dataset)
        raise UserError(
            f"the {name} rows cannot be labelled",
            got=", ".join(rows.column_names) if is_dataset else type(rows).__name__,
            allowed="a datasets.Dataset with the column 'input_ids'",
            do="Pass an SFTTrainer that tokenised its rows, neither streamed nor with images",
        )
    packs = getattr(trainer.args, "packing", False)
    if name != "train" and getattr(trainer.args, "eval_packing", None) is not None:
        packs = trainer.args.eval_packing
    if packs and "seq_lengths" not in rows.column_names:
        raise UserError(
            f"the {name} rows are packed without the borders of their conversations",
            got=f"packing_strategy={getattr(trainer.args, 'packing_strategy', None)!r}",
            allowed="packing_strategy='bfd', or packing=False",
            do="Make the trainer with one of these, as an answer cut off from its marker is lost",
        )


def _check_collator(rows: Dataset, trainer: Any) -> None:
    """Refuse a collator that makes labels of its own, by what it does with two rows."""
    names = [n for n in ("input_ids", "labels", "seq_lengths") if n in rows.column_names]
    examples = rows.select(range(min(2, len(rows)))).select_columns(names).to_list()
    expected = [label for row in examples for label in row["labels"] if label != _IGNORED]
    refused = UserError(
        "the data collator does not use the rows' labels",
        got=type(trainer.data_collator).__name__,
        allowed="TRL's own collator, or DataCollatorForSeq2Seq",
        do="Make the trainer without data_collator",
    )
    try:
        labels = trainer.data_collator(examples)["labels"].flatten().tolist()
    except Exception as error:  # those that pad known columns alone fail over these
        raise refused from error
    if [label for label in labels if label != _IGNORED] != expected:
        raise refused


def _nothing_left(row: Mapping[str, Any], name: str, finder: ResponseFinder) -> UserError:
    markers: TurnMarkers = finder.markers
    unmasked = {"input_ids": row["input_ids"], "seq_lengths": row.get("seq_lengths")}
    labels = _Labeller(finder, ()).row_labels(unmasked)
    if _has_label(labels):
        do = "Make the trainer without labels or masks that leave the responses out"
    elif markers.response.strip() in finder.tokenizer.decode(row["input_ids"]):
        do = "Raise max_length, if the rows end before their answers do"
    else:
        do = "Pass instruction_part and response_part as they stand in the row"
    view = str(show_tokens({**unmasked, "labels": labels}, finder.tokenizer)).replace("\n", "")
    shown = view if len(view) <= _SHOWN else view[:_SHOWN] + "..."
    return UserError(
        f"no {name} row has anything left to train on",
        got=f"instruction_part={markers.instruction!r}, response_part={markers.response!r}, "
        f"and in the first row the responses are: {shown}",
        allowed="answers behind response_part, up to the end of their turn",
        do=do,
    )


def _refresh_log(trainer: Any) -> None:
    # a resumed run compares its rows with those that the log's head tells of
    log = getattr(trainer, "_loss_log", None)
    if isinstance(log, LossLogCallback):
        log.run = run_settings(trainer)


def _say(trainer: Any, line: str) -> None:
    say: Callable[[str], None] | None = getattr(trainer, "_say", None)
    if say is not None:
        say(line)
    else:
        print(f"colab_qlora: {line}", flush=True)
