"""Plans of a step: inside the budget by the true peak, never slower with more memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import weakref

import pytest
from machines import GIB, LARGE, LLAMA_3_8B, SMALL

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.costs import held_bytes
from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.activations.phase_costs import peak_bytes, step_moments
from colab_qlora.activations.plan import BudgetTooSmall
from colab_qlora.activations.saved_classes import CLASSES, class_bytes, names_of
from colab_qlora.activations.step_search import can_plan, plan_step
from colab_qlora.activations.step_time import (
    HOST_GATHER_BYTES_PER_S,
    KERNEL_GAP_S,
    LAYER_KERNELS,
    START_SHARE,
    Batch,
)
from colab_qlora.layers.saved import ALL_NAMES, KEEP_INPUT


def batch_of(profile, sequences, length, **settings):
    return Batch(
        LLAMA_3_8B,
        16,
        sequences * length,
        length,
        profile,
        CostSettings(attention=profile.attention, **settings),
    )


def test_classes_are_all_names_once() -> None:
    names = [name for members in CLASSES.values() for name in members]
    assert sorted(names) == sorted(ALL_NAMES)
    assert names_of(["input"]) == {"h0"}


@pytest.mark.parametrize("attention", ["flash", "efficient"])
def test_bytes_of_classes_add_up(attention: str) -> None:
    settings = CostSettings(attention=attention)
    layer = (LLAMA_3_8B, 66, 33, {"q_proj": 3, "up_proj": 5})
    found = class_bytes(*layer, settings)
    for count in range(len(CLASSES)):
        for classes in itertools.combinations(sorted(set(CLASSES) - {"input"}), count):
            want = held_bytes(*layer, names_of(["input", *classes]), settings)
            assert sum(found[name] for name in ("input", *classes)) == want


@pytest.mark.parametrize(
    ("profile", "sequences", "length"), [(LARGE, 2, 2048), (LARGE, 1, 8192), (SMALL, 1, 4096)]
)
@pytest.mark.parametrize("host_gib", [0, 6])
def test_the_true_peak_is_inside_and_more_memory_is_never_slower(
    profile, sequences, length, host_gib
) -> None:
    batch, seconds, fits = batch_of(profile, sequences, length), math.inf, 0
    for gib in (5, 6, 7, 8, 10, 12, 16, 24, 40):
        try:
            found = plan_step(batch, sequences, gib * GIB, host_gib * GIB)
        except BudgetTooSmall as error:
            assert not fits
            assert error.floor_bytes > gib * GIB
            assert sum(error.parts.values()) == error.floor_bytes
            continue
        fits += 1
        settings = found.batch.settings
        peak = peak_bytes(LLAMA_3_8B, sequences, length, 16, found.keep, settings, found.offload)
        assert found.peak_bytes == peak <= gib * GIB
        # greedy, so a little slower may happen by chance
        assert found.step_s <= seconds * 1.005
        seconds = min(seconds, found.step_s)
        assert found.plan.host_bytes <= host_gib * GIB
        assert found.step_s <= found.full_checkpointing_s + found.plan.setting_s
    assert fits >= 3
    assert found.plan.recompute_s == 0
    assert found.recompute_share == 0


def test_host_memory_takes_the_place_of_recomputation() -> None:
    batch = batch_of(LARGE, 2, 2048)
    alone = plan_step(batch, 2, 8 * GIB)
    helped = plan_step(batch, 2, 8 * GIB, 16 * GIB)
    assert not any(alone.offload)
    assert any(helped.offload)
    assert helped.step_s < alone.step_s
    assert helped.plan.exposed_s == 0


def test_recompute_falls_by_forty_percent_at_the_memory_of_full_checkpointing() -> None:
    # what a plan that recomputes every layer needs, by the same account
    batch = batch_of(LARGE, 2, 2048)
    full = peak_bytes(LLAMA_3_8B, 2, 2048, 16, [KEEP_INPUT] * 32, batch.settings)
    found = plan_step(batch, 2, full, 32 * GIB)
    assert found.peak_bytes <= full
    assert found.recompute_share <= 0.6


def test_copies_on_their_way_count() -> None:
    plans = [KEEP_INPUT] * 32
    nothing = [frozenset()] * 32
    kept = step_moments(LLAMA_3_8B, 2, 2048, 16, plans)
    moved = step_moments(LLAMA_3_8B, 2, 2048, 16, nothing, offloads=plans)
    row = 4096 * 2
    inputs = row * (4096 + 16)
    # the last layer's are still on their way when the loss begins, of 32
    assert kept["loss forward"].bytes - moved["loss forward"].bytes == 31 * inputs
    assert moved["loss forward"].parts["copies"] == inputs
    assert moved["loss forward"].parts["kept activations"] == 0
    # the layer at work has its own beside those of the one before it
    assert moved["forward mlp"].parts["copies"] == inputs
    assert moved["forward mlp"].layer > 0
    some = step_moments(
        LLAMA_3_8B, 2, 2048, 16, [frozenset({"h0"})] * 32, offloads=[names_of(["qkv"])] * 32
    )
    assert some["loss forward"].parts["copies"] == row * 6144
    assert some["loss forward"].parts["kept activations"] == 32 * row * 4096


def test_other_tensors_count() -> None:
    batch = batch_of(LARGE, 2, 2048)
    alone = plan_step(batch, 2, 9 * GIB)
    beside = plan_step(batch, 2, 10 * GIB, other_bytes=GIB)
    assert beside.peak_bytes == alone.peak_bytes + GIB
    with pytest.raises(BudgetTooSmall, match="other tensors"):
        plan_step(batch, 2, 10 * GIB, other_bytes=9 * GIB)


def test_whether_a_plan_exists_is_what_planning_says() -> None:
    for gib, host_gib, length in itertools.product((6, 8, 12), (0, 4), (1024, 8192, 20480)):
        batch = batch_of(SMALL, 1, length)
        try:
            plan_step(batch, 1, gib * GIB, host_gib * GIB)
            is_there = True
        except BudgetTooSmall:
            is_there = False
        assert can_plan(batch, 1, gib * GIB, host_gib * GIB) == is_there


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [22, 128, 4096])
def test_every_budget_from_the_floor_up_has_a_plan(itemsize: int, tokens: int) -> None:
    # where spare columns are wide beside a tiny model, keeping a tensor may cost more than its size
    shape = ModelShape(3, 48, 80, 4, 2, 12, 101)
    settings = CostSettings(itemsize=itemsize, spare_multiple=16, attention="cpu_flash")
    batch = Batch(shape, 3, tokens, tokens, SMALL, settings)
    with pytest.raises(BudgetTooSmall) as caught:
        plan_step(batch, 1, 1)
    floor = caught.value.floor_bytes
    whole = plan_step(batch, 1, 10**12).peak_bytes
    for part in range(41):
        budget = floor + (whole - floor) * part // 40
        assert plan_step(batch, 1, budget).peak_bytes <= budget
    # keeping a little may need less than rebuilding it, so the floor is not the very least
    with pytest.raises(BudgetTooSmall):
        plan_step(batch, 1, int(0.9 * floor))


@pytest.mark.parametrize("profile", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("sizes", [(2, 512), (2, 2048)], ids=str)
def test_where_the_embedding_goes_is_the_better_of_both(
    profile: GpuProfile, sizes: tuple[int, int]
) -> None:
    """Against a search of each place alone, which leaves nothing out."""
    table = LLAMA_3_8B.vocab * LLAMA_3_8B.hidden * 2
    chosen = set()
    for gib, host_gib in itertools.product((5.2, 6, 12), (0, 16)):
        alone = {}
        for place, less in (("gpu", 0), ("host", table)):
            with contextlib.suppress(BudgetTooSmall):
                batch = batch_of(profile, *sizes, embedding=place)
                room = int(host_gib * GIB) - less
                if room >= 0:
                    alone[place] = plan_step(batch, sizes[0], int(gib * GIB), room)
        both = batch_of(profile, *sizes, embedding="either")
        assert can_plan(both, sizes[0], int(gib * GIB), int(host_gib * GIB)) == bool(alone)
        if not alone:
            continue
        found = plan_step(both, sizes[0], int(gib * GIB), int(host_gib * GIB))
        best_s = min(plan.step_s for plan in alone.values())
        assert found.step_s == pytest.approx(best_s, rel=1e-3)
        chosen.add(found.batch.settings.embedding)
    assert chosen == {"gpu", "host"}


def test_a_table_on_the_host_costs_its_rows_and_saves_itself() -> None:
    table = LLAMA_3_8B.vocab * LLAMA_3_8B.hidden * 2
    here, away = (batch_of(SMALL, 2, 2048, embedding=place) for place in ("gpu", "host"))
    plans = [plan_step(batch, 2, 40 * GIB) for batch in (here, away)]
    assert plans[0].peak_bytes - plans[1].peak_bytes == table
    rows = 2 * 2048 * 4096 * 2
    assert plans[1].step_s - plans[0].step_s == pytest.approx(
        rows / HOST_GATHER_BYTES_PER_S + rows / SMALL.copy_up_bytes_per_s
    )


def test_narrow_products_read_what_they_meet_and_kernels_have_gaps() -> None:
    still = {name: 0 for name in LLAMA_3_8B.linears}
    one = Batch(LLAMA_3_8B, still | {"o_proj": 16}, 4096, 2048, LARGE)
    none = Batch(LLAMA_3_8B, still, 4096, 2048, LARGE)
    read_s = 2 * 4096 * 4096 / LARGE.move_bytes_per_s
    # beside what the widened GEMM takes
    wide_s = one.group_s["o"] - none.group_s["o"]
    assert one.forward_s - none.forward_s == pytest.approx(wide_s + read_s)
    # dY for dY B and for B's gradient, X for A's
    assert one.backward_s - none.backward_s == pytest.approx(wide_s + 3 * read_s)
    assert none._adapted_columns == (0, 0)
    every = Batch(LLAMA_3_8B, 16, 4096, 2048, LARGE)
    assert every._adapted_columns == (3 * 4096 + 14336, 17 * 4096)
    kept = [frozenset[str]()] * 32
    gaps_s = KERNEL_GAP_S * LAYER_KERNELS * 32
    parts_s = 32 * (one.forward_s + one.backward_s) + one.head_s + one.optimizer_s
    start_s = START_SHARE * LARGE.step_launch_s
    assert one.step_s(kept, is_recorded=True) == pytest.approx(parts_s + gaps_s + start_s)


def test_a_choice_that_was_refused_holds_nothing_of_the_caller() -> None:
    """A forward pass plans; its tensors were alive in the backward pass, in an error's frames."""

    class Tensor:
        pass

    def forward(budget: int) -> weakref.ref[Tensor]:
        tensor = Tensor()
        plan_step(batch_of(SMALL, 1, 4096), 1, budget)
        return weakref.ref(tensor)

    with pytest.raises(BudgetTooSmall) as refused:
        plan_step(batch_of(SMALL, 1, 4096), 1, 1)
    gc.collect()
    gc.disable()
    try:
        # just enough, so that the settings that take more are refused on the way
        assert forward(int(refused.value.floor_bytes * 1.01))() is None
    finally:
        gc.enable()
