"""Which kernels fill a group's buffer, and that they fill it alike."""

from __future__ import annotations

import pytest
import torch

from colab_qlora.kernels.backend import is_interpreting, use_backend
from colab_qlora.kernels.int8_decode import Int8Weight
from colab_qlora.layers import decode
from colab_qlora.layers.decode import GroupDecoder
from colab_qlora.layers.linear import LinearPart, LoraBlock
from colab_qlora.layers.scratch import Scratch
from colab_qlora.layers.span import Span
from colab_qlora.models.quiet_import import import_bitsandbytes

bitsandbytes = import_bitsandbytes()

WIDTH, RANK, SPARE = 64, 4, 16


def part(kind: str, rows: int) -> LinearPart:
    dense = torch.randn(rows, WIDTH, dtype=torch.float16)
    weight = dense
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows, WIDTH), dtype=torch.int8)
        weight = Int8Weight(codes, torch.rand(rows))
    elif kind != "dense":
        four_bit, _, blocksize = kind.partition(" ")
        weight = bitsandbytes.nn.Params4bit(
            dense, requires_grad=False, quant_type=four_bit, blocksize=int(blocksize or 64)
        ).to("cpu")
    a = torch.nn.Parameter(torch.randn(RANK, WIDTH))
    b = torch.nn.Parameter(torch.randn(rows, RANK))
    block = LoraBlock(a, b, scaling=2.0, dropout=0.0)
    module = torch.nn.Linear(WIDTH, rows, bias=False)
    name = kind.split()[0]
    return LinearPart(name, name, rows, WIDTH, weight, None, module, (block,))  # type: ignore[arg-type]


def filled(parts: list[LinearPart], is_backward: bool) -> torch.Tensor:
    rows = [0]
    for one in parts:
        rows.append(rows[-1] + one.out_features)
    blocks = [(i, i * RANK, one.blocks[0]) for i, one in enumerate(parts)]
    decoder = GroupDecoder(parts, rows, blocks, Scratch(), "weight")
    span = Span(tuple(range(len(parts))), 0, rows[-1])
    like = torch.empty(1, dtype=torch.float16)
    found = decoder.decoded(span, like, SPARE, is_backward=is_backward)
    return torch.cat([found.beside_b.t().flatten(), found.a.flatten()])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that filled something, in order."""
    seen: list[str] = []

    def watch(name: str) -> None:
        op = getattr(decode, name)

        def watched(*arguments):  # type: ignore[no-untyped-def]
            done = op(*arguments)
            if not (isinstance(done, tuple) and done[:1] == (False,)):
                seen.append(name)
            return done

        monkeypatch.setattr(decode, name, watched)

    for name in ("nf4_group_", "mixed_group_", "decode_weights", "lora_borders_"):
        watch(name)
    return seen


@pytest.mark.skipif(not is_interpreting(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    ("kinds", "ops"),
    [
        (["nf4", "nf4", "nf4"], ["nf4_group_"]),
        (["nf4 32", "nf4"], ["mixed_group_"]),
        (["int8", "nf4", "dense"], ["mixed_group_"]),
        (["dense"], ["mixed_group_"]),
        (["int8"], ["mixed_group_"]),
        (["fp4", "int8"], ["decode_weights", "lora_borders_"]),
        (["int8"] * 4, ["decode_weights", "lora_borders_"]),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") if isinstance(value, list) else None,
)
def test_one_op_fills_what_it_can(
    kinds: list[str], ops: list[str], is_backward: bool, calls: list[str]
) -> None:
    torch.manual_seed(0)
    parts = [part(kind, rows) for kind, rows in zip(kinds, (16, 8, 24, 8), strict=False)]
    with use_backend("triton"):
        found = filled(parts, is_backward)
    assert calls == ops
    with use_backend("torch"):
        assert torch.equal(found, filled(parts, is_backward))
