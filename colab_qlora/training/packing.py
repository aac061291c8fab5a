"""Several documents in one row, none of which sees another: what TRL is asked for, what is said.

    padded         [ a a a . . . . ]   packed, or padding-free    [ a a a b b b b b b b c c ]
                   [ b b b b b b b ]   positions                    0 1 2 0 1 2 3 4 5 6 0 1
                   [ c c . . . . . ]

TRL packs ("bfd": best fit, longest first), and its collator joins the rows of a batch into one with
positions that start again at each document, without the label of its first token. The fused layers
and transformers' own find the documents by these positions. What TRL leaves open is closed here: it
pads rows of the strategies that split what is too long, and eval rows that alone are packed, as if
they were one document each.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset

from colab_qlora.errors import UserError

WRAPPED = "wrapped"  # TRL's name of the strategy that cuts rows anywhere
LEAST_PADDING_SAID = 0.25
# batches that the share of padding is counted in: enough for a percent or two
_BATCHES_COUNTED = 200
_TRL_LOG = "trl.trainer.sft_trainer"


def packing_fields(args: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Fields of SFTConfig that keep packed documents apart.

    Args:
        args: an SFTConfig.
        say: told if documents will see each other all the same, because that was asked for.

    Raises:
        UserError: rows are to be joined and cut at their start.
    """
    if not args.packing:
        if args.padding_free and getattr(args, "truncation_mode", "keep_start") != "keep_start":
            raise UserError(
                "rows that are joined keep their start",
                got=f"truncation_mode={args.truncation_mode!r} with padding_free=True",
                do="Leave one of the two out",
            )
        if args.eval_packing:
            say("eval_packing=True is left out: eval rows are packed where train rows are")
        return {"eval_packing": False} if args.eval_packing else {}
    if args.packing_strategy == WRAPPED:
        say(
            "packing_strategy='wrapped' cuts rows anywhere and lets the documents in a row see "
            "each other; 'bfd' keeps them whole and apart"
        )
        return {}
    return {"padding_free": True}


def check_collator(args: Any, data_collator: Any) -> None:
    """Refuse a collator that would have to be TRL's own.

    Raises:
        UserError: rows are to be packed or joined, and there is another collator for them.
    """
    asked = [name for name in ("packing", "padding_free") if getattr(args, name)]
    if data_collator is not None and asked:
        raise UserError(
            f"{asked[0]}=True needs the trainer's own data collator",
            got=type(data_collator).__name__,
            do=f"Leave data_collator out, or set {' and '.join(asked)} to False",
        )


@contextmanager
def without_attention_warnings() -> Iterator[None]:
    """Hide TRL's warnings that packed documents may see each other without flash attention.

    They do not: fused layers attend within each document, and transformers 5 makes a mask of the
    positions for every other kind of attention.
    """
    log = logging.getLogger(_TRL_LOG)
    log.addFilter(_is_not_of_attention)
    try:
        yield
    finally:
        log.removeFilter(_is_not_of_attention)


@contextmanager
def truncation_left_to_us(args: Any) -> Iterator[None]:
    """Take max_length out of `args` while TRL prepares rows that are joined without packing.

    TRL 1.x refuses it there, although it truncates rows before they are joined; `truncated` does.
    """
    length = args.max_length
    if args.padding_free and not args.packing:
        args.max_length = None
    try:
        yield
    finally:
        args.max_length = length


def truncated(dataset: Any, args: Any) -> Any:
    """The tokenised rows, or several sets of them, cut to max_length where TRL left that to us."""
    if not args.padding_free or args.packing or args.max_length is None or dataset is None:
        return dataset
    if isinstance(dataset, dict):
        return {name: truncated(rows, args) for name, rows in dataset.items()}
    if isinstance(dataset, Dataset) and max(list_lengths(dataset, "input_ids")) <= args.max_length:
        return dataset
    length = args.max_length
    return dataset.map(
        lambda row: {k: v[:length] if isinstance(v, list) else v for k, v in row.items()}
    )


def describe_rows(dataset: Any, name: str, args: Any) -> str | None:
    """One line on how documents lie in the rows that TRL made, or None if there is nothing to say.

    Args:
        dataset: tokenised rows; other kinds than a datasets.Dataset are not looked at.
        name: "train" or "eval".
        args: the fitted SFTConfig.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return None
    if "seq_lengths" in dataset.column_names:
        return _packed_line(dataset, name, args)
    if args.packing or name != "train":
        return None
    if args.padding_free:
        return "the rows of a batch are joined into one without padding; none sees another"
    if getattr(args, "train_sampling_strategy", "random") == "group_by_length":
        return None
    batch = args.per_device_train_batch_size
    share = padding_share(list_lengths(dataset, "input_ids"), batch)
    if share < LEAST_PADDING_SAID:
        return None
    return f"{share:.0%} of a batch of {batch} rows is padding; packing=True trains on none of it"


def padding_share(lengths: Sequence[int], batch: int, seed: int = 0) -> float:
    """Share of a padded batch's places that hold no token, over batches drawn at random.

    Args:
        lengths: of the rows, in tokens.
        batch: rows of a batch; each is padded to the longest of them.
        seed: of the draw.
    """
    if batch < 2 or len(lengths) < 2:
        return 0.0
    draw = random.Random(seed)
    tokens = places = 0
    for _ in range(_BATCHES_COUNTED):
        rows = draw.sample(lengths, min(batch, len(lengths)))
        tokens += sum(rows)
        places += len(rows) * max(rows)
    return 1 - tokens / places if places else 0.0


def _packed_line(dataset: Dataset, name: str, args: Any) -> str:
    documents = sum(list_lengths(dataset, "seq_lengths"))
    tokens, rows = sum(list_lengths(dataset, "input_ids")), len(dataset)
    full = tokens / (rows * args.max_length) if rows else 0.0
    apart = "which see each other" if args.packing_strategy == WRAPPED else "none sees another"
    return (
        f"{documents:,} {name} documents are packed into {rows:,} {'row' if rows == 1 else 'rows'} "
        f"of up to {args.max_length:,} tokens, {full:.0%} full; {apart}"
    )


def list_lengths(dataset: Dataset, column: str) -> list[int]:
    """Lengths of a column's lists, read without making Python numbers of their contents."""
    import pyarrow.compute

    table = dataset.with_format("arrow")[:]
    return pyarrow.compute.list_value_length(table[column]).to_pylist()


def _is_not_of_attention(record: logging.LogRecord) -> bool:
    # TRL 1.15 writes "Flash Attention"
    return "flash attention" not in record.getMessage().lower()
