"""How many layers' weights a plan holds decoded, what that takes, and what it saves."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from machines import GIB, LARGE, LLAMA_3_8B, SMALL, machine  # noqa: E402

from colab_qlora.activations.cost_settings import CostSettings  # noqa: E402
from colab_qlora.activations.gpu_profile import profile_named  # noqa: E402
from colab_qlora.activations.held_layers import (  # noqa: E402
    LEFT_SHARE,
    held_layer_bytes,
    with_held_weights,
)
from colab_qlora.activations.memory_plan import MemoryPlan, Workload, plan_for  # noqa: E402
from colab_qlora.activations.recording import recording_bytes  # noqa: E402
from colab_qlora.activations.report import peak_parts, sentence  # noqa: E402
from colab_qlora.activations.runtime import ActivationRuntime, BatchKind  # noqa: E402
from colab_qlora.activations.saved_classes import class_bytes  # noqa: E402
from colab_qlora.activations.this_machine import CPU_PROFILE  # noqa: E402

torch = pytest.importorskip("torch")


def plan(gib: float, profile=LARGE, seq_length: int = 2048, **settings) -> MemoryPlan:
    workload = Workload("8b", LLAMA_3_8B, 16, 2, seq_length, settings=CostSettings(**settings))
    return plan_for(workload, machine(profile, gib))


def test_a_layers_bytes_at_8b() -> None:
    # q k v 6144 x 4096, o 4096 x 4096, gate and up 28672 x 4096, down 4096 x 14336, 64 more each
    groups = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    numbers = sum((outer + 64) * (inner + 64) for outer, inner in groups)
    assert held_layer_bytes(LLAMA_3_8B, 16, CostSettings()) == 2 * numbers


def test_all_layers_where_there_is_room() -> None:
    found = plan(80)
    step = found.step
    assert step is not None and step.held_layers == 32
    without = found.holding_at_most(0).step
    assert without is not None and without.held_layers == without.held_bytes == 0
    assert step.peak_bytes - without.peak_bytes == 32 * held_layer_bytes(
        LLAMA_3_8B, 16, CostSettings()
    )
    # two decodes of 218 million numbers, 0.52 bytes in and 2 out, less the adapters' borders
    saved_s = without.step_s - step.step_s
    assert saved_s == pytest.approx(32 * 2 * 218.1e6 * 2.516 / 2e12, rel=0.03)
    assert found.holding_at_most(40) is found
    parts = peak_parts(found)
    assert parts["decoded weights"] == step.held_bytes
    assert sum(parts.values()) == step.peak_bytes
    assert "the weights stay decoded (13.27 GiB)" in sentence(found)


def test_as_many_as_the_budget_leaves_room_for() -> None:
    whole = plan(80)
    assert whole.step is not None
    least = whole.step.peak_bytes - whole.step.held_bytes
    layer = whole.step.held_bytes // 32
    batch = whole.step.batch
    beside = recording_bytes(batch.shape, batch.rank, batch.tokens, batch.settings)
    seen = set()
    for layers in (0, 1, 7, 31):
        budget = (least + beside + layers * layer) / (1 - LEFT_SHARE)
        for more in (-0.01, 0.01):
            found = plan(budget / GIB + more)
            assert found.step is not None
            expected = max(0, layers - (more < 0))
            assert found.step.held_layers == expected
            assert found.step.peak_bytes == least + expected * layer
            seen.add(expected)
            if 0 < expected < 32:
                assert f"{expected} layers stay decoded" in sentence(found)
    assert seen >= {0, 1, 6, 7, 30, 31}


@pytest.mark.parametrize(
    ("gib", "settings"),
    [
        (12, {}),  # something is recomputed
        (80, {"is_4bit": False}),
        (80, {"holds_weights": False}),
        (80, {"max_weight_bytes": 2**20}),  # decoded in parts
    ],
)
def test_none(gib: float, settings: dict[str, object]) -> None:
    found = plan(gib, **settings)
    assert found.step is not None and found.step.held_layers == 0
    assert found.step == with_held_weights(found.step, found.machine.budget_bytes)
    assert "decoded" not in sentence(found)


def test_what_is_kept_or_offloaded_goes_first() -> None:
    held = []
    for gib in range(8, 60, 4):
        workload = Workload("8b", LLAMA_3_8B, 16, 2, 2048)
        found = plan_for(workload, machine(SMALL, gib, host_gib=7))
        assert found.step is not None
        held.append(found.step.held_layers)
        if found.step.held_layers:
            assert not any(found.step.plan.recompute) and not any(found.step.offload)
    assert held == sorted(held) and held[0] == 0 and held[-1] == 32


@pytest.mark.parametrize("gpu", ["T4", "L4", "A100", "H100"])
@pytest.mark.parametrize("seq_length", [64, 512, 2048])
def test_a_byte_of_held_weights_saves_less_than_one_of_gate_and_up(gpu, seq_length) -> None:
    batch = Workload("8b", LLAMA_3_8B, 16, 2, seq_length).batch_on(profile_named(gpu))
    held = batch.held_s / held_layer_bytes(batch.shape, batch.rank, batch.settings)
    sizes = class_bytes(batch.shape, batch.tokens, seq_length, batch.rank, batch.settings)
    assert 0 < held < batch.recompute_s["gate_up"] / sizes["gate_up"]


def runtime(gib: float) -> ActivationRuntime:
    workload = Workload("8b", LLAMA_3_8B, 16, 1, 64)
    device = torch.device("cpu")
    return ActivationRuntime(workload, lambda _: machine(LARGE, gib), lambda _: None, device)


def test_all_plans_hold_the_same_layers() -> None:
    plans = runtime(34)
    lengths = (128, 2048, 256, 4096, 128)
    found = []
    for length in lengths:
        plans.new_pass()
        step = plans.plan_of(BatchKind(2, length)).step
        assert step is not None
        found.append(step.held_layers)
        assert {p.step.held_layers for p in plans.plans.values() if p.step} == {found[-1]}
    alone = [plan(34, seq_length=length).step.held_layers for length in lengths]  # type: ignore[union-attr]
    assert found == [min(alone[: i + 1]) for i in range(len(lengths))]
    assert 0 < found[-1] < found[0] == 32


def test_what_is_held_already_is_not_counted_as_other_tensors() -> None:
    plans = runtime(80)
    first = plans.plan_of(BatchKind(2, 128)).step
    assert first is not None
    plans._machine = lambda workload: replace(
        machine(LARGE, 80), other_bytes=first.held_bytes + 5 - workload.held_bytes
    )
    plans.new_pass()
    second = plans.plan_of(BatchKind(2, 256), first.held_bytes).step
    assert second is not None and second.other_bytes == 5


def test_on_a_cpu_too() -> None:
    found = plan(40, replace(CPU_PROFILE))
    assert found.step is not None and found.step.held_layers == 32
