"""What Gemma 2 and 3 and Phi-3 and 4 have of their own, against their own code in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_helpers import (
    DEVICE,
    batch,
    gradients,
    largest_error,
    loss_and_gradients,
    tiny_model,
    true_loss_and_gradients,
)

from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.layers import mlp_half
from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT, checked_plan
from colab_qlora.models.architectures import why_not_fusable
from colab_qlora.models.describe import describe
from colab_qlora.models.fuse import fuse, fused_layers, restore
from colab_qlora.models.fused_norm import is_fused_norm
from colab_qlora.models.fused_state import FusedState

NEW = ("phi3", "phi4_mini", "gemma2", "gemma3")
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (is_interpreting() or DEVICE == "cuda"),
    reason="needs Triton with a GPU or interpreter",
)


def packed(*lengths: int) -> dict[str, Any]:
    inputs = batch(rows=1, length=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    inputs["labels"] = inputs["labels"].masked_fill(positions == 0, -100)
    return {**inputs, "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("family", NEW)
def test_packed_documents_never_see_each_other(family: str) -> None:
    # short and long for LongRoPE's limit of 8 positions and the windows of 5 and 6
    for lengths in ((3, 11, 1, 7), (4, 5, 2)):
        model, inputs = tiny_model(family), packed(*lengths)
        truth, expected = true_loss_and_gradients(model, inputs)
        state = fuse(model)
        for plan in (KEEP_ALL, KEEP_INPUT, checked_plan({"k", "o", "gate"})):
            state.plan = plan
            loss, found = loss_and_gradients(model, inputs)
            assert float(loss) == pytest.approx(float(truth), rel=1e-12)
            assert largest_error(found, expected) < 1e-9
        assert state.last_shape is not None and state.last_shape.packed
        assert not state.stock_passes


@needs_triton
@pytest.mark.parametrize("family", NEW[1:])
def test_the_kernels_compute_the_same(family: str) -> None:
    """No further from float64 than the model's own code in float32, and a rounding."""
    model, inputs = tiny_model(family), batch(rows=1, length=6)
    _, expected = true_loss_and_gradients(model, inputs)
    model.float()

    def error_now() -> float:
        _, found = loss_and_gradients(model, inputs)
        off = sum((found[n].double() - expected[n]).square().sum() for n in expected)
        return float((off / sum(g.square().sum() for g in expected.values())).sqrt())

    theirs = error_now()
    state = fuse(model)
    with use_backend("triton"):
        for plan in (KEEP_ALL, KEEP_INPUT):
            state.plan = plan
            assert error_now() <= theirs + 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_gradients_that_the_gated_unit_has_on_its_way(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As on a GPU with tensor cores, where one kernel sums the MLP's adapters' gradients too."""
    seen: list[int] = []

    def always(gate: torch.Tensor, *factors: torch.Tensor) -> bool:
        seen.append(len(factors))
        return True

    monkeypatch.setattr(mlp_half, "can_fuse_glu_lora", always)
    model, inputs = tiny_model(family), batch()
    _, expected = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    for state.mlp_tokens in (None, 5):
        _, found = loss_and_gradients(model, inputs)
        assert largest_error(found, expected) < 1e-9
    assert set(seen) == {3}


@pytest.mark.parametrize(("family", "kinds"), [("gemma2", 2), ("gemma3", 2), ("phi4_mini", 1)])
def test_layers_of_a_kind_share_a_shape(
    monkeypatch: pytest.MonkeyPatch, family: str, kinds: int
) -> None:
    model, inputs, made = tiny_model(family), batch(), []
    own = FusedState._new_shape

    def counted(self: FusedState, *args: Any) -> Any:
        made.append(own(self, *args))
        return made[-1]

    monkeypatch.setattr(FusedState, "_new_shape", counted)
    fuse(model)
    for count in (1, 2):
        loss_and_gradients(model, inputs)
        assert len(made) == count * kinds
    assert {shape.window for shape in made} == ({6} if family == "phi4_mini" else {5, None})
    assert {shape.cap for shape in made} == ({2.0} if family == "gemma2" else {None})


@pytest.mark.parametrize("family", NEW)
def test_checkpointing_gives_the_same_bits(family: str) -> None:
    model, inputs = tiny_model(family, torch.float32), batch("right")
    state = fuse(model)
    # the same cuts of the work, as a plan has them
    state.mlp_tokens = state.max_weight_bytes = 2**62
    want = gradients(model, inputs)
    for layer in fused_layers(model):
        layer.gradient_checkpointing = True
    got = gradients(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_cap_that_is_taken_away_is_noticed() -> None:
    model, inputs = tiny_model("gemma2"), batch()
    fuse(model)
    capped, _ = loss_and_gradients(model, inputs)
    for layer in fused_layers(model):
        layer.self_attn.attn_logit_softcapping = None
    free, found = loss_and_gradients(model, inputs)
    assert free != capped
    restore(model)
    truth, expected = true_loss_and_gradients(model, inputs)
    assert float(free) == pytest.approx(float(truth), rel=1e-12)
    assert largest_error(found, expected) < 1e-9


def test_an_eps_that_is_changed_is_noticed() -> None:
    model, inputs = tiny_model("gemma3"), batch()
    fuse(model)
    loss_and_gradients(model, inputs)
    for layer in fused_layers(model):
        layer.post_feedforward_layernorm.eps = 0.5
        layer.self_attn.k_norm.eps = 0.1
    _, found = loss_and_gradients(model, inputs)
    restore(model)
    assert largest_error(found, true_loss_and_gradients(model, inputs)[1]) < 1e-9


def test_dropout_of_what_a_half_adds_takes_the_models_own_code() -> None:
    model, inputs = tiny_model("phi3"), batch()
    state = fuse(model)
    for layer in fused_layers(model):
        layer.resid_mlp_dropout.p = 0.5
    loss_and_gradients(model, inputs)
    reason = "resid_mlp_dropout drops a share of what is added"
    assert list(state.stock_passes) == [reason]
    assert reason in str(describe(model))
    with torch.no_grad():
        model.eval()(**inputs, use_cache=False)
    assert state.stock_passes == {reason: 3}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_models_own_code_runs_for_one_layer(family: str) -> None:
    model, inputs = tiny_model(family, torch.float32), packed(3, 11, 7)
    fuse(model)
    want = gradients(model, inputs)
    fused_layers(model)[0].mlp.register_forward_hook(lambda *args: None)
    got = gradients(model, inputs)
    assert largest_error(got, want) < 1e-4
    assert "mlp has hooks" in str(describe(model))


def test_attention_that_looks_both_ways_is_left_alone() -> None:
    model = tiny_model("gemma3")
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.is_causal = False
    assert why_not_fusable(layer) == "its attention looks both ways"
    fuse(model)
    assert not fused_layers(model)
    # four norms of each layer, two of its heads, and the last one
    assert sum(is_fused_norm(module) for module in model.modules()) == 3 * 6 + 1


def test_a_class_of_ones_own_is_left_alone() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

    class Mine(Gemma3DecoderLayer):
        pass

    model = tiny_model("gemma3")
    layer = model.get_base_model().model.layers[0]
    layer.__class__ = Mine
    assert why_not_fusable(layer).startswith("Mine is none of LlamaDecoderLayer")


@pytest.mark.parametrize("family", NEW)
def test_names_stay_and_restore_gives_everything_back(family: str) -> None:
    model, inputs = tiny_model(family), batch()
    before = {name: type(module) for name, module in model.named_modules()}
    weights = list(model.state_dict())
    stock = float(model(**inputs).loss.detach())
    fuse(model)
    assert len(fused_layers(model)) == 3
    assert list(model.state_dict()) == weights
    restore(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert float(model(**inputs).loss.detach()) == stock
