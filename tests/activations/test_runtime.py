"""Plans by bucket of length, stores by plan, budgets that shrink, on tiny models."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import DEVICE, FAMILIES, batch, gradients, tiny_model  # noqa: E402
from machines import GIB, SMALL  # noqa: E402

from colab_qlora.activations.costs import stored_names  # noqa: E402
from colab_qlora.activations.host_pool import HostMemoryRefused, HostPool  # noqa: E402
from colab_qlora.activations.memory_plan import Machine  # noqa: E402
from colab_qlora.activations.model_shape import shape_of  # noqa: E402
from colab_qlora.activations.phase_costs import peak_bytes  # noqa: E402
from colab_qlora.activations.plan import BudgetTooSmall  # noqa: E402
from colab_qlora.activations.runtime import (  # noqa: E402
    ActivationRuntime,
    BatchKind,
    bucket_length,
)
from colab_qlora.activations.static_costs import static_bytes  # noqa: E402
from colab_qlora.activations.this_machine import CPU_PROFILE, this_machine  # noqa: E402
from colab_qlora.errors import UserError  # noqa: E402
from colab_qlora.layers.saved import KEEP_ALL  # noqa: E402
from colab_qlora.models.adapters import set_gradient_checkpointing  # noqa: E402
from colab_qlora.models.fuse import fuse, restore, state_of  # noqa: E402
from colab_qlora.models.settings import ModelSettings  # noqa: E402
from colab_qlora.models.smart import (  # noqa: E402
    plan_batches,
    resident_bytes,
    runtime_of,
    workload_of,
)

KIB = 1024


def smart_model(family: str = "llama", dtype: torch.dtype = torch.float32, **budgets: Any) -> Any:
    model = tiny_model(family, dtype)
    # a GPU would wait for the host here, where recorded layers beat what is tested
    fuse(model).graphs.is_on = False
    set_gradient_checkpointing(model, "smart", **budgets)
    return model


def floor_gib(model: Any, inputs: dict[str, Any]) -> float:
    set_gradient_checkpointing(model, "smart", memory_budget_gib=1e-9)
    with pytest.raises(BudgetTooSmall) as caught:
        model(**inputs)
    return caught.value.floor_bytes / GIB


@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513, 1000, 2048, 2049, 8192, 10_000])
def test_buckets_are_at_most_an_eighth_above(length: int) -> None:
    bucket = bucket_length(length)
    assert bucket >= length
    assert bucket <= max(64, length + max(64, length / 8))
    assert bucket_length(bucket) == bucket


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *itertools.product(
            ("llama", "qwen3", "mistral_window", "smollm3"), (torch.float32, torch.bfloat16)
        ),
        ("phi4_mini", torch.float32),
        ("gemma2", torch.bfloat16),
        ("gemma3", torch.float32),
    ],
)
def test_budgets_change_plans_and_no_gradient(family: str, dtype: torch.dtype) -> None:
    # on a GPU the floor moves with what else is allocated: there a step has to be larger than that
    rows = 2 if DEVICE == "cpu" else 512
    model, inputs = smart_model(family, dtype), batch(length=64, rows=rows)
    want = gradients(model, inputs)
    step = runtime_of(model).current.step
    assert all(stored == stored_names(step.batch.shape, KEEP_ALL) for stored in step.stored)
    floor = floor_gib(model, inputs)
    # once more: what an earlier test has left on a GPU is gone by now
    set_gradient_checkpointing(model, "smart")
    gradients(model, inputs)
    whole = runtime_of(model).current.step.peak_bytes / GIB
    assert floor < whole
    plans = set()
    slack = 1e-9 if DEVICE == "cpu" else 0.1 * (whole - floor)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        budget = floor + share * max(0.0, whole - floor) + slack
        set_gradient_checkpointing(model, "smart", memory_budget_gib=budget)
        got = gradients(model, inputs)
        found = runtime_of(model).current.step
        assert found.peak_bytes <= budget * GIB + 1
        plans.add((found.stored, found.offload))
        settings = found.batch.settings
        if settings.mlp_tokens >= 64 * rows and settings.max_weight_bytes > 2**40:
            assert all(torch.equal(got[name], want[name]) for name in want)
        else:  # sums in another order
            rounding = 0.05 if dtype == torch.bfloat16 else 1e-5
            error = sum((got[n].double() - want[n].double()).square().sum() for n in want)
            size = sum(want[n].double().square().sum() for n in want)
            assert error.sqrt() < rounding * size.sqrt()
    assert len(plans) >= 3


def test_a_plan_for_each_bucket_and_kind() -> None:
    model = smart_model()
    model.get_base_model().model.config.max_position_embeddings = 256
    runtime = runtime_of(model)
    for length in (11, 40, 64, 65, 100):
        gradients(model, batch(length=length))
    assert {kind.seq_length for kind in runtime.plans} == {64, 128}
    assert not any(kind.has_gradients for kind in runtime.plans)
    model(**batch()).loss.backward()  # a second micro-batch, onto what the last one left
    assert BatchKind(2, 64, None, True) in runtime.plans
    made = dict(runtime.plans)
    gradients(model, batch())
    assert runtime.plans == made
    with torch.no_grad():
        model(**batch(length=90, rows=3))
    assert runtime.plans == made
    model.zero_grad()
    packed = torch.cat([torch.arange(5), torch.arange(6), torch.arange(11)])[None].to(DEVICE)
    ids = torch.randint(3, 101, (1, 22), device=DEVICE)
    model(input_ids=ids, labels=ids, position_ids=packed).loss.backward()
    assert {kind.document_tokens for kind in runtime.plans} == {None, 8}


def test_a_budget_below_the_floor_is_named_before_anything_runs() -> None:
    model = smart_model(memory_budget_gib=1e-6)
    with pytest.raises(
        BudgetTooSmall, match="no plan fits in the GPU memory: got a budget of 0.00"
    ):
        model(**batch())


def test_what_is_free_may_be_too_little(capsys: pytest.CaptureFixture[str]) -> None:
    model = smart_model()
    runtime = runtime_of(model)
    runtime._machine = lambda workload: Machine(SMALL, 1000, 0)
    want = gradients(model, batch())
    assert "predicted to need" in capsys.readouterr().out
    assert runtime.is_at_floor
    assert runtime.current.step is not None
    set_gradient_checkpointing(model, False)
    got = gradients(model, batch())
    assert all(torch.allclose(got[n], want[n], rtol=1e-3, atol=1e-5) for n in want)


def test_less_budget_makes_new_plans() -> None:
    model = smart_model()
    gradients(model, batch(length=64))
    runtime = runtime_of(model)
    before = runtime.current
    assert "90%" in runtime.lower_budget()
    assert not runtime.plans
    gradients(model, batch(length=64))
    assert runtime.current.machine.budget_bytes == pytest.approx(
        0.9 * before.machine.budget_bytes, rel=0.05
    )


def test_the_modes_switch() -> None:
    model, inputs = smart_model(), batch()
    want = gradients(model, inputs)
    for mode in (True, False, "unsloth"):
        set_gradient_checkpointing(model, mode)
        assert (runtime_of(model) is not None) == (mode == "unsloth")
        got = gradients(model, inputs)
        assert all(torch.allclose(got[n], want[n], rtol=1e-3, atol=1e-5) for n in want)
    with pytest.raises(ValueError, match="a memory budget needs a planner"):
        set_gradient_checkpointing(model, True, memory_budget_gib=3)
    restore(model)
    assert state_of(model) is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_with_plans_can_be_copied(how: Any) -> None:
    model, inputs = smart_model(memory_budget_gib=1.0), batch()
    want = gradients(model, inputs)
    twin = how(model)
    assert not runtime_of(twin).plans
    got = gradients(twin, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert runtime_of(twin).plans


def test_evaluation_in_between_and_disabled_adapters() -> None:
    model, inputs = smart_model(), batch()
    want = gradients(model, inputs)
    model.zero_grad()
    loss = model(**inputs).loss
    with torch.no_grad():
        model.eval()(**batch(length=30))
        model.train()
    with model.disable_adapter(), torch.no_grad():
        model(**inputs)
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_the_workload_is_read_from_the_model(family: str) -> None:
    targets = ["qkv_proj" if family == "phi3" else "q_proj", "down_proj"]
    model = tiny_model(family, torch.bfloat16, r=4, target_modules=targets)
    found = workload_of(model, 3, 7)
    assert found.shape == shape_of(FAMILIES[family])
    assert {name: r for name, r in found.rank.items() if r} == dict.fromkeys(targets, 4)
    assert (found.batch_size, found.seq_length, found.tokens) == (3, 7, 21)
    assert found.settings.itemsize == 2
    assert not found.settings.is_4bit
    assert not found.settings.has_dropout
    dropped = tiny_model(family, torch.float32, lora_dropout=0.1)
    assert workload_of(dropped).settings.has_dropout
    plans = [KEEP_ALL] * found.shape.layers
    assert peak_bytes(found.shape, 3, 7, found.rank, plans, found.settings) > 0


def test_the_workload_has_the_name_that_was_asked_for() -> None:
    model = tiny_model("llama", torch.float32)
    causal = model.get_base_model()
    assert workload_of(model).model_name == "LlamaForCausalLM"
    causal.config._name_or_path = "/somewhere/in/a/cache"
    assert workload_of(model).model_name == "/somewhere/in/a/cache"
    causal.colab_qlora_settings = ModelSettings("embedded", 64, "float32")
    assert workload_of(model).model_name == "embedded"


def offloading_model(**changes: Any) -> Any:
    """A model on a machine that is short of memory, with a fast way to its host."""
    model = smart_model(**changes)
    runtime = runtime_of(model)
    inputs = batch(length=64)
    fast = replace(SMALL, copy_down_bytes_per_s=1e15, copy_up_bytes_per_s=1e15)
    # not this machine's peak, whose attention may need other room
    runtime._machine = lambda workload: Machine(fast, 2**40, 2**30)
    whole = gradients(model, inputs)
    peak = runtime.current.step.peak_bytes
    for share in (0.8, 0.6, 0.5, 0.4, 0.3):
        budget = int(share * peak)
        runtime._machine = lambda workload, budget=budget: Machine(fast, budget, 2**30)
        runtime.plans.clear()
        gradients(model, inputs)
        if any(runtime.current.step.offload):
            break
    assert any(runtime.current.step.offload)
    runtime.plans.clear()
    return model, runtime, inputs, whole


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("gemma3", torch.float32)],
)
def test_what_the_runtime_offloads_comes_back(family: str, dtype: torch.dtype) -> None:
    model, runtime, inputs, want = offloading_model(family=family, dtype=dtype)
    for length in (64, 40, 64):  # a shorter batch of the same bucket uses the same blocks
        got = gradients(model, batch(length=length))
    step = runtime.current.step
    assert any(step.offload)
    assert runtime._lane.pool.bytes_held() == sum(step.host_blocks()) == step.plan.host_bytes
    state, settings = state_of(model), step.batch.settings
    state.plan, state.mlp_tokens = KEEP_ALL, settings.mlp_tokens
    state.max_weight_bytes, state.holds_gate_up = settings.max_weight_bytes, settings.holds_gate_up
    kept = gradients(model, inputs)
    assert all(torch.equal(got[name], kept[name]) for name in kept)
    assert kept.keys() == want.keys()


def test_what_was_sent_away_is_gone_by_the_end_of_the_forward_pass() -> None:
    model, runtime, inputs, _ = offloading_model()
    model.zero_grad()
    stores, make = [], runtime.store
    runtime.store = lambda layer: stores.append(make(layer)) or stores[-1]
    loss = model(**inputs).loss
    sent = [store._parcels.values() for store in stores]
    assert all(sent) and not any(store._is_fetched for store in stores)
    # a layer's memory is let go when the next one is through; of the last, nobody's turn has come
    assert not any(parcel.memory is not None for parcels in sent[:-1] for parcel in parcels)
    assert all(parcel.memory is not None for parcel in sent[-1])
    loss.backward()


def test_a_host_that_refuses_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(self: HostPool, sizes_bytes: list[int]) -> None:
        raise HostMemoryRefused("the host gives no more page-locked memory", got="code 2")

    model, runtime, inputs, want = offloading_model()
    runtime._lane = None  # as before the first plan
    monkeypatch.setattr(HostPool, "reserve", refuses)
    capsys.readouterr()
    got = gradients(model, inputs)
    lines = capsys.readouterr().out.splitlines()
    assert sum("nothing is offloaded to the host: the host gives no more" in x for x in lines) == 1
    assert not any(runtime.current.step.offload)
    assert any(runtime.current.step.plan.recompute)
    gradients(model, batch(length=20, rows=3))
    assert "nothing is offloaded" not in capsys.readouterr().out
    assert all(torch.allclose(got[n], want[n], rtol=1e-3, atol=1e-5) for n in want)


class FakeGpu:
    """torch.cuda's answers about memory, in GiB."""

    def __init__(self, patch: pytest.MonkeyPatch, free: float, reserved: float, allocated: float):
        sizes = {"memory_reserved": reserved, "memory_allocated": allocated}
        for name, gib in sizes.items():
            patch.setattr(torch.cuda, name, lambda device, gib=gib: int(gib * GIB))
        both = (int(free * GIB), 15 * GIB)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: both)
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: self.share)
        self.share = 1.0


