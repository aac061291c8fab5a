"""Plans know where layers run as CUDA graphs: what it costs, and when it beats offloading."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import GIB, LARGE, LLAMA_3_8B, SMALL

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.gpu_profile import profile_named
from colab_qlora.activations.memory_plan import Machine, Workload, plan_for
from colab_qlora.activations.recording import (
    RECORDED_LAUNCHES,
    may_record,
    recording_bytes,
    waits_for_host,
)
from colab_qlora.activations.step_search import plan_step
from colab_qlora.activations.step_time import START_SHARE, Batch

# a GPU that runs a layer of an 8B with 1,024 tokens in 2 ms, and a host that starts it in 5
H100 = profile_named("H100")
SLOW_HOST = replace(H100, layer_launch_s=5e-3, step_launch_s=4e-3)
NO_HOST = replace(H100, layer_launch_s=1e-6, step_launch_s=1e-6)


def batch_of(profile, sequences=2, length=512, **settings) -> Batch:
    chosen = CostSettings(attention="flash", **settings)
    return Batch(LLAMA_3_8B, 16, sequences * length, length, profile, chosen)


def test_two_buffers_and_a_workspace() -> None:
    settings = CostSettings(gemm_workspace_bytes=1000)
    assert recording_bytes(LLAMA_3_8B, 16, 10, settings) == 2 * 10 * (4096 + 64) * 2 + 1000


def test_a_recorded_step_waits_for_the_gpu() -> None:
    slow, ideal = batch_of(SLOW_HOST), batch_of(NO_HOST)
    nothing = [frozenset[str]()] * 32
    assert waits_for_host(slow) and not waits_for_host(ideal)
    # the optimiser's kernels come last
    assert slow.step_s(nothing) == pytest.approx(4e-3 + 32 * 5e-3 + slow.optimizer_s)
    start_s = START_SHARE * (SLOW_HOST.step_launch_s - NO_HOST.step_launch_s)
    recorded_s = slow.step_s(nothing, is_recorded=True)
    assert recorded_s == pytest.approx(ideal.step_s(nothing) + start_s)
    # with few tokens the host is what remains, whatever is recomputed
    few = batch_of(SLOW_HOST, 1, 8)
    everything = [frozenset(few.recompute_s)] * 32
    launches = 4e-3 + 32 * 5e-3 * RECORDED_LAUNCHES
    fast = replace(few, profile=replace(SLOW_HOST, move_bytes_per_s=1e15, decode_bytes_per_s=1e15))
    launches += fast.optimizer_s
    assert fast.step_s(nothing, is_recorded=True) == pytest.approx(launches)
    assert fast.step_s(everything, is_recorded=True) == pytest.approx(launches)


def test_offloading_costs_the_host_something() -> None:
    batch = batch_of(SLOW_HOST)
    nothing = [frozenset[str]()] * 32
    moved = batch.step_s(nothing, offloaded=[frozenset({"qkv", "h1"})] * 32)
    assert moved > batch.step_s(nothing)


@pytest.mark.parametrize("budget_gib", [6.6, 7, 8])
def test_recorded_layers_beat_offloading_where_the_host_is_slow(budget_gib: float) -> None:
    budget = int(budget_gib * GIB)
    batch = batch_of(SLOW_HOST)
    found = plan_step(batch, 2, budget, 64 * GIB)
    assert not any(found.offload)
    assert may_record(found, budget - found.peak_bytes)
    assert found.seconds_with(budget) == found.recorded_s < found.step_s
    # where the host is fast, copies are free
    assert any(plan_step(batch_of(NO_HOST), 2, budget, 64 * GIB).offload)


def test_what_is_not_recorded() -> None:
    room = 10 * GIB
    usual = plan_step(batch_of(SLOW_HOST), 2, 40 * GIB)
    assert may_record(usual, room)
    needed = recording_bytes(LLAMA_3_8B, 16, 1024, usual.batch.settings)
    assert may_record(usual, needed) and not may_record(usual, needed - 1)
    dropout = plan_step(batch_of(SLOW_HOST, has_dropout=True), 2, 40 * GIB)
    assert not may_record(dropout, room)
    packed = plan_step(replace(batch_of(SLOW_HOST), seq_length=100), 2, 40 * GIB)
    assert not may_record(packed, room)
    cpu = plan_step(batch_of(replace(SLOW_HOST, capability=(0, 0))), 2, 40 * GIB)
    assert not may_record(cpu, room)
    moved = plan_step(batch_of(NO_HOST), 2, 7 * GIB, 64 * GIB)
    assert any(moved.offload) and not may_record(moved, room)


@pytest.mark.parametrize("profile", [LARGE, SMALL, SLOW_HOST])
def test_the_face_predicts_what_will_run(profile) -> None:
    workload = Workload("", LLAMA_3_8B, 16, 2, 512)
    plan = plan_for(workload, Machine(profile, 40 * GIB, 0)).holding_at_most(0)
    assert plan.step is not None and plan.may_record
    assert plan.step_seconds == plan.step.recorded_s
    # no room beside it: recording and a little recomputation beat none of both on a slow host
    tight = plan_for(workload, Machine(profile, plan.step.peak_bytes, 0))
    assert tight.step is not None
    assert tight.may_record is waits_for_host(plan.step.batch) is any(tight.step.plan.recompute)
    assert tight.step_seconds == tight.step.seconds_with(plan.step.peak_bytes)
    assert tight.step_seconds <= plan.step.step_s


def test_full_checkpointing_is_recorded_too() -> None:
    usual = plan_step(batch_of(SLOW_HOST), 2, 40 * GIB)
    # its layers' forward passes once more, and what lies between their 51 kernels
    again_s = 32 * (usual.batch.forward_s + 51 * 2.2e-6)
    assert usual.full_checkpointing_s == pytest.approx(usual.recorded_s + again_s)
    assert usual.full_checkpointing_s < usual.step_s
    dropout = plan_step(batch_of(SLOW_HOST, has_dropout=True), 2, 40 * GIB)
    assert dropout.full_checkpointing_s > dropout.step_s


def test_a_model_whose_layers_are_not_recorded_is_planned_so() -> None:
    batch = batch_of(SLOW_HOST, records_layers=False)
    found = plan_step(batch, 2, 7 * GIB, 64 * GIB)
    assert any(found.offload) and not may_record(found, 10 * GIB)
