"""Weights stored in several ways and the LoRA around them in one launch: every bit as in many."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from kernel_helpers import CAN_RUN_TRITON, DEVICE, HALF_DTYPES

from colab_qlora.kernels import mixed_group
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.int8_decode import Int8Weight, int8_decode_
from colab_qlora.kernels.lora_borders import Border, lora_borders_
from colab_qlora.kernels.mixed_group import mixed_group_
from colab_qlora.kernels.nf4 import nf4_dequantize
from colab_qlora.models.quiet_import import import_bitsandbytes

bitsandbytes = import_bitsandbytes()

pytestmark = pytest.mark.skipif(
    not CAN_RUN_TRITON, reason="needs Triton with a GPU or the interpreter"
)
WIDTH = 128
MIXED = ("nf4", "int8", "plain")


def nf4(rows, width, blocksize=64, nested=True):
    return bitsandbytes.nn.Params4bit(
        torch.randn(rows, width, dtype=torch.float16) * torch.rand(rows, 1).half(),
        requires_grad=False,
        quant_type="nf4",
        blocksize=blocksize,
        compress_statistics=nested,
    ).to(DEVICE)


def store(kind, rows, width, dtype):
    """A weight as a map of precisions leaves it."""
    if kind.startswith("nf4"):
        return nf4(rows, width, 32 if "32" in kind else 64, "flat" not in kind)
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8).to(DEVICE)
        return Int8Weight(codes, torch.rand(rows).to(DEVICE))
    assert kind == "plain"
    return torch.nn.Parameter(torch.randn(rows, width).to(dtype).to(DEVICE), requires_grad=False)


class Group:
    """Weights, a buffer of NaN with their places in it, and an adapter for each."""

    def __init__(self, kinds, rows, width=WIDTH, spare=16, dtype=torch.float16, plain=None):
        torch.manual_seed(0)
        self.width, self.height = width, sum(rows)
        shape = (self.height + spare, width + spare)
        self.buffer = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        self.weights = [
            store(kind, count, width, plain or dtype)
            for kind, count in zip(kinds, rows, strict=True)
        ]
        self.outs, self.blocks, first = [], [], 0
        for index, count in enumerate(rows):
            self.outs.append(self.buffer[first : first + count, :width])
            a, b = torch.randn(3, width, device=DEVICE), torch.randn(count, 3, device=DEVICE)
            self.blocks.append(Border(first, 3 * index, a, b, 1.7, index != 1, 0.6))
            first += count
        self.blocks = self.blocks if spare else []

    def at_once(self):
        places = (self.buffer, self.height, self.width, self.blocks)
        with use_backend("triton"):
            return mixed_group_(self.weights, self.outs, *places)

    def one_by_one(self):
        """The same buffer, each weight by its own op."""
        buffer = torch.full_like(self.buffer, torch.nan)
        first = 0
        for weight in self.weights:
            stored = getattr(weight, "quant_state", weight)
            rows = stored.shape[0]
            out = buffer[first : first + rows, : self.width]
            first += rows
            if isinstance(weight, Int8Weight):
                int8_decode_(weight, out)
            elif hasattr(weight, "quant_state"):
                nf4_dequantize(weight, out=out)
            else:
                out.copy_(weight)
        lora_borders_(buffer, self.height, self.width, self.blocks)
        return buffer


def check(group):
    is_done, _ = group.at_once()
    assert is_done
    expected = group.one_by_one()
    # the corner belongs to nobody
    torch.testing.assert_close(group.buffer, expected, rtol=0, atol=0, equal_nan=True)
    assert group.buffer[group.height :, group.width :].isnan().all()
    assert not group.buffer[: group.height].isnan().any()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("kinds", list(permutations(MIXED)), ids="-".join)
def test_each_kind_in_each_place(kinds, dtype):
    check(Group(kinds, (64, 16, 21), dtype=dtype))


@pytest.mark.parametrize("nested", ["", " flat"])
@pytest.mark.parametrize(
    "kinds",
    [("nf4", "nf4 32"), ("nf4 32", "nf4", "nf4 32"), ("nf4 32", "int8"), ("plain", "nf4 32")],
    ids="-".join,
)
def test_blocks_of_two_sizes(kinds, nested):
    kinds = [kind + nested if "nf4" in kind else kind for kind in kinds]
    check(Group(kinds, (37, 40, 5)[: len(kinds)]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["int8", "plain", "nf4 32"])
def test_one_kind_alone(kind, count):
    check(Group([kind] * count, (37, 37, 64)[:count]))


@pytest.mark.parametrize("kind", MIXED)
def test_several_programs_and_a_last_one_that_is_not_full(kind):
    check(Group([kind, "int8"], (100, 3), width=200))


@pytest.mark.parametrize("plain", [torch.float32, torch.float16])
def test_plain_weights_of_another_dtype_are_rounded_once(plain):
    check(Group(["plain", "int8"], (21, 8), plain=plain))


def test_one_without_rows():
    group = Group(["int8", "plain"], (16, 8))
    group.weights[0] = Int8Weight(group.weights[0].codes[:0], group.weights[0].absmax[:0])
    group.outs[0] = group.buffer[:0, :WIDTH]
    is_done, _ = group.at_once()
    assert is_done
    assert torch.equal(group.outs[1], group.weights[1])
    assert group.buffer[:16, :WIDTH].isnan().all()


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": ["int8"] * 4, "rows": (8, 8, 8, 8)},
        {"kinds": ["int8", "plain"], "rows": (16, 8), "spare": 0},
        {"kinds": ["int8", "plain"], "rows": (16, 8), "width": 124},
        {"kinds": ["int8", "plain"], "rows": (16, 8), "spare": 12},
        {"kinds": ["nf4", "nf4 flat", "int8"], "rows": (16, 8, 8)},
        {"kinds": ["plain"], "rows": (16,), "plain": torch.float64},
        {"kinds": ["plain"], "rows": (16,), "dtype": torch.float64},
    ],
    ids=["four", "no borders", "odd rows", "odd stride", "two forms", "float64", "float64 buffer"],
)
def test_what_one_launch_cannot_do_is_left_alone(change):
    group = Group(**change)
    assert group.at_once() == (False, None)
    assert group.buffer.isnan().all()


def _moved(weight):
    """A plain weight with gaps between its rows."""
    return torch.empty(weight.shape[0], 2 * WIDTH, dtype=weight.dtype, device=DEVICE)[:, :WIDTH]


class _Elsewhere(torch.Tensor):
    """Who knows where its numbers are."""


def _subclass(weight):
    return weight.detach().as_subclass(_Elsewhere)


def _shifted(weight):
    """int8 codes that no word can be read from."""
    place = torch.zeros(weight.codes.numel() + 1, dtype=torch.int8, device=DEVICE)[1:]
    return Int8Weight(place.view_as(weight.codes).copy_(weight.codes), weight.absmax)


@pytest.mark.parametrize(
    ("kind", "change"), [("plain", _moved), ("plain", _subclass), ("int8", _shifted)]
)
def test_weights_that_cannot_be_read_widely_are_left_alone(kind, change):
    group = Group([kind, "nf4"], (16, 8))
    group.weights[0] = change(group.weights[0])
    assert group.at_once() == (False, None)
    assert group.buffer.isnan().all()


def test_torch_leaves_it_to_others():
    group = Group(MIXED, (16, 8, 8))
    with use_backend("torch"):
        places = (group.buffer, group.height, WIDTH, group.blocks)
        assert mixed_group_(group.weights, group.outs, *places) == (False, None)
    assert group.buffer.isnan().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_place_that_does_not_fit_is_named_before_anything_is_written(kind):
    group = Group(["plain", kind], (16, 8))
    group.outs[1] = group.outs[1][:7]
    with pytest.raises(ValueError, match="out does not fit the weight"):
        group.at_once()
    assert group.buffer.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [MIXED, ("plain",), ("int8", "nf4 32")], ids="-".join)
def test_what_it_returns_does_it_again(kinds):
    group = Group(kinds, (64, 16, 21)[: len(kinds)])
    _, launch = group.at_once()
    expected = group.buffer.clone()
    group.buffer.fill_(torch.nan)
    launch()
    torch.testing.assert_close(group.buffer, expected, rtol=0, atol=0, equal_nan=True)


def test_every_case_is_of_this_kernel():
    assert {case.kernel for case in mixed_group.compile_cases()} == {mixed_group.mixed_kernel}
