"""Prices of weights on rungs, as they were measured and as the ladder wants them.

    E       = W_rung - W_16                          the error of the rung
    dL_r    = sum over tokens t of <dY_t, E x_t>     first-order change of the loss by row r
    Fisher  = sum over rows of dL_r^2                mean over micro-batches
    guard   = sum over tokens of |dY_t|^2 |E x_t|^2 / outputs    mean over micro-batches
    price   = the larger of the two, nat^2

Rows are independent, so the sum of their squares has the expectation of the micro-batch's dL^2, and
less noise: there are more of them. The guard is what it would be if E x_t pointed anywhere in
relation to dY_t: an output error that counts where the loss is sensitive. It has no sign that could
average out, so that no weight is missed by chance, nor one whose few huge errors the loss is flat
to at first (super-weights, mostly in early down_proj: arXiv 2411.07191). |E x|^2 a token, the plain
output error, decides between equal prices only.

Picked among some 15 formulas by a script that is not kept, on the very linears below, so that it
has to be confirmed elsewhere: 70 linears of SmolLM2-135M, plain NF4, 2 micro-batches of 4 rows,
against the KL that each causes on 8 other rows (Spearman's correlation; how many times too low
against the median weight at worst; share of the KL in the 14 dearest, where 0.66 is possible):

    mean of the micro-batches' dL^2      0.71    50    0.63
    Fisher by rows                       0.81     4    0.64
    the larger of it and the guard       0.83     2    0.65
    |E x|^2                             -0.07   665    0.47
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import NF4_64, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.precision_map import LadderItem, Option


@dataclass(frozen=True)
class RungPrice:
    """A weight on a rung.

    Attributes:
        row_changes: dL, nat, of each micro-batch, of each of its rows.
        guard: see the module, nat^2.
        output_error: |E x|^2 a token.
    """

    row_changes: tuple[tuple[float, ...], ...] = ()
    guard: float = 0.0
    output_error: float = 0.0

    @property
    def loss_changes(self) -> tuple[float, ...]:
        """dL of each micro-batch, nat."""
        return tuple(math.fsum(rows) for rows in self.row_changes)

    @property
    def fisher(self) -> float:
        """By rows, nat^2."""
        squares = (change * change for rows in self.row_changes for change in rows)
        return math.fsum(squares) / max(1, len(self.row_changes))

    @property
    def batch_fisher(self) -> float:
        """Mean of the micro-batches' dL^2, nat^2: all there is where a row is not a sequence."""
        return math.fsum(dl * dl for dl in self.loss_changes) / max(1, len(self.row_changes))

    @property
    def price(self) -> float:
        return max(self.fisher, self.guard)


Prices = dict[str, dict[str, RungPrice]]


def _options(shape: tuple[int, int], prices: dict[str, RungPrice]) -> tuple[Option, ...]:
    """From the fewest bytes to the most, each as cheap as those before it.

    More bytes are never dearer but by the noise of a few micro-batches, which would have a weight
    change its rung for nothing.
    """
    found: list[Option] = []
    for rung in sorted(prices, key=lambda rung: rung_bytes(shape, rung)):
        price = prices[rung].price
        least = min(price, found[-1].price) if found else price
        found.append(Option(rung, rung_bytes(shape, rung), least, prices[rung].output_error))
    return tuple(found)


def ladder_items(model: Any, prices: Prices) -> list[LadderItem]:
    """What `ladder.choose_rungs` chooses from: bytes of each rung and its price."""
    items = []
    for item in weight_items(model):
        if item.name not in prices:
            continue
        first: Any = item.modules[0]
        table = isinstance(first, torch.nn.Embedding)
        shape = (
            (first.num_embeddings, first.embedding_dim)
            if table
            else (first.out_features, first.in_features)
        )
        options = _options(shape, prices[item.name])
        is_plain_nf4 = NF4_64 in prices[item.name]
        items.append(LadderItem(item.name, options, NF4_64 if is_plain_nf4 else SIXTEEN_BIT))
    return items
