"""Decoded weights that stay give what newly decoded ones give, bit by bit, and notice changes."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))

from int8_helpers import linear4bit  # noqa: E402
from layer_helpers import DEVICE, batch, gradients, tiny_model  # noqa: E402
from peft import LoraConfig  # noqa: E402
from recording_helpers import Replay, differing, record  # noqa: E402

from colab_qlora.layers import decode, held_weights  # noqa: E402
from colab_qlora.layers.decode import GroupDecoder  # noqa: E402
from colab_qlora.layers.held_weights import HeldWeights  # noqa: E402
from colab_qlora.layers.linear import read_linear  # noqa: E402
from colab_qlora.layers.linear_group import LinearGroup  # noqa: E402
from colab_qlora.layers.scratch import Scratch  # noqa: E402
from colab_qlora.layers.standing import Signature  # noqa: E402
from colab_qlora.models.adapters import set_gradient_checkpointing  # noqa: E402
from colab_qlora.models.fuse import fuse, restore, state_of  # noqa: E402
from colab_qlora.models.smart import free_recordings, runtime_of  # noqa: E402

LAYERS = 3


def quantised_model(family: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A tiny model with NF4 linears under its adapters, planned smartly."""
    model = tiny_model(family, dtype, **lora)
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer"):
            model.set_submodule(name, linear4bit(module.weight, 64))
    fuse(model.train())
    set_gradient_checkpointing(model, "smart")
    return model


def holding(model: Any, holds: bool) -> Any:
    """The store of held weights, from now on used or not."""
    runtime = runtime_of(model)
    settings = replace(runtime.workload.settings, holds_weights=holds)
    runtime.workload = replace(runtime.workload, settings=settings)
    runtime.plans.clear()
    runtime.new_pass()
    runtime._most_held = None
    state = state_of(model)
    assert state is not None
    return state.scratch.held


def write_adapters(model: Any) -> None:
    """What an optimiser does."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def fillings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often whole groups were decoded, as a list that grows."""
    seen: list[int] = []
    fill = GroupDecoder._fill

    def counted(self: GroupDecoder, span: Any, *rest: Any) -> None:
        seen.append(len(span.parts))
        fill(self, span, *rest)

    monkeypatch.setattr(GroupDecoder, "_fill", counted)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_same_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    model = quantised_model(family, dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    found = {}
    for holds in (False, True):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        held = holding(model, holds)
        found[holds] = []
        for inputs in (batch(), batch(length=7), batch("right"), batch()):
            found[holds].append(gradients(model, inputs))
            write_adapters(model)
        assert bool(held.bytes_held()) is holds
    for with_held, without in zip(found[True], found[False], strict=True):
        assert not differing(with_held, without)


def test_weights_are_decoded_once(fillings: list[int]) -> None:
    model = quantised_model()
    held = holding(model, True)
    gradients(model, batch())
    assert len(fillings) == 4 * LAYERS
    fillings.clear()
    for _ in range(3):
        gradients(model, batch())
    assert not fillings
    step = runtime_of(model).current.step
    assert step.held_layers == LAYERS
    assert held.bytes_held() == step.held_bytes > 0
    holding(model, False)
    gradients(model, batch())
    assert len(fillings) == 8 * LAYERS
    assert not held.bytes_held()


def test_changed_weights_are_decoded_anew(fillings: list[int]) -> None:
    model = quantised_model()
    holding(model, True)
    gradients(model, batch())
    layer = model.get_base_model().model.layers[1]
    fillings.clear()
    # written in place, as by a merge
    with torch.no_grad():
        layer.self_attn.q_proj.base_layer.weight.bitwise_xor_(0x11)
    changed = gradients(model, batch())
    assert fillings == [3]
    # replaced, as by the schedule of a dynamic quantisation
    base = layer.mlp.down_proj.base_layer
    base.weight = linear4bit(torch.randn(base.out_features, base.in_features), 64).weight
    replaced = gradients(model, batch())
    assert fillings == [3, 1]
    holding(model, False)
    assert not differing(gradients(model, batch()), replaced)
    assert differing(changed, replaced)


def test_only_the_layers_that_are_wanted(fillings: list[int]) -> None:
    model = quantised_model()
    held = holding(model, True)
    expected = gradients(model, batch())
    whole = held.bytes_held()
    runtime = runtime_of(model)
    runtime._most_held = 1
    runtime.plans = {kind: plan.holding_at_most(1) for kind, plan in runtime.plans.items()}
    fillings.clear()
    assert not differing(gradients(model, batch()), expected)
    assert held.bytes_held() == whole // LAYERS
    assert len(fillings) == 8 * (LAYERS - 1)


def test_evaluation_and_other_passes_in_between() -> None:
    model = quantised_model()
    holding(model, False)
    expected = gradients(model, batch())
    held = holding(model, True)
    loss = model(**batch()).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch())
    other = gradients(model, batch(length=5))
    model.zero_grad()
    held.free()  # as an evaluation that is short of memory does
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing({"loss": loss.detach(), **grads}, expected)
    assert not differing(gradients(model, batch(length=5)), other)


