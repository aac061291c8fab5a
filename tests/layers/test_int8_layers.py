"""Int8 linears, embeddings and heads in the fused path: the same weights dense, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int8_helpers import (
    bases,
    check_float64,
    check_half,
    check_mixed,
    decoded_twin,
    dense_twin,
    four_bit,
    linear4bit,
    set_base,
    with_int8,
    with_int8_head,
)
from layer_helpers import (
    DEVICE,
    batch,
    largest_error,
    loss_and_gradients,
    tiny_model,
    true_loss_and_gradients,
)

from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.layers.linear import read_linear
from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT
from colab_qlora.models.architectures import layer_linears
from colab_qlora.models.fuse import fuse, state_of
from colab_qlora.quantization.int8_modules import Int8Linear

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (not is_interpreting() and not torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)


@pytest.mark.parametrize("plan", [None, KEEP_ALL, KEEP_INPUT, frozenset({"h0", "gate"})])
@pytest.mark.parametrize("family", ["llama", "llama_biases", "qwen2", "qwen3"])
def test_all_linears_in_float64(family: str, plan: frozenset[str] | None) -> None:
    model = with_int8(tiny_model(family))
    state = fuse(model)
    state.plan = plan
    check_float64(model, batch("right"))
    assert not state.stock_passes
    linears = layer_linears(model.get_base_model().model.layers[0]).values()
    assert {part.kind for parts in linears for part in parts} == {"int8"}


@pytest.mark.parametrize("rows, length", [(1, 2), (1, 17), (3, 7)])
@pytest.mark.parametrize("names", [("k_proj",), ("gate_proj", "o_proj"), ("up_proj", "down_proj")])
def test_mixed_groups_with_and_without_adapters(
    names: tuple[str, ...], rows: int, length: int
) -> None:
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    model = with_int8(tiny_model(target_modules=targets), names)
    state = fuse(model)
    inputs = batch(rows=rows, length=length)
    inputs["labels"] = inputs["input_ids"]
    for state.max_weight_bytes in (None, 1):
        check_float64(model, inputs)


def test_an_empty_batch_passes() -> None:
    model = with_int8(with_int8_head(tiny_model()))
    fuse(model)
    ids = torch.zeros((0, 7), dtype=torch.long, device=DEVICE)
    loss, gradients = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert float(loss) == 0 and all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.3}, {"use_rslora": True, "bias": "all"}])
def test_what_lora_can_do_over_dense_it_can_over_int8(lora: dict[str, Any]) -> None:
    model = with_int8(tiny_model("llama_biases", **lora))
    twin = dense_twin(model, torch.float64)
    fuse(model)
    fuse(twin)
    torch.manual_seed(5)
    loss, gradients = loss_and_gradients(model, batch())
    expected_loss, expected = loss_and_gradients(twin, batch())
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    assert largest_error(gradients, expected) < 1e-12


def test_no_further_from_the_truth_than_the_dense_twin() -> None:
    model = with_int8(with_int8_head(tiny_model(dtype=torch.bfloat16, lora_alpha=6)))
    fuse(model)
    check_half(model, rows=2, length=17)


@pytest.mark.parametrize("adapters", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_bit_is_that_of_the_fused_dense_twin(
    dtype: torch.dtype, adapters: torch.dtype | None
) -> None:
    model = with_int8(with_int8_head(tiny_model(dtype=dtype)))
    twin = dense_twin(model, dtype)
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            if "lora_" in name and adapters is not None:
                parameter.data = parameter.data.to(adapters)
        fuse(one)
    results = [loss_and_gradients(one, batch("right")) for one in (model, twin)]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    # adapters of a quantised model are float32 by now, and a GPU does not round their sums before
    rounding = 0.0 if DEVICE == "cpu" or adapters is not None else torch.finfo(dtype).eps
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert float((gradient - other).norm()) <= rounding * float(other.norm()), name


@needs_triton
def test_the_kernel_gives_what_the_reference_gives() -> None:
    model = with_int8(tiny_model(dtype=torch.float32), ("k_proj", "o_proj", "gate_proj", "up_proj"))
    fuse(model)
    inputs = batch(rows=1, length=9)
    loss, gradients = loss_and_gradients(model, inputs)
    with use_backend("triton"):
        again, from_triton = loss_and_gradients(model, inputs)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert largest_error(from_triton, gradients) < 1e-5


@pytest.mark.parametrize("max_weight_bytes", [None, 1])
def test_nf4_int8_fp4_and_dense_in_one_group(max_weight_bytes: int | None) -> None:
    model = with_int8(tiny_model(dtype=torch.float32), ("k_proj", "up_proj"))
    for layer in model.get_base_model().model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj.base_layer = linear4bit(attention.q_proj.base_layer.weight, 64)
        mlp.gate_proj.base_layer = linear4bit(mlp.gate_proj.base_layer.weight, 64, "fp4")
    state = fuse(model)
    state.max_weight_bytes = max_weight_bytes
    parts = layer_linears(model.get_base_model().model.layers[0])
    assert [part.kind for part in parts["qkv"]] == ["nf4", "int8", "dense"]
    assert [part.kind for part in parts["gate_up"]] == ["fp4", "int8"]
    check_mixed(model, batch())
    for state.plan in (KEEP_INPUT, KEEP_ALL):
        check_mixed(model, batch())


@pytest.mark.parametrize("plan", [KEEP_ALL, KEEP_INPUT])
@pytest.mark.parametrize("name", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_a_base_that_is_swapped_between_passes_counts_at_once(
    name: str, plan: frozenset[str]
) -> None:
    model = tiny_model(dtype=torch.float32)
    weights = {}
    for parent, own, base in list(bases(model)):
        weights[id(parent), own] = base.weight.detach().clone()
        set_base(parent, own, linear4bit(base.weight, 64))
    fuse(model).plan = plan
    losses = [check_mixed(model, batch())]

    def swap(change: Any) -> None:
        for parent, own, base in list(bases(model, (name,))):
            change(parent, own, base, weights[id(parent), own])
        losses.append(check_mixed(model, batch()))

    def another_block_size(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        base.weight = four_bit(weight, 128)

    def int8(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        set_base(parent, own, Int8Linear.from_weight(weight))

    def other_scales(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        base.SCB = base.SCB * 1.5

    def other_codes(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        base.weight = torch.nn.Parameter(-base.weight, requires_grad=False)

    def dense(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = torch.nn.Parameter(weight, requires_grad=False)
        set_base(parent, own, made)

    def four_bits_again(parent: Any, own: str, base: Any, weight: torch.Tensor) -> None:
        set_base(parent, own, linear4bit(weight, 32))

    for change in (another_block_size, int8, other_scales, other_codes, dense, four_bits_again):
        swap(change)
    assert len(set(losses)) == len(losses), "every swap changes the loss"


@needs_triton
def test_swaps_count_at_once_with_kernels_too() -> None:
    model = tiny_model(dtype=torch.float32)
    weights = [base.weight.detach().clone() for _, _, base in bases(model, ("k_proj",))]
    fuse(model)
    for make in (lambda w: linear4bit(w, 64), Int8Linear.from_weight, lambda w: linear4bit(w, 32)):
        for (parent, own, _), weight in zip(list(bases(model, ("k_proj",))), weights, strict=True):
            set_base(parent, own, make(weight))
        with use_backend("triton"):
            loss, gradients = loss_and_gradients(model, batch(rows=1, length=6))
        truth, expected = true_loss_and_gradients(decoded_twin(model), batch(rows=1, length=6))
        assert float(loss) == pytest.approx(float(truth), rel=1e-6)
        assert largest_error(gradients, expected) < 1e-5


def test_moved_and_cast_tensors_are_read_where_they_are() -> None:
    model = with_int8(tiny_model(dtype=torch.float32))
    fuse(model)
    before, _ = loss_and_gradients(model, batch())
    model.to(torch.float64)
    check_float64(model, batch())
    model.to(torch.float32)
    again, _ = loss_and_gradients(model, batch())
    assert float(again) == float(before)


def test_a_subclass_is_called_as_it_is() -> None:
    class Watched(Int8Linear):
        pass

    model = with_int8(tiny_model())
    parent, name, base = next(iter(bases(model)))
    set_base(parent, name, Watched.from_codes(base.weight, base.SCB))
    fuse(model)
    assert read_linear(name, getattr(parent, name)).reason == "its base layer is a Watched"
    check_float64(model, batch())


def test_memory_of_the_scratch_is_given_back_and_the_launches_made_anew() -> None:
    model = with_int8(tiny_model())
    fuse(model)
    before, expected = loss_and_gradients(model, batch())
    state = state_of(model)
    assert state is not None
    state.scratch.free()
    again, gradients = loss_and_gradients(model, batch())
    assert torch.equal(before, again) and largest_error(gradients, expected) == 0
