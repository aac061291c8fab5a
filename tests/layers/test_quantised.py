"""4-bit layers: the fused path against the same weights in float64, by torch and by Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_helpers import DEVICE, batch, largest_error, loss_and_gradients, true_loss_and_gradients

from colab_qlora import FastLanguageModel, restore
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.kernels.glu_lora import glu_lora_backward
from colab_qlora.layers import mlp_half
from colab_qlora.layers.decode import decode_weights
from colab_qlora.layers.linear import read_linear
from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT
from colab_qlora.models.fuse import fuse, state_of

pytestmark = pytest.mark.model
BIG = batch(rows=2, length=17)


def four_bit(folder: Path, dtype: str) -> Any:
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype=dtype)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def in_float64(model: Any, folder: Path) -> Any:
    """The same model with every 4-bit weight decoded and everything else widened to float64."""
    other, _ = FastLanguageModel.from_pretrained(
        str(folder), 64, dtype="float32", load_in_4bit=False
    )
    other = FastLanguageModel.get_peft_model(
        other, r=4, use_gradient_checkpointing=False, use_fused_layers=False
    )
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    for name, module in theirs.items():
        if type(module) is torch.nn.Linear and name.endswith("base_layer"):
            part = read_linear(name, ours[name])
            exact = torch.empty(part.out_features, part.in_features, device=DEVICE)
            decode_weights([part], [exact])
            module.weight.data = exact
    other.double()
    wide = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if "base_layer" not in name:
            parameter.data = wide[name].data.double()
    return other


def test_no_further_from_the_truth_than_the_models_own_code(tiny_model_folder: Path) -> None:
    model = four_bit(tiny_model_folder, "bfloat16")
    truth, expected = true_loss_and_gradients(in_float64(model, tiny_model_folder), BIG)
    loss, gradients = loss_and_gradients(model, BIG)
    restore(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        stock_loss = model(**BIG).loss
        model.zero_grad()
        stock_loss.backward()
    stock = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert abs(float(loss - truth)) <= abs(float(stock_loss.detach() - truth)) + 2**-8 * float(
        truth
    )
    assert gradients.keys() == expected.keys()
    ours = torch.tensor([float((gradients[n] - expected[n]).norm()) for n in expected])
    theirs = torch.tensor([float((stock[n] - expected[n]).norm()) for n in expected])
    sizes = torch.tensor([float(expected[n].norm()) for n in expected])
    # 10 % are the luck of the roundings
    assert (ours <= 1.25 * theirs + 2**-8 * sizes).all()
    assert float(ours.norm()) <= 1.1 * float(theirs.norm())


@pytest.mark.skipif(
    not HAS_TRITON or (not is_interpreting() and not torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)
@pytest.mark.parametrize("dtype", ["float32"])
def test_triton_kernels_give_what_the_references_give(tiny_model_folder: Path, dtype: str) -> None:
    model = four_bit(tiny_model_folder, dtype)
    inputs = batch(rows=1, length=9)
    state = state_of(model)
    assert state is not None
    loss, gradients = loss_and_gradients(model, inputs)
    with use_backend("triton"):
        again, from_triton = loss_and_gradients(model, inputs)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert largest_error(from_triton, gradients) < 1e-5
    # on a GPU the kernels are what runs in any case
    assert (
        torch.cuda.is_available()
        or not torch.equal(again, loss)
        or any(not torch.equal(gradients[n], from_triton[n]) for n in gradients)
    ), "both ran the same code"


@pytest.mark.skipif(
    not HAS_TRITON or (not is_interpreting() and not torch.cuda.is_available()),
    reason="needs Triton with a GPU or its interpreter",
)
@pytest.mark.parametrize("plan", [KEEP_ALL, KEEP_INPUT, frozenset({"h0", "gate", "xa_down"})])
def test_mlp_gradients_in_one_kernel_are_those_of_many(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, plan: frozenset[str]
) -> None:
    # float16 is refused on a CPU, where it is slow; the interpreter's bfloat16 is wrong
    model = four_bit(tiny_model_folder, "float32").half()
    state = state_of(model)
    assert state is not None
    state.plan = plan
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return glu_lora_backward(*args, **kwargs)

    monkeypatch.setattr(mlp_half, "glu_lora_backward", counted)
    inputs = batch(rows=1, length=9)

    def scaled_gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with use_backend("triton"):
            (model(**inputs).loss * 2**12).backward()  # out of the range where float16 is zero
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    gradients = scaled_gradients()
    assert len(calls) == 2, "one for each layer"
    monkeypatch.setattr(mlp_half, "can_fuse_glu_lora", lambda *tensors: False)
    expected = scaled_gradients()
    assert len(calls) == 2
    # sums of the same rounded products, in another order; what flows on is bit by bit the same
    for name, want in expected.items():
        error = (gradients[name] - want).double().norm() / (want.double().norm() + 1e-30)
        # off the GPU the GEMM of its own rounds the sum to float16
        assert error < (2e-3 if "mlp" in name else 1e-30), name


def test_fp4_and_dense_linears_stand_side_by_side(tiny_model_folder: Path) -> None:
    import bitsandbytes

    model = four_bit(tiny_model_folder, "float32")
    attention = model.get_base_model().model.layers[0].self_attn
    base = attention.k_proj.base_layer
    weight = torch.randn(base.out_features, base.in_features) / 8
    fp4 = bitsandbytes.nn.Linear4bit(
        base.in_features, base.out_features, bias=False, quant_type="fp4"
    )
    fp4.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="fp4").to(
        DEVICE
    )
    attention.k_proj.base_layer = fp4
    dense = torch.nn.Linear(base.in_features, base.out_features, bias=False).to(DEVICE)
    dense.weight.requires_grad_(False)
    attention.v_proj.base_layer = dense
    kinds = [read_linear(n, getattr(attention, n)).kind for n in ("q_proj", "k_proj", "v_proj")]
    assert kinds == ["nf4", "fp4", "dense"]
    loss, gradients = loss_and_gradients(model, BIG)
    restore(model)
    stock, expected = loss_and_gradients(model, BIG)
    assert float(loss) == pytest.approx(float(stock), rel=1e-5)
    assert largest_error(gradients, expected) < 1e-4
    fuse(model)
