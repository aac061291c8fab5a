"""What a budget means, what a rung costs against bitsandbytes' own tensors, and bad budgets."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from colab_qlora.activations.static_costs import nf4_bytes
from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.budget import (
    BLOCK_SIZES,
    GIB,
    INT8,
    NF4_32,
    NF4_64,
    RUNGS,
    SIXTEEN_BIT,
    Budget,
    parse_budget,
    rung_bytes,
)
from colab_qlora.quantization.int8_weight import encode_int8

SHAPES = [(576, 1536), (507, 123), (1, 64), (63, 1), (192, 576)]


def tensor_bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rung", [NF4_64, NF4_32])
def test_nf4_bytes_are_those_of_bitsandbytes(shape, rung):
    functional = import_bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        torch.randn(shape), blocksize=BLOCK_SIZES[rung], compress_statistics=True, quant_type="nf4"
    )
    assert rung_bytes(shape, rung) == tensor_bytes(codes, state.absmax, state.state2.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_rungs_bytes_are_those_of_their_tensors(shape):
    weight = torch.randn(shape, dtype=torch.bfloat16)
    assert rung_bytes(shape, INT8) == tensor_bytes(*encode_int8(weight))
    assert rung_bytes(shape, SIXTEEN_BIT) == tensor_bytes(weight)


def test_the_memory_planner_counts_the_same():
    for shape in SHAPES:
        assert rung_bytes(shape, NF4_64) == nf4_bytes(shape[0] * shape[1])


def test_rungs_are_in_the_order_of_their_bytes():
    sizes = [rung_bytes((4096, 4096), rung) for rung in RUNGS]
    assert sizes == sorted(set(sizes))
    # 4 + 8/64 + 32/(64 * 256) bits, and 4 + 8/32 + 32/(32 * 256)
    bits = [Fraction(8 * size, 4096 * 4096) for size in sizes]
    assert bits[:2] == [
        4 + Fraction(1, 8) + Fraction(1, 512),
        4 + Fraction(1, 4) + Fraction(1, 256),
    ]


def test_an_unknown_rung_is_named():
    with pytest.raises(UserError, match="unknown rung of precision: got 'nf4'; allowed: nf4_64"):
        rung_bytes((4, 4), "nf4")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("+0%", Budget(share=0.0)),
        ("+5%", Budget(share=0.05)),
        (" +10 % ", Budget(share=0.1)),
        ("+2.5%", Budget(share=0.025)),
        ("auto", Budget(is_auto=True)),
        ("Auto", Budget(is_auto=True)),
        (6.5, Budget(gib=6.5)),
        (6, Budget(gib=6.0)),
        (np.float32(1.5), Budget(gib=1.5)),
    ],
)
def test_what_is_understood(value, expected):
    assert parse_budget(value) == expected


@pytest.mark.parametrize(
    "value",
    ["", "5%", "-5%", "+%", "+5", "+5%%", "6.5", "+1e2%", "full", None, True, 0, 0.0, -1.0]
    + [float("nan"), float("inf"), [5], {}, b"+5%", 1j, 10**400],
    ids=lambda value: repr(value)[:12],
)
def test_nonsense_is_refused(value):
    with pytest.raises(UserError, match='quantization_budget is not understood: got .*"auto"'):
        parse_budget(value)


def test_more_than_sixteen_bits_is_refused():
    assert parse_budget("+300%").share == 3.0
    with pytest.raises(UserError, match=r"more than 16-bit weights need: got '\+301%'"):
        parse_budget("+301%")


def test_caps_of_shares_count_the_linears_alone():
    assert Budget(share=0.0).cap_bytes(1000, 500) == 1500
    assert Budget(share=0.05).cap_bytes(1000, 500) == 1550
    # facts of an 8B: 3.60 GB of linears, +5 % are 180 MB
    assert Budget(share=0.05).cap_bytes(3_600_000_000) == 3_780_000_000


def test_auto_adds_what_is_spare_and_takes_nothing_away():
    assert Budget(is_auto=True).cap_bytes(1000, 500, spare_bytes=70) == 1570
    assert Budget(is_auto=True).cap_bytes(1000, 500, spare_bytes=-70) == 1500


def test_gib_are_for_all_weights_and_cannot_be_below_plain_nf4():
    plain = 5 * GIB + 1
    with pytest.raises(
        UserError, match=r"below what plain NF4 needs: got 5 GiB; .* 5\.001 GiB"
    ) as e:
        Budget(gib=5.0).cap_bytes(4 * GIB, GIB + 1)
    # the number that the message names works
    least = float(str(e.value).split("allowed: ")[1].split(" GiB")[0])
    assert Budget(gib=least).cap_bytes(4 * GIB, GIB + 1) == int(least * GIB) >= plain
    assert Budget(gib=5.0).cap_bytes(4 * GIB, GIB) == 5 * GIB
