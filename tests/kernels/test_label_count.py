"""Labels shifted and counted: the very numbers of a loop in Python."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE

from colab_qlora.kernels import label_count as module
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.label_count import label_count

IGNORE = -100


def expected_of(labels, ignore_index, shift):
    flat = []
    for row in labels.reshape(-1, labels.shape[-1]).tolist():
        flat += [*row[1:], ignore_index] if shift else row
    known = [label for label in flat if label != ignore_index]
    limits = torch.iinfo(torch.int64)
    low, high = (min(known), max(known)) if known else (limits.max, limits.min)
    return flat, [len(flat) - len(known), low, high]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 511), (1, 1025), (2, 3, 7), (4,)])
def test_every_number(backend, shape, shift):
    torch.manual_seed(sum(shape))
    labels = torch.randint(0, 2**40, shape, device=DEVICE)
    labels[torch.rand(shape, device=DEVICE) < 0.3] = IGNORE
    flat, numbers = label_count(labels, IGNORE, shift)
    assert flat.dtype == numbers.dtype == torch.int64
    assert (flat.tolist(), numbers.tolist()) == expected_of(labels, IGNORE, shift)


@pytest.mark.parametrize("ignore_index", [IGNORE, 0, 7])
def test_no_label_and_labels_of_any_sign(backend, ignore_index):
    nothing = torch.full((2, 9), ignore_index, device=DEVICE)
    assert label_count(nothing, ignore_index, True)[1].tolist()[0] == 18
    labels = torch.tensor([[3, -5, 7, 0, 2**62, -(2**62)]], device=DEVICE)
    flat, numbers = label_count(labels, ignore_index, False)
    assert (flat.tolist(), numbers.tolist()) == expected_of(labels, ignore_index, False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_other_integers_and_strides(backend, dtype):
    labels = torch.arange(24, device=DEVICE).reshape(6, 4).t()
    expected = expected_of(labels, IGNORE, True)
    for given in (labels, labels.contiguous().to(dtype)):
        flat, numbers = label_count(given, IGNORE, True)
        assert (flat.tolist(), numbers.tolist()) == expected


def test_every_case_is_of_this_kernel():
    assert {case.kernel for case in module.compile_cases()} == {module._count_kernel}
