"""Pad batches to few lengths where the layers wait for the host, so that their passes are recorded.

A recording (`models/pass_graphs.py`) is of one shape. Rows of instructions come in a hundred
lengths; padded to multiples of 32 tokens they come in ten, for 16 tokens a row more on average. The
GPU has time for these where it waits for the host, and nowhere else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from colab_qlora.models.fuse import fused_layers, state_of

PADDING_MULTIPLE = 32
# the host's share of a layer's time, by the machine's rates, from which padding is free; layers are
# recorded from half of that, as measured (models/pass_sights.py)
HOST_SHARE = 1.0
_ROWS_LOOKED_AT = 256


def padding_multiple(
    trainer: Any, launch_and_gpu_s: Callable[[Any, int, int], tuple[float, float]] | None = None
) -> int | None:
    """Multiple of tokens to pad the trainer's batches to; None: leave them as they are.

    Args:
        trainer: made, with its tokenised rows and its collator.
        launch_and_gpu_s: seconds that a layer takes the host to start and the GPU to run, of a
            model, rows and tokens a row; None: by the rates of this machine.
    """
    args, model = trainer.args, trainer.model
    collator = trainer.data_collator
    is_joined = args.packing or args.padding_free
    state = state_of(model)
    if is_joined or getattr(collator, "pad_to_multiple_of", 0) is not None or state is None:
        return None
    if not fused_layers(model) or not state.graphs.is_on:
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = _lengths(trainer.train_dataset)
    if not lengths or (limit or 0) % PADDING_MULTIPLE:
        return None
    times = _by_rates if launch_and_gpu_s is None else launch_and_gpu_s
    rows = args.per_device_train_batch_size
    host_s, gpu_s = times(model, rows, round(statistics.mean(lengths)))
    return PADDING_MULTIPLE if host_s > HOST_SHARE * gpu_s else None


def pad_to_few_lengths(trainer: Any, say: Callable[[str], None]) -> None:
    """Set the collator so, and say it."""
    multiple = padding_multiple(trainer)
    if multiple is not None:
        trainer.data_collator.pad_to_multiple_of = multiple
        say(
            f"rows are padded to multiples of {multiple} tokens, so that few shapes of batches "
            "come: the GPU has time for it while it waits for the host"
        )


def _lengths(dataset: Any) -> list[int]:
    """Tokens of the first rows; none where rows come one by one or are not tokenised."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return []
    if not hasattr(dataset, "select"):
        return []
    rows = dataset.select(range(min(len(dataset), _ROWS_LOOKED_AT)))
    return [len(ids) for ids in rows["input_ids"]]


def _by_rates(model: Any, rows: int, length: int) -> tuple[float, float]:
    from colab_qlora.models.smart import model_device, profile_for, workload_of

    device = model_device(model)
    if device.type != "cuda":
        return 0.0, 1.0
    workload = replace(workload_of(model), batch_size=rows, seq_length=length)
    if workload.settings.has_dropout:  # drawn anew in every pass, so nothing is recorded
        return 0.0, 1.0
    profile = profile_for(device, workload)
    batch = workload.batch_on(profile)
    return profile.layer_launch_s, batch.forward_s + batch.backward_s
