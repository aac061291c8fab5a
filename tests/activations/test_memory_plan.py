"""What a plan answers: does it fit, what would, and what to change."""

from __future__ import annotations

import math

import pytest
from machines import GIB, LARGE, LLAMA_3_8B, SMALL, machine

from colab_qlora.activations.memory_plan import (
    Workload,
    check_budgets,
    machine_of,
    plan_for,
    usable_bytes,
)
from colab_qlora.activations.recorded_shapes import RECORDED_SHAPES, recorded_shape
from colab_qlora.errors import UserError


def plan(batch_size=2, seq_length=2048, profile=SMALL, gib=14.0, host_gib=7.0):
    workload = Workload("llama", LLAMA_3_8B, 16, batch_size, seq_length)
    return plan_for(workload, machine(profile, gib, host_gib))


def test_a_plan_that_fits_answers() -> None:
    found = plan()
    assert found.fits
    assert found.error is None
    assert found.cheapest_change is None
    assert 0 < found.peak_memory_gib <= 14
    assert found.tokens_per_second == pytest.approx(4096 / found.step_seconds)
    assert found.hours(1000) == pytest.approx(500 * found.step_seconds / 3600)
    assert found.hours(1001, epochs=2) == pytest.approx(1001 * found.step_seconds / 3600)


def test_largest_and_longest_are_the_last_that_fit() -> None:
    found = plan()
    for change, step in ((found.largest_batch_size, 1), (found.longest_seq_length, 128)):
        name = "batch_size" if step == 1 else "seq_length"
        assert change > 0
        assert found.with_changes(**{name: change}).fits
        assert not found.with_changes(**{name: change + step}).fits


def test_a_misfit_says_what_would_help() -> None:
    found = plan(batch_size=48)
    assert not found.fits
    assert found.error is not None
    assert math.isnan(found.step_seconds)
    assert found.peak_memory_gib > 14
    change = found.cheapest_change
    assert change is not None
    assert change.plan.fits
    assert "the same training" in change.text
    size = change.plan.workload.batch_size
    assert 48 % size == 0
    assert f"per_device_train_batch_size={size} " in change.text
    assert f"by {48 // size}" in change.text


def test_a_sequence_too_long_gets_host_memory_or_is_cut() -> None:
    needs_host = plan(batch_size=1, seq_length=12288, gib=9.5, host_gib=0.0)
    assert not needs_host.fits
    assert "free host memory" in needs_host.cheapest_change.text
    assert needs_host.cheapest_change.plan.fits
    too_long = plan(batch_size=1, seq_length=262144, gib=10)
    change = too_long.cheapest_change
    assert change.plan.fits
    assert f"max_seq_length to {change.plan.workload.seq_length}" in change.text


def test_nothing_helps_where_the_weights_do_not_fit() -> None:
    found = plan(gib=3)
    assert not found.fits
    assert found.cheapest_change is None
    assert found.largest_batch_size == 0
    assert found.longest_seq_length == 0


def test_packed_documents_are_attended_to_one_by_one() -> None:
    whole = Workload("llama", LLAMA_3_8B, 16, 1, 8192)
    packed = Workload("llama", LLAMA_3_8B, 16, 1, 8192, document_tokens=512)
    on = machine(LARGE, 60)
    one, many = plan_for(whole, on), plan_for(packed, on)
    assert many.step_seconds < one.step_seconds
    assert many.step.batch.settings.attention == "triton"
    assert many.step.batch.attention_s == pytest.approx(one.step.batch.attention_s / 16)


def test_budgets_given_by_hand() -> None:
    assert machine_of(SMALL).budget_bytes == usable_bytes(15 * GIB) < 14.5 * GIB
    given = machine_of(SMALL, 10, 2)
    assert (given.budget_bytes, given.host_bytes) == (10 * GIB, 2 * GIB)
    assert given.is_budget_given
    assert not machine_of(SMALL, None, 0).is_budget_given
    assert machine_of(SMALL, None, 0).host_bytes == 0
    with pytest.raises(UserError, match="more than a small has: got 16; allowed: up to 14.2"):
        machine_of(SMALL, 16)
    for wrong in (0, -1, math.inf, math.nan, "8", True):
        with pytest.raises(UserError, match="memory_budget_gib is not a size"):
            check_budgets(wrong, None)
    with pytest.raises(UserError, match="host_budget_gib is not a size"):
        check_budgets(None, -0.5)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_sizes_are_checked(wrong) -> None:
    with pytest.raises(UserError, match="batch_size is not a size"):
        plan(batch_size=wrong)
    with pytest.raises(UserError, match="seq_length is not a size"):
        plan(seq_length=wrong)


def test_recorded_names() -> None:
    shape = RECORDED_SHAPES["llama-3-8b"]
    for name in (
        "llama-3-8b",
        "unsloth/llama-3-8b-Instruct-bnb-4bit",
        "meta-llama/Meta-Llama-3-8B",
        "Meta-Llama-3-8B-Instruct",
    ):
        assert recorded_shape(name) == shape
    assert recorded_shape("llama-3-8b-my-finetune") is None
    assert recorded_shape("HuggingFaceTB/SmolLM2-135M-Instruct") == RECORDED_SHAPES["smollm2-135m"]
