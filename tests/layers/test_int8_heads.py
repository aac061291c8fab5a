"""Int8 embeddings and heads, tied and not: loss, generation, copies, description."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from int8_helpers import check_float64, check_half, dense_twin, with_int8, with_int8_head
from layer_helpers import (
    batch,
    largest_error,
    loss_and_gradients,
    tiny_model,
    true_loss_and_gradients,
)

from colab_qlora.models.describe import describe
from colab_qlora.models.fuse import fuse, restore
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_a_fused_model(name: str) -> None:
    model = with_int8(with_int8_head(tiny_model(), is_tied=True))
    fuse(model)
    loss, gradients = loss_and_gradients(model, batch())
    made = COPIES[name](model)
    causal = made.get_base_model()
    assert causal.lm_head.weight is causal.model.embed_tokens.weight
    assert causal.lm_head.SCB is causal.model.embed_tokens.SCB
    again, found = loss_and_gradients(made, batch())
    assert torch.equal(loss, again) and largest_error(found, gradients) == 0


def test_state_dict_of_a_fused_model() -> None:
    model, other = (with_int8(with_int8_head(tiny_model())) for _ in range(2))
    for module in other.modules():
        if isinstance(module, Int8Linear | Int8Embedding):
            module.weight.zero_()
    fuse(model)
    fuse(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss_and_gradients(other, batch())[0], loss_and_gradients(model, batch())[0])


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_models_own_code_runs_with_int8(is_fused: bool) -> None:
    model = with_int8(with_int8_head(tiny_model(), bias=True))
    if is_fused:
        fuse(model)
        restore(model)
    truth, expected = true_loss_and_gradients(dense_twin(model, torch.float64), batch())
    loss, gradients = true_loss_and_gradients(model, batch())
    assert float(loss) == pytest.approx(float(truth), rel=1e-12)
    assert largest_error(gradients, expected) < 1e-12


@pytest.mark.parametrize("logits_budget_bytes", [None, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_int8_head_has_its_loss_without_logits(
    is_tied: bool, bias: bool, logits_budget_bytes: int | None
) -> None:
    model = with_int8_head(tiny_model(), is_tied=is_tied, bias=bias)
    state = fuse(model)
    state.logits_budget_bytes = logits_budget_bytes
    assert model(**batch()).logits is None
    check_float64(model, batch("left"))
    assert not state.stock_passes
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda *_: None)
    assert model(**batch()).logits is not None


@pytest.mark.parametrize("logits_budget_bytes", [None, 1])
def test_an_int8_head_in_half_precision(logits_budget_bytes: int | None) -> None:
    model = with_int8_head(tiny_model(dtype=torch.bfloat16, lora_alpha=6), is_tied=True)
    fuse(model).logits_budget_bytes = logits_budget_bytes
    check_half(model, rows=3, length=21)


def test_a_head_computes_in_its_compute_dtype() -> None:
    model = with_int8_head(tiny_model(dtype=torch.bfloat16))
    fuse(model)
    head = model.get_base_model().lm_head
    coarse = float(model(**batch()).loss.detach())
    head.compute_dtype = torch.float32
    fine = float(model(**batch()).loss.detach())
    assert coarse != fine and coarse == pytest.approx(fine, rel=2**-7)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_generation_is_that_of_the_dense_twin(is_tied: bool, is_fused: bool) -> None:
    model = with_int8(with_int8_head(tiny_model(dtype=torch.float32), is_tied=is_tied))
    twin = dense_twin(model, torch.float32)
    if is_fused:
        fuse(model)
    ids = batch(rows=2, length=5)["input_ids"]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    found, expected = (
        one.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for one in (model, twin)
    )
    assert torch.equal(found.sequences, expected.sequences) and found.sequences.shape == (2, 17)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        # a GPU picks its GEMM by where a weight lies
        most = 0.0 if ours.device.type == "cpu" else 2**-20 * float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) <= most


def test_evaluation_and_the_models_dtype() -> None:
    model = with_int8(with_int8_head(tiny_model(dtype=torch.bfloat16), is_tied=True))
    twin = dense_twin(model, torch.bfloat16)
    fuse(model)
    assert model.dtype == twin.dtype == torch.bfloat16
    with torch.no_grad():
        ours, theirs = (one.eval()(**batch()).logits for one in (model, twin))
    assert ours.dtype == theirs.dtype
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < 2**-6  # some roundings of bfloat16 in three layers


def test_the_description_names_them() -> None:
    model = with_int8(with_int8_head(tiny_model()), ("k_proj", "down_proj"))
    before = str(describe(model))
    fuse(model)
    words = str(describe(model))
    assert "int8 weight, decoded for each call" in before
    rows = [line.split() for line in words.splitlines()]
    assert ["model.embed_tokens", "1", "Int8Embedding"] in [row[:3] for row in rows]
    assert ["lm_head", "1", "Int8Linear"] in [row[:3] for row in rows]
    assert "in the fused loss" in words
    int8 = [row for row in rows if "int8" in row and "LoRA" in row]
    assert {row[0] for row in int8} == {
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.mlp.down_proj",
    }
    assert all(row[1] == "3" for row in int8)
