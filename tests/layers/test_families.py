"""Every family's fused layers against its own code in float64: loss and all gradients."""

from __future__ import annotations

import random

import pytest
import torch
from layer_helpers import (
    DEVICE,
    FAMILIES,
    batch,
    largest_error,
    loss_and_gradients,
    tiny_model,
    true_loss_and_gradients,
)

from colab_qlora.layers.saved import ALL_NAMES, KEEP_INPUT, checked_plan
from colab_qlora.models.fuse import fuse, fused_layers, restore


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(family: str, padding: str) -> None:
    model, inputs = tiny_model(family), batch(padding)
    if (family, padding) == ("gemma2", "left"):
        # a padding place sees nothing; transformers' own eager attention has it see everything
        inputs["labels"][-1, inputs["labels"].shape[1] // 2] = -100
    truth, true_gradients = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    assert len(fused_layers(model)) == 3
    for plan in (None, KEEP_INPUT):
        state.plan = plan
        loss, gradients = loss_and_gradients(model, inputs)
        assert abs(float((loss - truth) / truth)) < 1e-12
        assert largest_error(gradients, true_gradients) < 1e-9
    assert not state.stock_passes


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi4_mini", "gemma2", "gemma3"])
def test_any_plan_gives_the_same_gradients(family: str, seed: int) -> None:
    pick = random.Random(seed)
    model, inputs = tiny_model(family), batch("right")
    _, truth = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    state.plan = checked_plan(pick.sample(ALL_NAMES, pick.randint(1, len(ALL_NAMES) - 1)))
    state.mlp_tokens = pick.choice([None, 1, 5, 22, 100])
    state.max_weight_bytes = pick.choice([None, 1, 40_000])
    state.holds_gate_up = pick.choice([True, False])
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, truth) < 1e-9, sorted(state.plan)


@pytest.mark.parametrize("family", ["llama", "phi4_mini", "gemma2", "gemma3"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (2, 33)])
def test_odd_batches(shape: tuple[int, int], family: str) -> None:
    model, inputs = tiny_model(family), batch(rows=shape[0], length=shape[1])
    inputs["labels"] = inputs["input_ids"].clone()
    if shape[1] == 1:
        inputs["labels"][:] = -100  # nothing follows the only token
    fuse(model)
    loss, gradients = loss_and_gradients(model, inputs)
    restore(model)
    if shape[1] == 1:
        assert loss == 0
        assert all(not g.any() for g in gradients.values())
        return
    truth, expected = true_loss_and_gradients(model, inputs)
    assert float(loss) == pytest.approx(float(truth), rel=1e-12)
    assert largest_error(gradients, expected) < 1e-9


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_an_empty_batch_passes(family: str) -> None:
    model = tiny_model(family)
    fuse(model)
    ids = torch.zeros((0, 5), dtype=torch.long, device=DEVICE)
    loss, gradients = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert loss == 0
    assert all(not g.any() for g in gradients.values())


def test_all_labels_ignored_teaches_nothing() -> None:
    model, inputs = tiny_model(), batch()
    fuse(model)
    inputs["labels"][:] = -100
    loss, gradients = loss_and_gradients(model, inputs)
    assert loss == 0
    assert gradients
    assert all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama_biases", "phi3", "gemma2", "gemma3"])
def test_norms_and_biases_that_train_get_their_gradients(family: str) -> None:
    model, inputs = tiny_model(family), batch()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.requires_grad_(True)
    _, truth = true_loss_and_gradients(model, inputs)
    assert any("norm" in name for name in truth)
    fuse(model)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, truth) < 1e-9


def test_nothing_below_the_first_adapter_is_differentiated() -> None:
    some = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]}
    model, inputs = tiny_model(layers_pattern="layers", **some), batch()
    _, truth = true_loss_and_gradients(model, inputs)
    fuse(model)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, truth) < 1e-9
