"""Gemma 3 does not fit float16: what is computed in instead, and what is said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from colab_qlora.errors import UserError  # noqa: E402
from colab_qlora.models.half_range import dtype_with_room  # noqa: E402

GEMMA_3 = transformers.Gemma3TextConfig()


@pytest.mark.parametrize("asked", [None, "auto", "bfloat16", torch.bfloat16])
def test_a_gpu_without_bfloat16_computes_gemma_3_in_float32(asked: object) -> None:
    dtype, note = dtype_with_room(GEMMA_3, asked, torch.float16, "no bfloat16 here")
    assert dtype == torch.float32
    assert note is not None and "the hidden states of Gemma 3 do not fit float16" in note


@pytest.mark.parametrize("asked", ["float16", "fp16", torch.float16, "half"])
def test_float16_that_is_asked_for_is_refused(asked: object) -> None:
    with pytest.raises(UserError, match=r"Gemma 3 do not fit float16 .* Leave dtype at None"):
        dtype_with_room(GEMMA_3, asked, torch.float16, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_with_room_stay(dtype: torch.dtype) -> None:
    assert dtype_with_room(GEMMA_3, dtype, dtype, None) == (dtype, None)


@pytest.mark.parametrize("config", [transformers.LlamaConfig(), transformers.Gemma2Config()])
def test_other_models_keep_float16(config: object) -> None:
    assert dtype_with_room(config, "float16", torch.float16, "a") == (torch.float16, "a")


def test_such_a_stream_is_no_number_in_float16_with_the_models_own_code() -> None:
    """Two branches of 50,000 each, which their norms give, are more than float16 holds."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(4)
    norm.weight.data.fill_(49_999.0)
    branch = torch.ones(1, 4)
    for dtype, is_finite in ((torch.float16, False), (torch.bfloat16, True)):
        added = norm(branch.to(dtype)) + norm(branch.to(dtype))
        assert bool(added.isfinite().all()) is is_finite