def test_memory_is_given_back() -> None:
    model = quantised_model()
    held = holding(model, True)
    expected = gradients(model, batch())
    assert held.bytes_held()
    free_recordings(model)
    assert not held.bytes_held()
    assert not differing(gradients(model, batch()), expected)
    copied = copy.deepcopy(model)
    assert not state_of(copied).scratch.held.bytes_held()
    assert not differing(gradients(copied, batch()), expected)
    restore(model)
    assert not held.bytes_held()


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CUDA graphs on a GPU, and what does the same on a CPU."""
    if DEVICE == "cuda":
        return None
    recorder = Replay()
    for module in (decode, held_weights):
        monkeypatch.setattr(module, "is_recording", lambda like: recorder.is_recording)
    return recorder


def spoil_freed_memory(before: dict[Any, Any], held: HeldWeights) -> int:
    """Others write into what was let go, if nobody else has it; returns how many buffers went."""
    gone = [(key, group()) for key, group in before.items() if held.find(key) is not group()]
    for _, group in gone:
        if group is not None and sys.getrefcount(group) <= 3:
            group.buffer.fill_(float("nan"))
    return len(gone)


def test_recorded_layers_read_held_weights(fillings: list[int], replay: Any) -> None:
    model = quantised_model()
    holding(model, False)
    expected = gradients(model, batch())
    held = holding(model, True)
    graphs = record(model, recorder=replay)
    for _ in range(5):
        assert not differing(gradients(model, batch()), expected)
    assert len(graphs.shapes) == 1
    fillings.clear()
    write_adapters(model)
    after = gradients(model, batch())
    assert not fillings
    # a recording that only adds borders is of no use once weights have changed or are gone
    with torch.no_grad():
        weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
        weight.bitwise_xor_(0x11)
    changed = gradients(model, batch())
    assert differing(changed, after)
    assert fillings == [2]
    for _ in range(4):
        assert not differing(gradients(model, batch()), changed)
    assert len(graphs.shapes) == 1
    fillings.clear()
    held.free()
    assert not differing(gradients(model, batch()), changed)
    assert len(fillings) == 4 * LAYERS
    graphs.is_on = False
    holding(model, False)
    assert not differing(gradients(model, batch()), changed)


def test_a_pass_that_finds_changed_weights_is_not_recorded(
    fillings: list[int], replay: Any
) -> None:
    model = quantised_model()
    holding(model, True)
    graphs = record(model, recorder=replay)
    gradients(model, batch())
    gradients(model, batch())
    with torch.no_grad():
        weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
        weight.bitwise_xor_(0x11)
    fillings.clear()
    changed = gradients(model, batch())  # the third, which would record the decoding itself
    assert fillings == [2]
    for _ in range(3):
        assert not differing(gradients(model, batch()), changed)
    assert fillings == [2]
    assert len(graphs.shapes) == 1


@pytest.mark.parametrize("how", ["fewer layers", "another rank", "freed"])
def test_a_recorded_backward_pass_keeps_what_it_reads(how: str, replay: Any) -> None:
    model = quantised_model(r=3)
    model.add_adapter("wide", LoraConfig(r=40, target_modules="all-linear"))
    model.to(DEVICE)
    held = holding(model, True)
    graphs = record(model, recorder=replay)
    for _ in range(5):
        expected = gradients(model, batch())
    assert len(graphs.shapes) == 1
    loss = model(**batch()).loss
    before = {key: weakref.ref(group) for key, group in held._groups.items()}
    if how == "fewer layers":
        runtime = runtime_of(model)
        runtime._most_held = 1
        runtime.plans = {kind: plan.holding_at_most(1) for kind, plan in runtime.plans.items()}
        model(**batch(length=5))
    elif how == "another rank":
        model.set_adapter("wide")
        model(**batch(length=5))
        model.set_adapter("default")
    else:
        free_recordings(model)
    assert spoil_freed_memory(before, held) >= 2 * LAYERS
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing({"loss": loss.detach(), **grads}, expected)
    del loss, grads
    for _ in range(2):  # the second finds no pass under way
        assert not differing(gradients(model, batch()), expected)
    gc.collect()
    assert all(group() is None or group() is held.find(key) for key, group in before.items())


def test_a_linear_that_is_called_as_it_is_is_not_held() -> None:
    model = quantised_model()
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    held = holding(model, True)
    gradients(model, batch())
    assert held.find((0, "qkv")) is None
    assert held.find((0, "o")) is not None


def test_dense_weights_are_not_held() -> None:
    model = quantised_model()
    attention = model.get_base_model().model.layers[1].self_attn
    dense = torch.nn.Linear(48, 48, bias=False, device=DEVICE)
    attention.q_proj.base_layer = dense.requires_grad_(False)
    held = holding(model, True)
    gradients(model, batch())
    assert held.find((1, "qkv")) is None
    assert held.find((0, "qkv")) is not None
    before = gradients(model, batch())
    attention.q_proj.base_layer.weight.data += 0.5  # as PEFT merges
    assert differing(gradients(model, batch()), before)


def test_signatures() -> None:
    one, two = torch.zeros(3), torch.zeros(3)
    signed = Signature([one, two])
    assert signed.is_of([one, two])
    assert not signed.is_of([one])
    assert not signed.is_of([two, one])
    assert not signed.is_of([one, two.clone()])
    two.add_(1)
    assert not signed.is_of([one, two])
    moved = Signature([one])
    one.data = torch.zeros(3)
    assert not moved.is_of([one])
    with torch.inference_mode():
        without_counter = torch.zeros(2)
    assert Signature([without_counter, two]).is_of([without_counter, two])


def test_a_store_makes_way_for_other_shapes_and_dtypes() -> None:
    held, like = HeldWeights(), torch.empty(1, dtype=torch.float16, device=DEVICE)
    assert held.group((0, "o"), (2, 3), like, lambda b: b.t()) is None
    held.hold(1)
    first = held.group((0, "o"), (2, 3), like, lambda b: b.t())
    assert first is not None and first.views.shape == (3, 2) and first.signature is None
    assert held.group((0, "o"), (2, 3), like, lambda b: b.t()) is first
    second = held.group((0, "o"), (4, 3), like.float(), lambda b: b.t())
    assert second is not first and second is held.find((0, "o"))
    assert held.bytes_held() == 4 * 12
    assert held.group((1, "o"), (2, 3), like, lambda b: b) is None
    held.hold(0)
    assert held.find((0, "o")) is None
    scratch = Scratch()
    scratch.held.hold(4)
    assert pickle.loads(pickle.dumps(scratch)).held.layers == 0


def test_a_group_without_adapters_has_no_borders(fillings: list[int]) -> None:
    part = read_linear("o", linear4bit(torch.randn(8, 64), 64).to(DEVICE))
    scratch = Scratch()
    scratch.held.hold(1)
    group = LinearGroup([part], scratch, hold_key=(0, "o"))
    like = torch.empty(1, 64, device=DEVICE)
    (span,) = group._spans(None, like)
    first = group._decoder.decoded(span, like, 0, is_backward=False)
    scratch.forget_contents()
    again = group._decoder.decoded(span, like, 0, is_backward=True)
    assert fillings == [1] and first is again
    assert group.held_now() is not None
    without = LinearGroup([part], Scratch())
    plain = without._decoder.decoded(span, like, 0, is_backward=False)
    assert torch.equal(plain.alone, first.alone) and without.held_now() is None
