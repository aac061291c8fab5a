"""Models with hand-made rungs and prices to report on, and what a readable picture is."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import torch
from tiny_llama import LINEARS, frozen, tiny_llama

from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import INT8, NF4_32, NF4_64, RUNGS, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.dynamic import DynamicQuantization, MapChange
from colab_qlora.quantization.placing import place
from colab_qlora.quantization.precision_map import Placement, PrecisionMap
from colab_qlora.quantization.report import quantization_report
from colab_qlora.quantization.rung_prices import RungPrice

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
FUSED = {"self_attn.qkv_proj": (960, 576), "mlp.gate_up_proj": (3072, 576)}
RELATIVE = {NF4_64: 1.0, NF4_32: 0.88, INT8: 0.011, SIXTEEN_BIT: 0.0}


def placed(shape, rung, price, plain=NF4_64, why="promoted: saves much"):
    return Placement(
        rung,
        rung_bytes(shape, rung),
        price * RELATIVE[rung],
        plain,
        rung_bytes(shape, plain),
        price * RELATIVE[plain],
        why,
    )


def model_of(placements, history=(), *, has_data=True, budget="+5%", prices=None, name="a/model"):
    """An object with a state as `quantize_dynamically` leaves it on a model."""
    found = prices or {}
    state = DynamicQuantization(
        PrecisionMap(placements, 10**9),
        found,
        10**9,
        {},
        lambda name: torch.zeros(0),
        torch.float32,
        budget,
        has_data,
        list(history),
        name,
    )
    return SimpleNamespace(colab_qlora_quantization=state)


def llama_report(layers=30, shapes=SHAPES, changes=0, seed=0, **options):
    """Rungs at random, the embedding on int8, prices over three decades."""
    rng = random.Random(seed)
    placements = {"model.embed_tokens": placed((49152, 576), INT8, 1e-6, SIXTEEN_BIT)}
    for layer, (kind, shape) in itertools.product(range(layers), shapes.items()):
        name = f"model.layers.{layer}.{kind}"
        placements[name] = placed(shape, rng.choice(RUNGS), 10 ** rng.uniform(-7, -4))
    placements["lm_head"] = placed((49152, 576), SIXTEEN_BIT, 0.0, SIXTEEN_BIT)
    linears = list(placements)[1:-1]
    history = [
        MapChange(10 * i, rng.choice(linears), NF4_64, INT8, 1000 * (-1) ** i, "because")
        for i in range(changes)
    ]
    return quantization_report(model_of(placements, history, **options))


def assert_readable(fig):
    """800 px wide, text of 11 pt or more, inside, and none on another."""
    from matplotlib.text import Text

    fig.canvas.draw()
    width, height = fig.get_size_inches() * fig.dpi
    assert round(width) == 800
    boxes = [(t, t.get_window_extent()) for t in fig.findobj(Text) if t.get_text().strip()]
    for text, box in boxes:
        assert text.get_fontsize() >= 11, text.get_text()
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
        assert box.x1 <= width and box.y1 <= height, text.get_text()
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        clash = a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
        assert not clash, (one.get_text(), other.get_text())


def gids(fig, start):
    found = [artist.get_gid() for artist in fig.get_children()]
    return [gid for gid in found if gid and gid.startswith(start)]


def small_report():
    """Two linears and an embedding, of prices that are easily added up."""
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    placements = {
        "model.embed_tokens": placed((1000, 64), INT8, 0.0, SIXTEEN_BIT, "stays"),
        up: placed((256, 64), INT8, 4.0),
        down: placed((64, 256), NF4_64, 1.0, why="stays: nothing saves more"),
    }
    prices = {up: {NF4_64: RungPrice((), 4.0, 7.5), INT8: RungPrice((), 0.044, 0.5)}}
    history = [MapChange(30, up, NF4_32, INT8, 5000, f"promoted for {down}: saves")]
    return quantization_report(model_of(placements, history, prices=prices))


def nf4_llama():
    """A tiny Llama with plain NF4 linears, and its 16-bit weights by name."""
    model = tiny_llama(dtype=torch.float32)
    weights = {item.name: item.weight.detach().clone() for item in weight_items(model)}
    for item in weight_items(model):
        if item.name in LINEARS:
            weight = weights[item.name]
            place(model, item, NF4_64, weight, compute_dtype=torch.float32, search=False)
    return frozen(model), weights
