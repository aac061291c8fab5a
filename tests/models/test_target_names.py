"""Names of LoRA targets that a model has under another name."""

from __future__ import annotations

import pytest

from colab_qlora.models.target_names import targets_of_model

LLAMA = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "o_proj")]
PHI = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj", "head.o_proj"]


def test_a_model_that_has_the_names_keeps_them() -> None:
    assert targets_of_model(["q_proj", "k_proj"], LLAMA) == (["q_proj", "k_proj"], {})


def test_one_linear_stands_for_all_that_it_computes_in_the_order_asked_for() -> None:
    wanted = ["up_proj", "v_proj", "o_proj", "q_proj"]
    targets, beyond = targets_of_model(wanted, PHI)
    assert targets == ["gate_up_proj", "qkv_proj", "o_proj"]
    # the adapters of both compute more than was asked for
    assert beyond == {"gate_up_proj": ["up_proj"], "qkv_proj": ["v_proj", "q_proj"]}


def test_all_that_a_linear_computes_is_no_more_than_was_asked_for() -> None:
    wanted = ["q_proj", "k_proj", "v_proj", "up_proj"]
    assert targets_of_model(wanted, PHI) == (
        ["qkv_proj", "gate_up_proj"],
        {"gate_up_proj": ["up_proj"]},
    )


def test_full_names_stay_in_their_layer() -> None:
    asked = "model.layers.0.self_attn.k_proj"
    assert targets_of_model([asked], PHI)[0] == ["model.layers.0.self_attn.qkv_proj"]
    unknown = "model.layers.9.self_attn.k_proj"
    assert targets_of_model([unknown], PHI) == ([unknown], {})


@pytest.mark.parametrize("name", ["query", "qkv", "lm_head"])
def test_unknown_names_are_left_for_the_error(name: str) -> None:
    assert targets_of_model([name], PHI) == ([name], {})


def test_nothing_is_twice() -> None:
    assert targets_of_model(["qkv_proj", "q_proj"], PHI) == (["qkv_proj"], {})
