"""The heads of a plan's picture stay inside it, whatever the GPU and the model are called."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from colab_qlora.models.memory_planning import plan_memory
from colab_qlora.teaching import draw_plan

HUB_NAME = "unsloth/llama-3-8b-Instruct-bnb-4bit"
MEASURED = "measured 2026-11-30, torch 2.11.0+cu128, 2048 tokens"


def drawn(gpu, source, model_name):
    plan = plan_memory("llama-3-8b", 2, 1024, "T4")
    profile = replace(plan.machine.profile, name=gpu, source=source)
    workload = replace(plan.workload, model_name=model_name)
    return draw_plan(
        replace(plan, workload=workload, machine=replace(plan.machine, profile=profile))
    )


def text(figure, gid):
    (found,) = figure.findobj(lambda artist: artist.get_gid() == gid)
    return found.get_text()


def test_a_long_name_with_measured_rates_stays_inside(assert_readable):
    figure = drawn("Tesla T4", MEASURED, HUB_NAME)
    assert_readable(figure)
    words = text(figure, "subtitle")
    assert words.startswith(f"{HUB_NAME}; about ") and words.endswith(" ...")


def test_a_short_head_is_whole():
    words = text(drawn("T4", "data sheet", "llama-3-8b"), "subtitle")
    assert words.endswith("rates: data sheet")


@pytest.mark.parametrize(
    "said",
    ["a T4", "an L4", "an A100", "an H100", "a Tesla T4", "an NVIDIA H200", "a Quadro RTX 6000"],
)
def test_the_article_is_the_one_that_is_spoken(said):
    gpu = said.split(" ", 1)[1]
    assert f" tokens on {said}: " in text(drawn(gpu, "data sheet", "llama-3-8b"), "title")
