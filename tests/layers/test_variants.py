"""Adapters of every kind: inside the fused GEMM where that is exact, else that module alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_helpers import (
    DEVICE,
    batch,
    largest_error,
    loss_and_gradients,
    tiny_model,
    true_loss_and_gradients,
)
from peft import LoraConfig

from colab_qlora.layers.linear import read_linear
from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT
from colab_qlora.models.describe import describe
from colab_qlora.models.fuse import fuse, restore, state_of


def check(model: Any, inputs: dict[str, Any]) -> None:
    """Fused loss and gradients are those of the model's own code, with all and nothing kept."""
    truth, expected = true_loss_and_gradients(model, inputs)
    state = fuse(model)
    for plan in (KEEP_ALL, KEEP_INPUT):
        state.plan = plan
        loss, gradients = loss_and_gradients(model, inputs)
        assert float(loss) == pytest.approx(float(truth), rel=1e-12)
        assert largest_error(gradients, expected) < 1e-9
    assert not state.stock_passes


def first(model: Any, name: str) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith("layers.0." + name))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"r": 1},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["k_proj", "down_proj"]},
        {"rank_pattern": {"layers.1.self_attn.v_proj": 5}, "alpha_pattern": {"up_proj": 2}},
    ],
)
def test_adapters_inside_the_gemm(lora: dict[str, Any]) -> None:
    model = tiny_model(**lora)
    check(model, batch("right"))
    assert "called as it is" not in str(describe(model))


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "variant of LoRA (DoraLinearVariant)"),
        ({"lora_bias": True, "bias": "lora_only"}, "its adapter has a bias"),
    ],
)
def test_variants_are_called_as_they_are(lora: dict[str, Any], reason: str) -> None:
    family = "llama_biases" if "lora_bias" in lora else "llama"
    model = tiny_model(family, **lora)
    check(model, batch())
    assert reason in str(describe(model))


@pytest.mark.parametrize(
    "name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
def test_one_watched_module_is_called_and_its_hook_fires(name: str) -> None:
    model = tiny_model()
    seen: list[tuple[int, ...]] = []
    module = first(model, name)
    module.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    check(model, batch())
    assert seen
    assert all(shape[:2] == (2, 11) for shape in seen)
    lines = [line for line in str(describe(model)).splitlines() if "it has hooks" in line]
    assert len(lines) == 1


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    model = tiny_model(target_modules=["q_proj", "v_proj"])
    first(model, "mlp.up_proj").weight.requires_grad_(True)
    first(model, "self_attn.q_proj").base_layer.weight.requires_grad_(True)
    check(model, batch())


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_dropout_is_drawn_again_in_the_backward_pass(share: float) -> None:
    """Finite differences of the loss, with one seed, along a random direction."""
    model, inputs = tiny_model(lora_dropout=share), batch()
    state = fuse(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    direction = [torch.randn_like(p) for p in trained]
    for plan in (KEEP_ALL, KEEP_INPUT):
        state.plan = plan
        torch.manual_seed(9)
        loss_and_gradients(model, inputs)
        along = sum(float((p.grad * d).sum()) for p, d in zip(trained, direction, strict=True))
        step, losses = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(trained, direction, strict=True):
                    p.add_(d, alpha=sign * step)
            torch.manual_seed(9)
            losses.append(float(model(**inputs).loss.detach()))
            with torch.no_grad():
                for p, d in zip(trained, direction, strict=True):
                    p.sub_(d, alpha=sign * step)
        assert along == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_dropout_drops_its_share_and_only_in_training() -> None:
    from colab_qlora.layers.lora_dropout import drop

    x = torch.ones(400, 50, dtype=torch.float64, device=DEVICE)
    dropped = drop(x, 0.3, seed=7)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(dropped, drop(x, 0.3, seed=7))
    assert not torch.equal(dropped, drop(x, 0.3, seed=8))
    model, inputs = tiny_model(lora_dropout=0.5), batch()
    fuse(model)
    assert model(**inputs).loss != model(**inputs).loss
    model.eval()
    with torch.no_grad():
        assert model(**inputs).loss == model(**inputs).loss
    assert read_linear("q_proj", first(model, "self_attn.q_proj")).blocks[0].dropout == 0


def test_adapters_are_switched_disabled_and_merged_by_peft() -> None:
    model, inputs = tiny_model(), batch()
    second = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.double()
    fuse(model)

    def compare() -> float:
        loss, gradients = loss_and_gradients(model, inputs)
        restore(model)
        truth, expected = true_loss_and_gradients(model, inputs)
        fuse(model)
        assert float(loss) == pytest.approx(float(truth), rel=1e-12)
        assert largest_error(gradients, expected) < 1e-9
        return float(truth)

    one = compare()
    model.set_adapter("second")
    two = compare()
    model.base_model.set_adapter(["default", "second"])
    both = compare()
    assert len({one, two, both}) == 3
    model.base_model.set_adapter("default")
    model.eval()

    def evaluated() -> float:
        with torch.no_grad():
            return float(model(**inputs, use_cache=False, skip_logits=True).loss)

    with model.disable_adapter():
        without = evaluated()
    before = evaluated()
    model.merge_adapter()
    merged = evaluated()
    model.unmerge_adapter()
    state = state_of(model)
    assert state is not None
    assert not state.stock_passes
    restore(model)
    with model.disable_adapter():
        assert without == pytest.approx(evaluated(), rel=1e-6)
    assert before == pytest.approx(evaluated(), rel=1e-6)
    assert before == pytest.approx(one, rel=1e-6)
    assert merged == pytest.approx(before, rel=1e-9)
    assert without not in (one, two, both)


@pytest.mark.parametrize("where", ["mlp_half.glu_forward", "mlp_half.glu_backward"])
def test_out_of_memory_inside_a_step_leaves_the_model_usable(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, inputs = tiny_model(), batch("right")
    _, expected = true_loss_and_gradients(model, inputs)
    fuse(model)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(f"colab_qlora.layers.{where}", full)
        with pytest.raises(torch.OutOfMemoryError):
            loss_and_gradients(model, inputs)
    _, gradients = loss_and_gradients(model, inputs)
    assert largest_error(gradients, expected) < 1e-9


def test_eight_bit_linears_are_called_as_they_are() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, inputs = tiny_model(dtype=torch.float32), batch()
    attention = model.get_base_model().model.layers[0].self_attn
    base = attention.q_proj.base_layer
    eight = bitsandbytes.nn.Linear8bitLt(
        base.in_features, base.out_features, bias=False, has_fp16_weights=False
    )
    eight.weight = bitsandbytes.nn.Int8Params(base.weight.data.cpu(), requires_grad=False)
    eight.to(DEVICE)
    attention.q_proj.base_layer = eight
    loss, gradients = loss_and_gradients(model, inputs)
    fuse(model)
    assert "its base layer is a Linear8bitLt" in str(describe(model))
    fused, found = loss_and_gradients(model, inputs)
    assert float(fused) == pytest.approx(float(loss), rel=1e-5)
    assert largest_error(found, gradients) < 1e-4
