"""Whatever changes between two passes counts in the next one, though nothing is fused anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_helpers import batch, largest_error, loss_and_gradients, tiny_model
from peft import LoHaConfig, LoraConfig, get_peft_model

from colab_qlora.layers.saved import KEEP_INPUT
from colab_qlora.models import fused_state
from colab_qlora.models.fuse import fuse, restore, state_of


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[1]


def doubled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def negated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.linear(x, self.weight, self.bias)


def freeze_one(model: Any) -> None:
    layer_of(model).self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def train_a_norm(model: Any) -> None:
    layer_of(model).post_attention_layernorm.weight.requires_grad_(True)


def scale(model: Any) -> None:
    layer_of(model).mlp.down_proj.scaling["default"] = 0.3


def hook_a_linear(model: Any) -> None:
    layer_of(model).mlp.up_proj.register_forward_hook(doubled)


def hook_an_adapter(model: Any) -> None:
    layer_of(model).self_attn.v_proj.lora_B["default"].register_forward_hook(doubled)


def hook_the_mlp(model: Any) -> None:
    layer_of(model).mlp.register_forward_hook(doubled)


def replace_a_forward(model: Any) -> None:
    base = layer_of(model).self_attn.o_proj.base_layer
    base.forward = negated.__get__(base)


def another_eps(model: Any) -> None:
    layer_of(model).input_layernorm.variance_epsilon = 0.5


def another_adapter(model: Any) -> None:
    model.set_adapter("second")


def both_adapters(model: Any) -> None:
    model.base_model.set_adapter(["default", "second"])


def another_weight(model: Any) -> None:
    linear = layer_of(model).self_attn.k_proj.base_layer
    linear.weight = torch.nn.Parameter(-linear.weight.detach(), requires_grad=False)


def train_a_weight(model: Any) -> None:
    layer_of(model).mlp.gate_proj.base_layer.weight.requires_grad_(True)


CHANGES = [
    freeze_one,
    train_a_norm,
    scale,
    hook_a_linear,
    hook_an_adapter,
    hook_the_mlp,
    replace_a_forward,
    another_eps,
    another_adapter,
    both_adapters,
    another_weight,
    train_a_weight,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_counts_at_once(change: Any) -> None:
    model = tiny_model()
    options = {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"}
    model.add_adapter("second", LoraConfig(**options, init_lora_weights=False))
    model.to(torch.float64)
    fuse(model)
    before, _ = loss_and_gradients(model, batch())
    change(model)
    fresh = copy.deepcopy(model)
    restore(fresh)
    expected, gradients = loss_and_gradients(fuse_again(fresh), batch())
    loss, found = loss_and_gradients(model, batch())
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert largest_error(found, gradients) < 1e-9
    silent = (freeze_one, train_a_norm, train_a_weight)
    assert (abs(float(loss - before)) < 1e-12) == (change in silent)


def test_merged_and_disabled_adapters_count_at_once() -> None:
    model = tiny_model()
    fuse(model)
    before = float(model(**batch()).loss)
    with model.disable_adapter():
        without = float(model(**batch()).loss)
    model.merge_adapter()
    merged = float(model(**batch()).loss)
    assert merged == pytest.approx(before, rel=1e-12) and abs(without - before) > 1e-6
    restore(model)
    assert float(model(**batch()).loss) == pytest.approx(before, rel=1e-6)


def fuse_again(model: Any) -> Any:
    fuse(model)
    return model


def test_dropout_goes_with_evaluation_mode() -> None:
    model = tiny_model(lora_dropout=0.5)
    fuse(model)
    inputs = batch()  # which sets the seed
    losses = {float(loss_and_gradients(model, inputs)[0]) for _ in range(3)}
    assert len(losses) == 3
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert len({float(loss_and_gradients(model, inputs)[0]) for _ in range(3)}) == 1


def test_parameters_of_other_adapters_that_begin_to_learn_get_their_gradients() -> None:
    base = tiny_model().unload()
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_weights": False}
    model = get_peft_model(base, LoHaConfig(**options)).to(torch.float64).train()
    model.add_adapter("second", LoHaConfig(**options))
    model.to(torch.float64)
    fuse(model)
    loss_and_gradients(model, batch())
    model.set_adapter("second")
    _, found = loss_and_gradients(model, batch())
    restore(model)
    _, expected = loss_and_gradients(model, batch())
    assert found.keys() == expected.keys() and any("second" in name for name in found)
    assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_halves_of_a_long_batch(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    model = tiny_model(lora_dropout=dropout)
    fuse(model)
    state = state_of(model)
    assert state is not None
    expected, gradients = loss_and_gradients(model, batch())  # which sets the seed
    state.plan = KEEP_INPUT
    monkeypatch.setattr(fused_state, "LEAST_CHUNK_TOKENS", 3)
    loss, found = loss_and_gradients(model, batch())
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert largest_error(found, gradients) < 1e-9