def test_budgets_of_a_gpu_are_what_is_free_now(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, free=6, reserved=7, allocated=6.5)
    device = torch.device("cuda")
    found = this_machine(device, SMALL, 6 * GIB)
    # 7 that torch has and 6 that it can get, less a margin
    assert found.budget_bytes / GIB == pytest.approx(13 - 0.3, abs=0.01)
    assert found.other_bytes == 0.5 * GIB
    assert not found.is_budget_given
    given = this_machine(device, SMALL, 7 * GIB, 10, 2)
    assert (given.budget_bytes, given.host_bytes, given.other_bytes) == (10 * GIB, 2 * GIB, 0)
    assert given.is_budget_given
    with pytest.raises(UserError, match=r"got 13.5; allowed: up to 12.70 GiB of 15.00: other pro"):
        this_machine(device, SMALL, 0, 13.5)
    # torch.cuda.set_per_process_memory_fraction: 9 of the 15
    gpu.share = 0.6
    assert this_machine(device, SMALL, 0).budget_bytes / GIB == 8.75
    message = r"other processes hold about 1.50 GiB, .*; this process may have 9.00 of it"
    with pytest.raises(UserError, match=message):
        this_machine(device, SMALL, 0, 9.5)


def test_an_optimisers_states_are_there_once_gradients_have_gone() -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    seen = []
    machine = Machine(CPU_PROFILE, 2**30, 0)
    runtime = ActivationRuntime(
        workload_of(model), lambda w: seen.append(w) or machine, print, torch.device("cpu")
    )
    for kind in (
        BatchKind(1, 64),
        BatchKind(1, 64, has_gradients=True),  # accumulates
        BatchKind(1, 128),
        BatchKind(1, 256, has_gradients=True),
    ):
        runtime.new_pass()
        runtime.plan_of(kind)
    assert [workload.has_stepped for workload in seen] == [False, False, True, True]
    more = resident_bytes(seen[2]) - resident_bytes(seen[0])
    sizes = static_bytes(seen[0].shape, seen[0].rank, seen[0].settings)
    assert more == sizes["optimizer states"] + sizes["GEMM workspace"] > 0


def test_a_model_that_is_planned_anew_has_its_optimisers_states_already() -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    # the first planner's first pass comes before any step, the second's after one
    for budget_gib, has_stepped in ((None, False), (1.0, True)):
        set_gradient_checkpointing(model, "smart", budget_gib)
        runtime = runtime_of(model)
        assert runtime is not None
        runtime.plan_of(BatchKind(1, 64))
        assert runtime.workload.has_stepped is has_stepped


def test_other_adapters_have_no_states_yet() -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    earlier = plan_batches(model)
    assert isinstance(earlier, ActivationRuntime)
    earlier.plan_of(BatchKind(1, 64))
    earlier.workload = replace(earlier.workload, rank=7)
    runtime = plan_batches(model, earlier=earlier)
    assert isinstance(runtime, ActivationRuntime)
    runtime.plan_of(BatchKind(1, 64))
    assert not runtime.workload.has_stepped
