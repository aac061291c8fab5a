"""Flash attention against float64, and against torch's own attention one document at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import cancelling
from kernel_helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    ON_GPU,
    assert_as_exact_as_stock,
    relative_error,
)

from colab_qlora.errors import UserError
from colab_qlora.kernels import flash_attention as module
from colab_qlora.kernels import flash_attention_backward as backward_module
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.flash_attention import flash_attention, flash_attention_forward
from colab_qlora.kernels.flash_attention_backward import flash_attention_backward

SPARE_COLUMNS = 24
NAMES = ("o", "lse", "dq", "dk", "dv")
PACKED = (1, 63, 0, 130, 17)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    padding: int = 0  # tokens after the last document
    strength: float = 1.0  # factor of q; scores of 100 and more at 30
    cap: float | None = None
    blocks: tuple[int, int] | None = None  # under the interpreter; a GPU takes its own


CASES = {
    "4:1, 64": Case(PACKED, 4, 1, 64, blocks=(32, 64)),
    "4:1, 64, not causal": Case((1, 63, 0, 130), 4, 1, 64, causal=False, padding=7),
    "1:1, 80": Case(PACKED, 2, 2, 80, padding=3, blocks=(64, 32)),
    "3:1, 128": Case((70, 5), 3, 1, 128),
    "2:1, 256": Case((19, 33), 2, 1, 256, blocks=(16, 16)),
    "2:1, 24": Case((40, 7), 4, 2, 24, padding=70, blocks=(16, 32)),
    "whole blocks": Case((64, 64), 2, 1, 64, blocks=(32, 32)),
    "whole blocks, not causal": Case((64, 32), 2, 1, 64, causal=False, blocks=(32, 32)),
    "large scores": Case((50, 37), 2, 1, 64, strength=30.0, blocks=(32, 16)),
    "large scores, not causal": Case((50, 37), 2, 1, 64, False, strength=30.0, blocks=(32, 16)),
    "one token": Case((1,), 4, 2, 64),
    # scores reach 3 to 4, and 30 with large ones: caps that bend them all
    "capped": Case(PACKED, 4, 2, 64, cap=2.0, blocks=(32, 64)),
    "capped, not causal": Case((19, 33), 2, 1, 256, False, padding=5, cap=2.0, blocks=(16, 16)),
    "capped, 80": Case((70, 5), 3, 1, 80, cap=20.0, strength=10.0, blocks=(16, 32)),
}


def _starts(case: Case) -> torch.Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0).to(DEVICE, torch.int32)


def _options(case: Case) -> dict:
    return {
        "scale": 0.7 * case.head_dim**-0.5,
        "cu_seqlens": _starts(case),
        "max_seqlen": max(case.lengths, default=0),
        "causal": case.causal,
        "cap": case.cap,
    }


def _blocks(case: Case) -> tuple[int, int] | None:
    return None if ON_GPU else case.blocks


def _draw(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(q, k, v, do): columns of one buffer, NaN in its spare columns and in the padding tokens."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.q_heads, case.kv_heads, case.kv_heads, case.q_heads)
    widths = [count * case.head_dim for count in heads]
    tokens = sum(case.lengths)
    wide = torch.full((tokens + case.padding, sum(widths) + SPARE_COLUMNS), torch.nan)
    wide[:tokens, : sum(widths)] = torch.randn(tokens, sum(widths), generator=generator)
    wide[:, : widths[0]] *= case.strength
    pieces = wide.to(DEVICE, dtype).split([*widths, SPARE_COLUMNS], 1)
    return tuple(x.unflatten(1, (count, -1)) for x, count in zip(pieces, heads, strict=False))


def _scores(q: torch.Tensor, k: torch.Tensor, case: Case) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) * _options(case)["scale"]
    if case.cap is not None:
        scores = torch.tanh(scores / case.cap) * case.cap
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if case.causal else scores


def _truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    return _scores(q, k, case).softmax(-1) @ v


def _stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    if case.cap is not None:
        # as transformers' eager attention for Gemma 2
        return _scores(q, k, case).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    options = {"is_causal": case.causal, "scale": _options(case)["scale"]}
    return F.scaled_dot_product_attention(q[None], k[None], v[None], **options)[0]


def _by_document(attend, tensors, case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """o, lse and the gradients by autograd, of the documents' tokens."""
    tokens, group = sum(case.lengths), case.q_heads // case.kv_heads
    q, k, v = (x[:tokens].detach().to(dtype).requires_grad_() for x in tensors[:3])
    queries, keys, values = (
        x.transpose(0, 1).split(case.lengths, 1)
        for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    parts = [x for x in zip(queries, keys, values, strict=True) if x[0].shape[1]]
    o = torch.cat([attend(*part, case) for part in parts], 1).transpose(0, 1)
    o.backward(tensors[3][:tokens].to(dtype))
    lse = [_scores(a, b, case).logsumexp(-1) for a, b, _ in parts]
    return o.detach(), torch.cat(lse, 1).detach(), q.grad, k.grad, v.grad


def _run(tensors, case: Case, **options) -> tuple[torch.Tensor, ...]:
    q, k, v, do = tensors
    options = {**_options(case), "blocks": _blocks(case), **options}
    o, lse = flash_attention_forward(q, k, v, **options)
    return o, lse, *flash_attention_backward(do, q, k, v, o, lse, **options)


# the scores of hidden keys may overflow, and are then not used
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_stock(name: str, backend: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = _draw(case, dtype)
    with use_backend(backend):
        got = _run(tensors, case)
    truth = _by_document(_truth, tensors, case, torch.float64)
    stock = _by_document(_stock, tensors, case, dtype)
    tokens = sum(case.lengths)
    # "one token" has gradients of zero
    terms = cancelling([x[:tokens] for x in tensors], _options(case)["scale"])
    # a score of 100 is off by 50 eps before exp() sees it, in another way for each order of sums
    roundings = 8 if case.strength > 1 and dtype == torch.float32 else None
    for label, mine, theirs, exact in zip(NAMES, got, stock, truth, strict=True):
        assert mine.dtype == (torch.float32 if label == "lse" else dtype)
        rows = mine.t() if label == "lse" else mine
        assert rows.shape[0] == tokens + case.padding
        assert (rows[tokens:] == 0).all(), f"{label} of the padding is not 0"
        known = rows[:tokens].t() if label == "lse" else rows[:tokens]
        assert_as_exact_as_stock(
            known, theirs, exact, label, terms=terms.get(label), roundings=roundings
        )


@pytest.mark.parametrize("name", ["4:1, 64", "2:1, 24", "large scores, not causal", "capped"])
def test_reference_is_exact_in_float64(name: str) -> None:
    case = CASES[name]
    tensors = _draw(case, torch.float64)
    got = _run(tensors, case)
    tokens = sum(case.lengths)
    for label, mine, exact in zip(
        NAMES, got, _by_document(_truth, tensors, case, torch.float64), strict=True
    ):
        assert mine.dtype == torch.float64
        known = mine[:, :tokens] if label == "lse" else mine[:tokens]
        assert relative_error(known, exact) < 1e-12, label


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_only_into_the_buffers_it_is_given(backend: str) -> None:
    case = Case((40, 0, 9), 4, 2, 80, padding=5, blocks=(16, 16))
    dtype = torch.float16
    tensors = _draw(case, dtype)
    before = [x.clone() for x in tensors]
    tokens = sum(case.lengths) + case.padding
    columns = (case.q_heads, case.q_heads, case.kv_heads, case.kv_heads)
    widths = [count * case.head_dim for count in columns]
    wide = torch.full((tokens, sum(widths) + SPARE_COLUMNS), torch.nan, device=DEVICE, dtype=dtype)
    *pieces, spare = wide.split([*widths, SPARE_COLUMNS], 1)
    buffers = [x.unflatten(1, (count, -1)) for x, count in zip(pieces, columns, strict=True)]
    with use_backend(backend):
        expected = _run(tensors, case)
        # a longer max_seqlen only starts more programs
        options = {**_options(case), "max_seqlen": 100, "blocks": _blocks(case)}
        o, lse = flash_attention_forward(*tensors[:3], out=buffers[0], **options)
        outs = dict(zip(("dq", "dk", "dv"), buffers[1:], strict=True))
        grads = flash_attention_backward(tensors[3], *tensors[:3], o, lse, **outs, **options)
    for buffer, returned, wanted in zip(
        buffers, (o, *grads), (expected[0], *expected[2:]), strict=True
    ):
        assert returned is buffer
        if ON_GPU:
            # what is compiled for other strides may add up in another order
            assert relative_error(buffer, wanted) <= torch.finfo(dtype).eps
        else:
            assert torch.equal(buffer, wanted)
    assert spare.isnan().all()
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_tokens_of_no_document(backend: str, lengths: tuple[int, ...]) -> None:
    case = Case(lengths, 4, 2, 64, padding=5)
    with use_backend(backend):
        got = _run(_draw(case, torch.float16), case)
        nothing = _run(_draw(case._replace(padding=0), torch.float16), case)
    assert [x.shape for x in got] == [(5, 4, 64), (4, 5), (5, 4, 64), (5, 2, 64), (5, 2, 64)]
    assert all((x == 0).all() for x in got)
    assert [x.shape for x in nothing] == [(0, 4, 64), (4, 0), (0, 4, 64), (0, 2, 64), (0, 2, 64)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_lowercase_function(backend: str) -> None:
    case = Case((21,), 4, 2, 64)
    q, k, v, do = (x.clone() for x in _draw(case, torch.float32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use_backend(backend):
        o = flash_attention(*leaves)
        o.backward(do.transpose(0, 2).contiguous().transpose(0, 2))
        # what autograd hands over from a sum has strides of 0
        split = flash_attention(*leaves, cu_seqlens=torch.tensor([0, 8, 21], device=DEVICE).int())
        (from_sum,) = torch.autograd.grad(split.sum(), v)
        scale = case.head_dim**-0.5
        expected = _run((q.detach(), k.detach(), v.detach(), do), case, scale=scale)
    assert torch.equal(o, expected[0])
    for leaf, wanted in zip(leaves, expected[2:], strict=True):
        torch.testing.assert_close(leaf.grad, wanted)
    # every row of weights adds up to 1, and each key head serves two query heads
    assert from_sum.sum(0).allclose(torch.full_like(from_sum[0], 42.0), rtol=1e-4)
    assert (split[8:] - o[8:]).abs().max() > 1e-2
    with use_backend(backend), pytest.raises(RuntimeError, match="once_differentiable"):
        squares = flash_attention(*leaves).square().sum()
        (slope,) = torch.autograd.grad(squares, leaves[0], create_graph=True)
        slope.sum().backward()


@pytest.mark.gpu
def test_backward_is_the_same_every_time() -> None:
    case = Case((700, 1, 323), 8, 2, 128)
    tensors = _draw(case, torch.bfloat16)
    first, second = _run(tensors, case), _run(tensors, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(6, 4, 64, dtype=torch.int32)}, "q"),
        ({"q": torch.zeros(6, 256)}, "q"),
        ({"k": torch.zeros(6, 3, 64)}, "k"),
        ({"k": torch.zeros(6, 2, 64, dtype=torch.float16)}, "k"),
        ({"v": torch.zeros(5, 2, 64)}, "v"),
        ({"v": torch.zeros(6, 64, 2).transpose(1, 2)}, "v"),
        ({"out": torch.zeros(6, 4, 60)}, "out"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens"),
        ({"scale": 0.0}, "scale"),
        ({"cap": 0.0}, "cap"),
        ({"cap": float("inf")}, "cap"),
    ],
)
def test_misfits_are_named(backend: str, change: dict, named: str) -> None:
    given = {
        "q": torch.zeros(6, 4, 64),
        "k": torch.zeros(6, 2, 64),
        "v": torch.zeros(6, 2, 64),
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "max_seqlen": 6,
        "scale": 0.1,
    }
    given |= change
    given = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in given.items()}
    with use_backend(backend), pytest.raises(UserError, match=rf"^{named} "):
        flash_attention_forward(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_compile_cases_name_every_argument(capability: tuple[int, int]) -> None:
    cases = [*module.compile_cases(capability), *backward_module.compile_cases(capability)]
    assert len({case.name for case in cases}) == len(cases) == 30
    for case in cases:
        assert case.uses_dot
        assert sorted([*case.signature, *case.constexprs]) == sorted(case.kernel.arg_names)
