"""NF4: the levels, the round trip, one weight before and after, and their pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from llama_helpers import DEVICE, adapt, load_4bit, save_llama

from colab_qlora.errors import UserError
from colab_qlora.teaching import (
    describe_nf4_levels,
    describe_weight_histogram,
    draw_nf4_levels,
    draw_weight_histogram,
    nf4_levels,
    nf4_round_trip,
    weight_before_and_after,
)
from colab_qlora.teaching.nf4_pictures import _typical_block

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_levels_are_those_of_the_paper():
    levels = nf4_levels()
    assert levels.shape == (16,) and levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert levels[0] == -1 and levels[-1] == 1 and levels[7] == 0
    # arXiv 2305.14314, appendix E
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343]
    published += [-0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983]
    published += [0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(levels, torch.tensor(published), atol=1e-6, rtol=0)


def test_levels_are_quantiles_of_a_normal_distribution():
    from statistics import NormalDist

    offset = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    torch.testing.assert_close(nf4_levels(), expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_of_normal_weights_errs_by_9_percent(dtype):
    torch.manual_seed(0)
    weight = torch.randn(256, 1024, device=DEVICE).to(dtype)
    decoded = nf4_round_trip(weight)
    assert decoded.shape == weight.shape and decoded.dtype == dtype
    assert decoded.device == weight.device
    error = (decoded.float() - weight.float()).norm() / weight.float().norm()
    assert 0.088 < error < 0.096


def test_larger_blocks_err_more_and_double_quantisation_hardly():
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)

    def error(**options):
        return float((nf4_round_trip(weight, **options) - weight).norm() / weight.norm())

    assert error(block_size=64) < error(block_size=256) < error(block_size=4096)
    single = error(double_quant=False)
    assert single < error() < 1.01 * single


def test_round_trip_only_gives_levels_times_absmax():
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    decoded = nf4_round_trip(weight, double_quant=False)
    scaled = decoded / weight.abs().amax(dim=1, keepdim=True)
    assert (scaled[..., None] - nf4_levels()).abs().amin(-1).max() < 1e-6
    torch.testing.assert_close(nf4_round_trip(decoded, double_quant=False), decoded)


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 2), (5, 7), (3, 4, 5)])
def test_round_trip_keeps_odd_shapes(shape):
    assert nf4_round_trip(torch.randn(shape)).shape == shape


def test_round_trip_refuses_what_bitsandbytes_cannot_do():
    with pytest.raises(UserError, match=r"int64.*weight\.float\(\)"):
        nf4_round_trip(torch.arange(64))
    with pytest.raises(UserError, match="got 48; allowed: 32, 64"):
        nf4_round_trip(torch.randn(64), block_size=48)
    with pytest.raises(UserError, match="at least one weight"):
        nf4_round_trip(torch.randn(0, 64))


@pytest.mark.parametrize("module", [Q_PROJ, "model.layers.1.mlp.down_proj"])
def test_pair_is_the_checkpoint_and_its_round_trip(llama_folder, quantised, module):
    from safetensors.torch import load_file

    pair = weight_before_and_after(quantised, module)
    stored = load_file(llama_folder / "model.safetensors")[f"{module}.weight"]
    assert pair.name == module and pair.shape == tuple(stored.shape)
    assert pair.before is not None and pair.before.dtype == torch.bfloat16
    assert torch.equal(pair.before, stored)
    assert torch.equal(pair.after, nf4_round_trip(stored.to(DEVICE)).cpu())
    expected = (pair.after.float() - stored.float()).norm() / stored.float().norm()
    assert pair.relative_error == pytest.approx(float(expected))
    assert 0.085 < pair.relative_error < 0.1
    assert pair.block_size == 64


def test_bits_per_weight_are_4_127(quantised):
    pair = weight_before_and_after(quantised, "model.layers.0.mlp.up_proj")
    blocks = 320 * 128 // 64
    assert pair.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 * -(-blocks // 256) / (320 * 128))
    assert 4.126 < pair.bits_per_weight < 4.13


def test_pair_of_an_adapted_model_is_the_base_weight(llama_folder, quantised):
    bare = weight_before_and_after(quantised, Q_PROJ)
    adapted = adapt(quantised)
    for name in (Q_PROJ, f"base_model.model.{Q_PROJ}", f"base_model.model.{Q_PROJ}.base_layer"):
        pair = weight_before_and_after(adapted, name)
        assert pair.name == Q_PROJ
        assert torch.equal(pair.after, bare.after) and torch.equal(pair.before, bare.before)


def test_a_sharded_checkpoint_is_read_too(llama_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama_folder / "model.safetensors")
    where = {name: f"model-{len(name) % 2}.safetensors" for name in tensors}
    for file in set(where.values()):
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    pair = weight_before_and_after(load_4bit(tmp_path), Q_PROJ)
    assert torch.equal(pair.before, tensors[f"{Q_PROJ}.weight"])


def test_before_is_none_where_the_checkpoint_is_quantised(quantised, tmp_path):
    quantised.save_pretrained(tmp_path)
    again = load_4bit(tmp_path, quantize=False)
    pair = weight_before_and_after(again, Q_PROJ)
    assert pair.before is None and pair.relative_error is None
    assert torch.equal(pair.after, weight_before_and_after(quantised, Q_PROJ).after)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "someone/no-such-model", "", None])
def test_before_is_none_where_the_checkpoint_is_gone(quantised, name):
    quantised.config._name_or_path = name
    pair = weight_before_and_after(quantised, Q_PROJ)
    assert pair.before is None and pair.after.shape == (128, 128)


def test_decoding_survives_what_generation_does_to_the_weights(quantised):
    # with AVX512-BF16, bitsandbytes packs the weights anew when it first computes without gradients
    before = weight_before_and_after(quantised, Q_PROJ)
    quantised.eval()
    with torch.no_grad():
        ids = torch.arange(8, device=DEVICE)[None]
        first = quantised(input_ids=ids).logits
        after = weight_before_and_after(quantised, Q_PROJ)
        second = quantised(input_ids=ids).logits
    # the absmax values are bfloat16 then
    torch.testing.assert_close(after.after.float(), before.after.float(), atol=0, rtol=2**-7)
    assert torch.equal(first, second)
    assert 4.12 < after.bits_per_weight < 4.26


def test_unknown_layers_are_refused_with_names_to_choose_from(llama_folder, quantised):
    with pytest.raises(UserError, match=r"no such layer.*one of 14 layers: model\.layers\.0"):
        weight_before_and_after(quantised, "q_proj")
    with pytest.raises(UserError, match="not kept in 4 bits"):
        weight_before_and_after(quantised, "lm_head")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama_folder)
    with pytest.raises(UserError, match="no 4-bit layer.*load_in_4bit=True"):
        weight_before_and_after(plain, Q_PROJ)


def test_pictures_are_readable(quantised, assert_readable):
    assert_readable(draw_nf4_levels())
    for module in (Q_PROJ, "model.layers.1.mlp.down_proj"):
        assert_readable(draw_weight_histogram(weight_before_and_after(quantised, module)))
    quantised.config._name_or_path = ""
    assert_readable(draw_weight_histogram(weight_before_and_after(quantised, Q_PROJ)))


def test_histograms_share_their_bins_and_hold_the_weights(quantised):
    pair = weight_before_and_after(quantised, Q_PROJ)
    before, after, block = draw_weight_histogram(pair).axes
    assert before.get_xlim() == after.get_xlim() and before.get_ylim() == after.get_ylim()
    steps = [ax.patches[0].get_data() for ax in (before, after)]
    assert np.array_equal(steps[0].edges, steps[1].edges)
    for step in steps:
        assert 99 < step.values.sum() <= 100.01
    zeros = 100 * float((pair.after == 0).float().mean())
    assert steps[1].values[70] >= zeros - 1e-3 and steps[1].values.argmax() == 70
    assert block.get_xlim()[0] < -1 < 1 < block.get_xlim()[1]


def test_the_block_moves_each_weight_to_its_nearest_level(quantised):
    before, after, absmax = _typical_block(weight_before_and_after(quantised, Q_PROJ))
    levels = nf4_levels().numpy()
    assert before.shape == after.shape == (64,) and np.abs(before).max() == 1 and absmax > 0
    gaps = np.abs(after[:, None] - levels)
    assert gaps.min(axis=1).max() < 0.005  # bfloat16 rounds the decoded weights
    nearest = np.abs(before[:, None] - levels).argmin(axis=1)
    assert (gaps.argmin(axis=1) == nearest).mean() > 0.96


def test_zero_weights_are_drawn_too(tmp_path, assert_readable):
    import dataclasses

    folder = save_llama(tmp_path)
    pair = weight_before_and_after(load_4bit(folder), Q_PROJ)
    one = torch.zeros_like(pair.before)
    one[0, 0] = 1
    pair = dataclasses.replace(pair, before=one, after=one.clone(), relative_error=0.0)
    assert_readable(draw_weight_histogram(pair))


def test_words_carry_the_numbers(quantised):
    text = describe_nf4_levels()
    assert "16 levels from -1 to 1: 7 below 0" in text and "0.080" in text and "0.304" in text
    pair = weight_before_and_after(quantised, Q_PROJ)
    text = describe_weight_histogram(pair)
    assert f"{pair.relative_error:.1%}" in text and "128 x 128" in text and "4.1" in text
    span = 3.5 * float(pair.before.float().std())
    beyond = float((pair.after.float().abs() > span).float().mean())
    said = f"ends at {span:.2g} on both sides and leaves out {beyond:.1%} of them"
    assert said in text
    (label,) = draw_weight_histogram(pair).findobj(lambda artist: artist.get_gid() == "beyond")
    assert f"{beyond:.1%}" in label.get_text()
    quantised.config._name_or_path = ""
    text = describe_weight_histogram(weight_before_and_after(quantised, Q_PROJ))
    assert "not known" in text and "None" not in text
