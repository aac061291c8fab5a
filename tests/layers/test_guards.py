"""What must not go wrong without a word: stale weights, other batches, other modes of torch."""

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

from colab_qlora import UserError
from colab_qlora.layers import linear_group
from colab_qlora.layers.saved import SavedTensors, checked_plan
from colab_qlora.models.describe import describe
from colab_qlora.models.fuse import fuse, fused_layers, restore, state_of


def test_an_update_between_forward_and_backward_is_refused() -> None:
    model = tiny_model()
    fuse(model)
    first, second = model(**batch()).loss, model(**batch("right")).loss
    second.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with pytest.raises(UserError, match="changed between the forward and the backward pass"):
        first.backward()


def test_two_forward_passes_before_two_backward_passes() -> None:
    model, one, two = tiny_model(), batch(), batch("right")
    expected = {}
    for inputs in (one, two):
        for name, gradient in true_loss_and_gradients(model, inputs)[1].items():
            expected[name] = expected.get(name, 0) + gradient
    fuse(model)
    model.zero_grad()
    first, second = model(**one).loss, model(**two).loss
    with torch.no_grad():
        model(**one)
    first.backward()
    second.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert largest_error(found, expected) < 1e-9


def test_inference_mode_leaves_the_model_trainable() -> None:
    model, inputs = tiny_model(), batch()
    _, expected = true_loss_and_gradients(model, inputs)
    fuse(model)
    with torch.inference_mode():
        model(**inputs, use_cache=False)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, expected) < 1e-9


def test_packed_batches_keep_their_own_documents_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    model = tiny_model()
    fuse(model)
    ids = batch(rows=1, length=12)["input_ids"]
    starts = [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(9), 0, 1, 2]]
    inputs = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([row], device=DEVICE)}
        for row in starts
    ]
    expected: dict[str, Any] = {}
    for one in inputs:
        for name, gradient in loss_and_gradients(model, one)[1].items():
            expected[name] = expected.get(name, 0) + gradient
    for layer in fused_layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint
        own = type(layer).forward

        def wrapped(hidden: Any, layer: Any = layer, own: Any = own, **kwargs: Any) -> Any:
            def run(x: Any) -> Any:
                return own(layer, x, **kwargs)

            return checkpoint(run, hidden, use_reentrant=True)

        layer.forward = wrapped
    model.enable_input_require_grads()
    model.zero_grad()
    sum(model(**one, use_cache=False).loss for one in inputs).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert largest_error(found, expected) < 1e-9


def test_nobody_computes_a_gradient_of_the_embedding_for_fused_layers() -> None:
    model, inputs = tiny_model(), batch()
    causal, seen = model.get_base_model(), []
    fuse(model)
    want = gradients(model, inputs)
    model.enable_input_require_grads()
    handle = causal.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.requires_grad)
    )
    got = gradients(model, inputs)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    restore(model)
    gradients(model, inputs)
    handle.remove()
    assert seen == [False, True]  # torch's checkpointing wants it


@pytest.mark.parametrize("lora", [{"use_dora": True}, {}])
def test_modules_called_inside_run_under_the_callers_autocast(lora: dict[str, Any]) -> None:
    model = tiny_model(dtype=torch.bfloat16, **lora)
    if not lora:
        attention = model.get_base_model().model.layers[0].self_attn
        attention.q_proj.base_layer.weight.requires_grad_(True)
        attention.q_proj.float()
    inputs = batch()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        stock = model(**inputs).loss
    fuse(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(stock.detach()), rel=2e-2)


def test_adalora_is_called_as_it_is() -> None:
    from peft import AdaLoraConfig, get_peft_model

    model, inputs = tiny_model().get_base_model(), batch()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                setattr(module, name, child.base_layer)
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"])
    model = get_peft_model(model, config).double().train()
    stock = model(**inputs).loss
    fuse(model)
    loss = model(**inputs).loss
    assert float(loss.detach()) == pytest.approx(float(stock.detach()), rel=1e-6)
    loss.backward()
    assert "its adapter is no plain LoRA" in str(describe(model))


def test_a_loss_function_of_the_users_own_is_called() -> None:
    model, inputs = tiny_model(), batch()
    fuse(model)
    model.get_base_model().loss_function = lambda logits, **kwargs: logits.sum() * 0 + 42
    assert float(model(**inputs).loss.detach()) == 42


def test_replaced_parts_take_the_models_own_code() -> None:
    model, inputs = tiny_model(), batch()
    fuse(model)
    fused = float(model(**inputs).loss.detach())
    for layer in fused_layers(model):
        layer.mlp.act_fn = torch.nn.ReLU()
    replaced = float(model(**inputs).loss.detach())
    words = str(describe(model))
    restore(model)
    assert replaced == pytest.approx(float(model(**inputs).loss.detach()), rel=1e-6)
    assert replaced != fused
    assert "the activation was replaced" in words


