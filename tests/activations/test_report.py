"""The words and the picture of a plan say what the plan says."""

from __future__ import annotations

import re

import pytest
from machines import GIB, LARGE, LLAMA_3_8B, SMALL, machine

from colab_qlora.activations.memory_plan import MemoryPlan, Workload, plan_for
from colab_qlora.activations.report import WIDTH, peak_parts, seconds_text, settings_text
from colab_qlora.activations.step_settings import WHOLE
from colab_qlora.teaching.plan_picture import ROWS, action_of, describe_plan

CASES = {
    "keeps all": (LARGE, 2, 2048, 70, 0),
    "recomputes": (LARGE, 2, 2048, 8, 0),
    "offloads": (LARGE, 2, 2048, 8, 32),
    "both": (SMALL, 1, 8192, 13, 6),
    "short of memory": (SMALL, 1, 16384, 12, 6),
    "does not fit": (SMALL, 48, 2048, 13, 6),
    "never fits": (SMALL, 1, 128, 3, 0),
}


@pytest.fixture(scope="module", params=CASES)
def plan(request: pytest.FixtureRequest) -> MemoryPlan:
    profile, batch_size, length, gib, host_gib = CASES[request.param]
    workload = Workload("llama", LLAMA_3_8B, 16, batch_size, length)
    return plan_for(workload, machine(profile, gib, host_gib))


def test_parts_add_up_to_the_peak(plan: MemoryPlan) -> None:
    parts = peak_parts(plan)
    assert all(size > 0 for size in parts.values())
    assert sum(parts.values()) / GIB == pytest.approx(plan.peak_memory_gib)


def test_the_table_has_the_plans_numbers(plan: MemoryPlan) -> None:
    text = str(plan)
    assert all(len(line) <= WIDTH for line in text.splitlines())
    for number in (
        f"{plan.peak_memory_gib:.2f} GiB",
        f"batch at {plan.workload.seq_length} tokens: {plan.largest_batch_size}",
        f"batch {plan.workload.batch_size}: {plan.longest_seq_length}",
    ):
        assert number in text
    if plan.step is None:
        assert "does not fit" in text
        change = plan.cheapest_change
        assert (change is None) == ("cheapest change" not in text)
        return
    assert "\nfits\n" in text
    assert seconds_text(plan.step_seconds) in text
    assert f"{plan.step.recompute_share:.0%} of what" in text
    basis = "predicted" if plan.machine.profile.is_measured else "predicted from a data sheet"
    assert f"time ({basis})" in text
    for line in settings_text(plan.step):
        assert line in text


def test_every_layer_stands_in_the_table_once(plan: MemoryPlan) -> None:
    if plan.step is None:
        return
    found: list[int] = []
    for spans in re.findall(r"^  layers? ([\d, -]+)$", str(plan), re.MULTILINE):
        for span in spans.split(", "):
            first, _, last = span.partition("-")
            found += range(int(first), int(last or first) + 1)
    assert sorted(found) == list(range(32))


def test_settings_are_said_where_they_are_not_the_fastest(plan: MemoryPlan) -> None:
    if plan.step is None:
        return
    settings, said = plan.step.batch.settings, " ".join(settings_text(plan.step))
    assert ("tokens at a time" in said) == (settings.mlp_tokens < plan.step.batch.tokens)
    assert ("one weight" in said) == (settings.max_weight_bytes < WHOLE)


def test_the_sentence(plan: MemoryPlan) -> None:
    text = plan.sentence()
    assert "\n" not in text
    assert f"{plan.workload.batch_size} x {plan.workload.seq_length} tokens" in text
    assert f"{plan.peak_memory_gib:.2f}" in text
    assert ("does not fit" in text) != plan.fits
    if plan.step is not None:
        assert ("nothing is recomputed" in text) == (not any(plan.step.plan.recompute))
        assert ("to the host" in text) == any(plan.step.plan.offload)


def test_the_picture_has_every_part_and_every_layer(plan: MemoryPlan) -> None:
    figure = plan.draw()
    artists = {a.get_gid(): a for a in figure.findobj() if a.get_gid()}
    parts = peak_parts(plan)
    widths = {name: artists[f"part {name}"].get_width() for name in parts}
    total = sum(widths.values())
    for name, size in parts.items():
        assert widths[name] / total == pytest.approx(size / sum(parts.values()))
    squares = [gid for gid in artists if gid.split(" ")[0] in ROWS]
    if plan.step is None:
        assert not squares
    else:
        assert len(squares) == 32 * len(ROWS)
        for gid in squares:
            name, layer, action = gid.split(" ")
            assert action_of(plan, int(layer), name) == action
            assert name in getattr(plan.step.plan, action)[int(layer)]
            assert bool(artists[gid].get_hatch()) == (action != "keep")
    words = [text for text in figure.findobj() if hasattr(text, "get_text") and text.get_text()]
    box = figure.bbox
    for text in words:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 <= extent.x1 <= box.x1, text.get_text()
        assert box.y0 <= extent.y0 <= extent.y1 <= box.y1, text.get_text()
    assert plan.sentence() in describe_plan(plan)


def test_the_cases_are_what_they_are_called() -> None:
    def made(name: str) -> MemoryPlan:
        profile, batch_size, length, gib, host_gib = CASES[name]
        workload = Workload("llama", LLAMA_3_8B, 16, batch_size, length)
        return plan_for(workload, machine(profile, gib, host_gib))

    assert not any(made("keeps all").step.plan.recompute)
    assert any(made("recomputes").step.plan.recompute)
    assert any(made("offloads").step.plan.offload)
    both = made("both").step.plan
    assert any(both.offload)
    assert any(both.recompute)
    assert settings_text(made("short of memory").step)
    assert not made("does not fit").fits
    assert made("never fits").cheapest_change is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2494, "249 ms"), (0.0006, "1 ms"), (5.443, "5.44 s"), (247.9, "248 s")]
)
def test_times(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
