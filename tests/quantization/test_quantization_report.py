"""The quantisation report: its numbers against sums made here, and its words."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
import torch
from report_states import (
    assert_readable,
    gids,
    llama_report,
    model_of,
    nf4_llama,
    placed,
    small_report,
)
from tiny_llama import BATCHES, LINEARS, NAMES, tiny_llama

from colab_qlora.errors import UserError
from colab_qlora.quantization.budget import INT8, NF4_64, SIXTEEN_BIT, Budget, rung_bytes
from colab_qlora.quantization.dynamic import quantize_dynamically
from colab_qlora.quantization.report import place_of, quantization_report
from colab_qlora.quantization.report_words import percent_text, size_text
from colab_qlora.quantization.stored_weights import weight_count


@pytest.fixture
def small():
    return small_report()


def test_rows_say_what_the_map_says(small):
    embedding, up, down = small.rows
    assert (embedding["layer"], embedding["kind"]) == (None, "embed_tokens")
    assert (up["layer"], up["kind"], up["rung"], up["plain_rung"]) == (0, "up_proj", INT8, NF4_64)
    # 32 bits of scale a row of 64
    assert up["bits"] == pytest.approx(8.5)
    assert down["bits"] == pytest.approx(8 * rung_bytes((64, 256), NF4_64) / (64 * 256))
    assert (up["price_before"], up["price_after"]) == (4.0, pytest.approx(0.044))
    assert (up["output_error_before"], up["output_error_after"]) == (7.5, 0.5)
    assert down["output_error_before"] is None
    assert down["why"] == "stays: nothing saves more"


def test_totals_are_the_sums(small):
    linears = 2 * rung_bytes((64, 256), NF4_64)
    now = 1000 * 68 + 256 * 68 + linears // 2
    assert (small.bytes, small.plain_bytes) == (now, 2 * 64000 + linears)
    assert small.added_share == pytest.approx((now - 128000 - linears) / linears)
    assert small.price_before == 5.0
    assert small.price_removed == pytest.approx(1 - 1.044 / 5)
    assert [kind.kind for kind in small.kinds] == ["up_proj", "down_proj", "embed_tokens"]
    assert small.kinds[0].rungs == {INT8: 1}
    assert small.rungs == (NF4_64, INT8)


def test_rows_make_a_data_frame(small):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(small.rows)
    assert frame["bytes"].sum() == small.bytes
    assert frame.groupby("kind")["price_before"].sum()["up_proj"] == 4.0


def test_text_has_totals_kinds_reasons_and_changes(small):
    text = str(small)
    assert text.startswith("a/model: 91.7 KiB of weights where plain NF4 has 141.5 KiB: ")
    assert 'budget was "+5%"' in text.replace("\n", " ")
    assert "fell from 5 to 1.04 nat^2, 79 % removed" in text.replace("\n", " ")
    assert "layer 0 up_proj    nf4_64 -> int8  4 -> 0.044\n      promoted: saves much" in text
    assert "1 change during training: 1 up, 0 down" in text
    # the other weight goes by its short name too
    assert "step 30: layer 0 up_proj nf4_32 -> int8, +4.9 KiB; promoted for layer 1 down" in text
    assert max(map(len, text.splitlines())) <= 100


def test_at_most_twenty_changes_and_ten_weights_are_printed():
    report = llama_report(changes=23)
    lines = str(report).splitlines()
    assert sum(line.startswith("  step ") for line in lines) == 20
    assert lines[-1] == "  and 3 more"
    assert "23 changes during training: 12 up, 11 down" in lines
    prices = [line for line in lines if line.startswith("  ") and " -> " in line]
    assert len(prices) == 10 + 20
    dearest = max(report.weights, key=lambda weight: weight.price_before)
    assert f"layer {dearest.layer} {dearest.kind}" in prices[0]
    assert len(llama_report(changes=20).changes) == 20
    assert "more" not in str(llama_report(changes=20)).splitlines()[-1]


def test_without_data_no_price_is_claimed():
    report = llama_report(2, has_data=False)
    assert "nat" not in str(report)
    assert "says little about the loss" in str(report).replace("\n", " ")
    assert not report.has_data
    assert "measured on your data" in str(llama_report(2))


def test_a_price_that_rose_is_said_so():
    embedding = placed((1000, 64), INT8, 1.0, SIXTEEN_BIT)
    assert "rose from 0 to 0.011 nat^2." in str(
        quantization_report(model_of({"embed": embedding}))
    ).replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "up_proj")),
        ("model.layers.12.self_attn.qkv_proj", (12, "qkv_proj")),
        ("model.layers.0.mlp.experts.5.down_proj", (0, "down_proj")),
        ("transformer.h.7.attn.c_attn", (7, "c_attn")),
        ("lm_head", (None, "lm_head")),
        ("model.embed_tokens", (None, "embed_tokens")),
        ("classifier.head.0", (None, "head.0")),
        ("blocks.4.ff.0.2", (4, "ff.0.2")),
        ("0", (None, "0")),
    ],
)
def test_layer_and_kind_come_from_the_name(name, expected):
    assert place_of(name) == expected


@pytest.mark.parametrize("numbers", [64, 123, 4096, 507 * 63, 576 * 1536, 4096 * 14336])
def test_numbers_of_a_matrix_follow_from_its_bytes(numbers):
    for rung in (NF4_64, SIXTEEN_BIT):
        assert abs(weight_count(rung, rung_bytes((1, numbers), rung)) - numbers) <= 1


def test_sizes_and_shares_have_few_digits():
    sizes = (5, 2048, 1000 * 2**20, 3 * 2**30, 12.34 * 2**20)
    said = ["5 B", "2.0 KiB", "1000 MiB", "3.00 GiB", "12.3 MiB"]
    assert [size_text(size) for size in sizes] == said
    shares = (0.05, -0.63, -0.9968, -1.0, -0.0001, 0)
    assert [percent_text(s) for s in shares] == [
        "+5.0 %",
        "-63 %",
        "-99.7 %",
        "-100 %",
        "0 %",
        "0 %",
    ]


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.counts = [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert not {"src", "href"} & dict(attrs).keys()
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_needs_nothing_else():
    shapes = {"<b>&up_proj": (64, 64)}
    report = llama_report(3, shapes, changes=2)
    page = report._repr_html_()
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.counts["table"] == 3 and "b" not in tags.counts and "script" not in tags.counts
    assert "&lt;b&gt;&amp;up_proj" in page
    assert "http" not in page and "url(" not in page
    # colours of the page, not of the report: only translucent grey is set
    assert "#" not in page.split("</style>")[0]


def test_a_plain_model_has_rungs_and_bytes_and_no_price():
    from peft import LoraConfig, get_peft_model

    model, weights = nf4_llama()
    report = quantization_report(model)
    assert [weight.name for weight in report.weights] == NAMES
    for weight in report.weights:
        rung = NF4_64 if weight.name in LINEARS else SIXTEEN_BIT
        assert (weight.rung, weight.plain_rung) == (rung, rung)
        assert weight.bytes == weight.plain_bytes == rung_bytes(weights[weight.name].shape, rung)
        assert weight.price_before is weight.output_error_after is None
    assert report.added_share == 0 and not report.has_prices
    assert str(report).startswith("15.4 KiB of weights, as plain NF4 has.\n")
    assert report.price_before is report.price_removed is None
    assert "Prices were not measured" in str(report) and 'quantization="dynamic"' in str(report)
    assert_readable(report.draw())
    assert gids(report.draw(), "price ") == []
    adapters = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(model, adapters)
    assert quantization_report(adapted).weights == report.weights


def test_a_model_that_was_made_dynamic():
    model, weights = nf4_llama()
    state = quantize_dynamically(
        model,
        weights.__getitem__,
        BATCHES,
        Budget(share=0.1),
        torch.float32,
        words="+10%",
        say=lambda line: None,
    )
    report = quantization_report(model)
    assert {weight.name: weight.rung for weight in report.weights} == state.map.rungs
    assert report.price_after == math.fsum(p.price for p in state.map.placements.values())
    assert report.bytes == state.map.bytes <= state.cap_bytes
    for weight in report.weights:
        prices = state.prices[weight.name]
        assert weight.output_error_after == prices[weight.rung].output_error
        assert weight.price_before == prices[weight.plain_rung].price
    assert_readable(report.draw())


def test_a_model_without_4_bit_is_refused():
    with pytest.raises(UserError, match=r"no 4-bit weight.*LlamaForCausalLM.*16bit.*load_in_4bit"):
        quantization_report(tiny_llama())
    with pytest.raises(UserError, match="takes a model: got NoneType"):
        quantization_report(None)