def test_gradients_of_any_layout_come_through() -> None:
    model, inputs = tiny_model(), batch()
    del inputs["labels"], inputs["num_items_in_batch"]
    options = {"output_hidden_states": True, "use_cache": False}
    model(**inputs, **options).hidden_states[2].sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fuse(model)
    model(**inputs, **options).hidden_states[2].sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("plan", [{"gate"}, {"gate", "up"}, {"o", "xa_down", "up"}])
def test_a_store_may_keep_copies_elsewhere(monkeypatch: pytest.MonkeyPatch, plan: set[str]) -> None:
    class Elsewhere(SavedTensors):
        def put(self, name: str, tensor: torch.Tensor, *, is_scratch: bool = False) -> None:
            super().put(name, tensor.clone())

        def get(self, name: str) -> torch.Tensor | None:
            kept = super().get(name)
            return None if kept is None else kept.clone()

    monkeypatch.setattr("colab_qlora.models.fused_state.SavedTensors", Elsewhere)
    model, inputs = tiny_model(), batch()
    _, expected = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    state.plan, state.mlp_tokens = checked_plan(plan), 5
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, expected) < 1e-9


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi4_mini", "gemma2", "gemma3"])
def test_spare_columns_without_an_adapter_change_nothing(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As on a GPU, where borders are 64 wide; new memory is NaN, so that nothing unset is used."""
    monkeypatch.setitem(linear_group.PADDING, DEVICE, 64)

    def poisoned(stock: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = stock(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    model, inputs = tiny_model(family), batch("right")
    _, expected = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for state.mlp_tokens in (None, 5):
        for plan in (None, checked_plan({"q", "gate", "xa_down"}), checked_plan({"h1", "lse"})):
            state.plan = plan
            _, gradients = loss_and_gradients(model, inputs)
            assert largest_error(gradients, expected) < 1e-9


def test_a_parameter_that_two_linears_share_gets_both_gradients() -> None:
    model, inputs = tiny_model(), batch()
    attention = model.get_base_model().model.layers[1].self_attn
    attention.v_proj.lora_B["default"].weight = attention.k_proj.lora_B["default"].weight
    _, expected = true_loss_and_gradients(model, inputs)
    fuse(model)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, expected) < 1e-9


def test_evaluation_of_packed_documents_needs_no_mask() -> None:
    model = tiny_model()
    fuse(model)
    ids = batch(rows=1, length=12)["input_ids"]
    positions = torch.tensor([[*range(5), *range(7)]], device=DEVICE)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    trained = float(model(**inputs).loss.detach())
    model.eval()
    with torch.no_grad():
        evaluated = float(model(**inputs, skip_logits=True).loss)
    state = state_of(model)
    assert state is not None and state.last_shape is not None
    assert state.last_shape.features == {"packed"}
    assert evaluated == pytest.approx(trained, rel=1e-12)


def test_positions_beside_a_padding_mask_are_no_documents() -> None:
    model, inputs = tiny_model(), batch("right")
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    _, expected = true_loss_and_gradients(model, inputs)
    fuse(model)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, expected) < 1e-9
    state = state_of(model)
    assert state is not None and state.last_shape is not None
    assert not state.last_shape.features


def test_stretched_positions_may_be_used() -> None:
    model = tiny_model()
    config = model.get_base_model().model.config
    fuse(model)
    ids = torch.zeros((1, 65), dtype=torch.long, device=DEVICE)
    with pytest.raises(UserError, match="up to 64 tokens"):
        model(input_ids=ids, labels=ids)
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("rank", [3, 17], ids=lambda rank: f"rank {rank}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_result_depends_on_memory_that_nobody_wrote(dtype: torch.dtype, rank: int) -> None:
    """With new memory full of nan; some CPUs' bfloat16 products read beside a row's columns.

    With rank 3 all widths are multiples of 32, with 17 they end in the middle of 32.
    """
    model = tiny_model(dtype=dtype, r=rank)
    fuse(model)
    # 24 rows, so that every kind of product is a matrix product
    inputs = batch(length=12)
    expected, seen = loss_and_gradients(model, inputs), eval_loss(model, inputs)
    state_of(model).scratch.free()  # type: ignore[union-attr]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, found = loss_and_gradients(model, inputs)
        seen_again = eval_loss(model, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(torch.isfinite(loss)) and torch.equal(loss, expected[0])
    assert bool(torch.isfinite(seen)) and torch.equal(seen, seen_again)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[1][name]), name


def eval_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        loss = model(**inputs, use_cache=False).loss
    model.train()
    return loss
