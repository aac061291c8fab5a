"""LoRA's parameters counted, and drawn."""

from __future__ import annotations

import pytest
from llama_helpers import adapt

from colab_qlora.errors import UserError
from colab_qlora.teaching import (
    LoraRow,
    describe_lora_shapes,
    draw_lora_shapes,
    format_lora_table,
    lora_table,
)


def brute_force(model, module=None):
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" in name and (module is None or f".{module}." in name)
    )


def test_rows_count_what_the_parameters_hold(adapted):
    rows = lora_table(adapted)
    assert [row.module for row in rows] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    for row in rows:
        assert row.lora_parameters == brute_force(adapted, row.module)
        assert row.lora_parameters == row.count * row.rank * (row.in_features + row.out_features)
        assert row.base_parameters == row.count * row.in_features * row.out_features
        assert row.count == 2 and row.rank == 8
    assert rows[1] == LoraRow("k_proj", 2, 128, 64, 8, 2 * 128 * 64, 2 * 8 * 192)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(row.lora_parameters for row in rows) == trainable


def test_different_ranks_are_different_rows(quantised):
    model = adapt(
        quantised, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 4}
    )
    assert [(row.rank, row.count) for row in lora_table(model)] == [(8, 1), (4, 1)]
    assert sum(row.lora_parameters for row in lora_table(model)) == brute_force(model)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_variants_of_lora_add_is_counted(quantised, option):
    model = adapt(quantised, **{option: True})
    assert sum(row.lora_parameters for row in lora_table(model)) == brute_force(model)


def test_only_the_active_adapter_counts(quantised):
    from peft import LoraConfig

    model = adapt(quantised, target_modules=["q_proj", "v_proj"])
    one = brute_force(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert sum(row.lora_parameters for row in lora_table(model)) == one
    model.set_adapter("second")
    rows = lora_table(model)
    assert [(row.module, row.rank, row.lora_parameters) for row in rows] == [
        ("q_proj", 2, 2 * 2 * 256)
    ]


def test_a_model_without_adapters_is_refused(quantised):
    with pytest.raises(UserError, match="no LoRA adapters.*get_peft_model"):
        lora_table(quantised)


def test_table_lines_up_and_totals(adapted, capsys):
    rows = lora_table(adapted)
    lines = format_lora_table(rows, adapted).splitlines()
    assert len({len(line.rstrip()) for line in lines[:-1]}) == 1
    added, base = sum(r.lora_parameters for r in rows), sum(r.base_parameters for r in rows)
    assert f"{added:,}" in lines[-2] and f"{base:,}" in lines[-2] and lines[-2].startswith("all")
    adapted.print_trainable_parameters()
    words = capsys.readouterr().out
    assert f"{added:,}" in words
    share = float(words.rsplit(" ", 1)[-1])
    assert lines[-1].endswith(f"{share / 100:.2%}")
    alone = format_lora_table(rows).splitlines()[-1]
    assert alone.endswith(f"{added / base:.2%}") and f"{base:,}" in alone


def _boxes(fig):
    fig.canvas.draw()
    return {p.get_gid(): p.get_window_extent() for p in fig.patches if p.get_gid()} | {
        artist.get_gid(): artist.get_window_extent() for artist in fig.artists if artist.get_gid()
    }


def test_rectangles_are_to_scale_where_they_can_be(assert_readable):
    fig = draw_lora_shapes(1024, 512, 128, "k_proj")
    assert_readable(fig)
    boxes = _boxes(fig)
    w, a, b = boxes["W"], boxes["A"], boxes["B"]
    assert w.width / w.height == pytest.approx(2, rel=0.03)
    assert a.width == pytest.approx(w.width) and b.height == pytest.approx(w.height)
    assert a.height == pytest.approx(w.width / 8, rel=0.03)
    assert b.width == pytest.approx(a.height)
    assert not [text for text in fig.texts if text.get_gid() == "caption"]


def test_a_thin_matrix_is_thickened_and_the_caption_says_so(assert_readable):
    fig = draw_lora_shapes(4096, 4096, 16, "q_proj")
    assert_readable(fig)
    boxes = _boxes(fig)
    assert boxes["A"].height >= 6 and boxes["B"].width >= 6
    (caption,) = [text.get_text() for text in fig.texts if text.get_gid() == "caption"]
    true_px = boxes["W"].width * 16 / 4096
    assert f"{boxes['A'].height / true_px:.0f} times" in caption
    labels = " ".join(text.get_text() for text in fig.texts)
    assert "16,777,216 parameters" in labels and labels.count("65,536 parameters") == 2
    assert "frozen, 4-bit" in labels and "131,072 parameters, 0.78%" in labels


@pytest.mark.parametrize(
    "sizes",
    [(4096, 14336, 16), (14336, 4096, 64), (14336, 256, 4), (64, 64, 64), (1, 1, 1), (8, 16384, 1)]
    + [(152064, 8192, 256)],
)
def test_any_shape_is_readable(assert_readable, sizes):
    fig = draw_lora_shapes(*sizes, "model.layers.12.mlp.down_proj")
    assert_readable(fig)
    boxes = list(_boxes(fig).values())
    assert all(box.x1 <= 800 for box in boxes)
    for one, other in zip(boxes, boxes[1:], strict=False):
        assert one.x1 < other.x0


def test_w_is_hatched(assert_readable):
    patches = {a.get_gid(): a for a in draw_lora_shapes(64, 64, 8).findobj() if a.get_gid()}
    assert patches["W"].get_hatch() and not patches["A"].get_hatch()


def test_words_carry_the_numbers():
    text = describe_lora_shapes(4096, 14336, 16, "up_proj")
    for number in ("58,720,256", "16 x 4,096", "14,336 x 16", "294,912", "0.50%", "up_proj"):
        assert number in text
    with pytest.raises(UserError, match="rank is not a size: got 0"):
        describe_lora_shapes(64, 64, 0)
    with pytest.raises(UserError, match="in_features"):
        draw_lora_shapes(0, 64, 8)
