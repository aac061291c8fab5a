"""Whole layers kept or recomputed where a model runs its own code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from colab_qlora.models import stock_checkpointing
from colab_qlora.models.adapters import set_gradient_checkpointing
from colab_qlora.models.fuse import fuse
from colab_qlora.models.smart import planner_of, runtime_of
from colab_qlora.models.stock_checkpointing import StockPlanner, checkpointed_layers
from colab_qlora.training.micro_batch import with_less_memory

LAYERS = 5
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {
    "granite": transformers.GraniteConfig(**SIZES),
    "gemma": transformers.GemmaConfig(**SIZES, head_dim=12),
    "olmo2": transformers.Olmo2Config(**SIZES),
}


def stock_model(family: str, *, is_fused: bool = True, **lora: Any) -> Any:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    options = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | lora
    model = get_peft_model(model, LoraConfig(**options)).train()
    if is_fused:
        fuse(model)
    return model


def batch(length: int = 11) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 101, (2, length))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def planner(model: Any) -> StockPlanner:
    found = planner_of(model)
    assert isinstance(found, StockPlanner)
    assert runtime_of(model) is None
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("is_fused", [True, False])
def test_gradients_are_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, family: str, dropout: float, is_fused: bool
) -> None:
    model, inputs = stock_model(family, lora_dropout=dropout, is_fused=is_fused), batch()
    set_gradient_checkpointing(model, False)
    want = gradients(model, inputs)
    set_gradient_checkpointing(model, "smart")
    assert same(gradients(model, inputs), want)
    assert planner(model).kept == {(2, 64): LAYERS - 1}  # beside the first, which was measured
    for count in range(LAYERS + 1):
        planner(model).kept[2, 64] = count
        assert same(gradients(model, inputs), want)
        flags = [layer.gradient_checkpointing for layer in planner(model).layers]
        assert flags == [True] * (LAYERS - count) + [False] * count
    planner(model).offloads = True
    planner(model).kept[2, 64] = 2
    assert same(gradients(model, inputs), want)


def test_what_is_offloaded_is_the_layers_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    stock = torch.autograd.graph.save_on_cpu

    class Recorded(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            pack = self.pack_hook

            def recorded(tensor: torch.Tensor) -> Any:
                moved.append(tuple(tensor.shape))
                return pack(tensor)

            self.pack_hook = recorded

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    model = stock_model("granite")
    set_gradient_checkpointing(model, "smart")
    planner(model).offloads = True
    planner(model).kept[2, 64] = 1
    gradients(model, batch())
    hidden = [shape for shape in moved if shape == (2, 11, 48)]
    assert len(hidden) == LAYERS - 1
    # beside it masks and rotation tables, which the layers share
    assert all(shape == (2, 11, 48) or len(shape) < 2 or 11 in shape for shape in moved)


def test_the_budget_decides_how_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = stock_model("granite"), batch(64)
    set_gradient_checkpointing(model, False)
    want = gradients(model, inputs)
    counts = []
    monkeypatch.setattr(stock_checkpointing, "_LOSS_BYTES", 0)
    for mib in (0.01, 2, 3, 4, 6, 100):
        set_gradient_checkpointing(model, "smart", memory_budget_gib=mib / 1024)
        assert same(gradients(model, inputs), want)
        counts.append(planner(model).kept[2, 64])
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == LAYERS - 1
    assert len(set(counts)) >= 3


def test_a_plan_for_each_length_and_none_for_evaluation() -> None:
    model = stock_model("gemma")
    set_gradient_checkpointing(model, "smart")
    for length in (11, 64, 65, 100):
        gradients(model, batch(length))
    with torch.no_grad():
        model.eval()(**batch(200))
        model.train()
        model(**batch(200))
    assert set(planner(model).kept) == {(2, 64), (2, 128)}
    with model.disable_adapter(), torch.no_grad():
        model(**batch())


def test_it_is_undone() -> None:
    model, inputs = stock_model("granite"), batch()
    set_gradient_checkpointing(model, True)
    want = gradients(model, inputs)
    before = [layer._gradient_checkpointing_func for layer in checkpointed_layers(model)]
    set_gradient_checkpointing(model, "smart")
    planner(model).offloads = True
    gradients(model, inputs)
    set_gradient_checkpointing(model, True)
    assert planner_of(model) is None
    assert all(layer.gradient_checkpointing for layer in checkpointed_layers(model))
    after = [layer._gradient_checkpointing_func for layer in checkpointed_layers(model)]
    assert [f.func for f in after] == [f.func for f in before]
    assert not any(m._forward_pre_hooks for m in checkpointed_layers(model))
    assert same(gradients(model, inputs), want)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_plans_for_itself(how: Any) -> None:
    model, inputs = stock_model("granite"), batch()
    set_gradient_checkpointing(model, "smart")
    want = gradients(model, inputs)
    twin = how(model)
    assert planner(twin) is not planner(model)
    assert planner(twin).layers[0] is checkpointed_layers(twin)[0]
    planner(twin).kept.clear()
    assert same(gradients(twin, inputs), want)
    assert planner(twin).kept


def test_out_of_memory_is_answered_with_less_and_then_with_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs, lines = stock_model("granite"), batch(), []
    set_gradient_checkpointing(model, "smart")
    want = gradients(model, inputs)
    model.zero_grad()
    left = [2]
    layer = checkpointed_layers(model)[3]

    def fails(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    handle = layer.mlp.register_forward_pre_hook(fails)

    def step() -> None:
        torch.manual_seed(3)
        model(**inputs).loss.backward()

    planner(model).kept[2, 64] = 0
    with_less_memory(model, step, lines.append)
    handle.remove()
    assert "host memory" in lines[0]
    assert "planning again" in lines[1]
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert same(got, {n: g for n, g in want.items() if n != "loss"})
    assert planner(model).is_at_floor
