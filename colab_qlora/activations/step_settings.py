"""The settings that a step may run with, each of which saves memory at the price of time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.static_costs import nf4_bytes
from colab_qlora.activations.step_time import Batch

_MIB = 2**20
# tokens of a chunk of the MLP; fewer leave a large GPU waiting for the weights
MLP_CHUNKS = (32768, 16384, 8192, 4096, 2048, 1024)
SMALL_LOGITS_BYTES = 64 * _MIB
# an assumption: a GEMM over a quarter of the rows, which reads the head as often again
SMALL_LOGITS_SHARE = 0.1
# an assumption: two more launches of a decode and a GEMM for each layer and direction
LAUNCH_S = 10e-6
# more tokens, or bytes, than there are: nothing is divided
WHOLE = 2**62


def settings_of_step(batch: Batch) -> Iterator[tuple[float, CostSettings]]:
    """Every combination, with the seconds a step that it costs beyond the fastest.

    All are explicit: what is left to the layers depends on what they keep, and so would the order
    of sums, while plans with the same settings agree bit by bit.
    """
    given = batch.settings
    chunks = [WHOLE, *(size for size in MLP_CHUNKS if size < batch.tokens)]
    if given.mlp_tokens is not None or given.has_dropout:
        chunks = [given.mlp_tokens or WHOLE]
    shape = batch.shape
    largest = max(math.prod(shape.linear(name)) for name in shape.linears) * given.itemsize
    weights = [WHOLE, largest] if given.max_weight_bytes is None else [given.max_weight_bytes]
    logits = [given.logits_budget_bytes]
    if given.logits_budget_bytes is None:
        logits.append(SMALL_LOGITS_BYTES)
    # without a copy rate there is no host to speak of
    both = given.embedding == "either" and batch.profile.copy_up_bytes_per_s > 0
    places = ("gpu", "host") if both else ("host" if given.embedding == "host" else "gpu",)
    for mlp_tokens, most_weight, logits_bytes, holds, place in itertools.product(
        chunks, weights, logits, (False, True), places
    ):
        settings = replace(
            given,
            mlp_tokens=mlp_tokens,
            max_weight_bytes=most_weight,
            logits_budget_bytes=logits_bytes,
            holds_gate_up=holds,
            embedding=place,
        )
        extra_s = batch.host_embedding_s if place == "host" else 0.0
        if mlp_tokens < batch.tokens:
            extra_s += _chunks_s(batch, mlp_tokens)
        if most_weight < WHOLE:
            extra_s += 4 * LAUNCH_S * batch.shape.layers
        if logits_bytes is not None:
            extra_s += SMALL_LOGITS_SHARE * batch.head_s
        yield extra_s, settings


def _chunks_s(batch: Batch, mlp_tokens: int) -> float:
    """Seconds a step for decoding the MLP's weights once more for every further chunk."""
    shape = batch.shape
    numbers = 3 * shape.hidden * shape.intermediate
    moved = (
        nf4_bytes(numbers) if batch.settings.is_4bit else 0
    ) + numbers * batch.settings.itemsize
    further = -(-batch.tokens // mlp_tokens) - 1
    return 2 * shape.layers * further * moved / batch.profile.decode_bytes_per_s


def table_bytes(batch: Batch, settings: CostSettings) -> int:
    """Host memory that the embedding's table will take, if the plan is what sends it there."""
    if settings.embedding != "host" or batch.settings.embedding == "host":
        return 0
    return batch.shape.vocab * batch.shape.hidden * settings.itemsize
