"""Tiny models with int8 modules, their dense twins, and how far the two may be apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_helpers import DEVICE, largest_error, loss_and_gradients, true_loss_and_gradients

from colab_qlora.layers.decode import decode_weights
from colab_qlora.layers.linear import read_linear
from colab_qlora.models.fuse import restore
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear, tie

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def set_base(parent: Any, name: str, module: torch.nn.Module) -> None:
    """Put another base under the adapter, or another linear where there is none."""
    holder = getattr(parent, name)
    if hasattr(holder, "lora_A"):
        holder.base_layer = module
    else:
        setattr(parent, name, module)


def bases(model: Any, names: tuple[str, ...] = ALL) -> Any:
    """(parent, name, base) of the decoder layers' linears."""
    for layer in model.get_base_model().model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in names:
                holder = getattr(parent, name, None)
                if holder is not None:
                    yield parent, name, getattr(holder, "base_layer", holder)


def with_int8(model: Any, names: tuple[str, ...] = ALL) -> Any:
    for parent, name, base in list(bases(model, names)):
        set_base(parent, name, Int8Linear.from_weight(base.weight, base.bias))
    return model


def with_int8_head(model: Any, *, is_tied: bool = False, bias: bool = False) -> Any:
    causal = model.get_base_model()
    if bias:
        causal.lm_head.bias = torch.nn.Parameter(torch.randn(101).to(causal.lm_head.weight)[:])
        causal.lm_head.bias.requires_grad_(False)
    table = causal.model.embed_tokens
    causal.lm_head = Int8Linear.from_weight(causal.lm_head.weight, causal.lm_head.bias)
    causal.model.embed_tokens = Int8Embedding.from_weight(table.weight, table.padding_idx)
    if is_tied:
        tie(causal.model.embed_tokens, causal.lm_head)
    return model


def dense_twin(model: Any, dtype: torch.dtype) -> Any:
    """The same model, not fused, with every int8 module decoded to a dense one of `dtype`."""
    twin = restore(copy.deepcopy(model)).to(dtype)
    for parent in list(twin.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Int8Linear):
                dense: Any = torch.nn.Linear(1, 1, module.bias is not None)
                dense.in_features, dense.out_features = module.in_features, module.out_features
                dense.bias = module.bias
            elif isinstance(module, Int8Embedding):
                dense = torch.nn.Embedding(1, 1)
                dense.num_embeddings, dense.padding_idx = module.num_embeddings, module.padding_idx
                dense.embedding_dim = module.embedding_dim
            else:
                continue
            dense.weight = torch.nn.Parameter(module.decoded(dtype), requires_grad=False)
            setattr(parent, name, dense)
    return twin


def check_float64(model: Any, inputs: dict[str, Any]) -> None:
    """The fused model against its dense twin, both in float64."""
    truth, expected = true_loss_and_gradients(dense_twin(model, torch.float64), inputs)
    loss, gradients = loss_and_gradients(model, inputs)
    assert float(loss) == pytest.approx(float(truth), rel=1e-12)
    assert largest_error(gradients, expected) < 1e-9


def check_half(model: Any, rows: int, length: int) -> None:
    """No further from float64 than the dense twin's own code in bfloat16, over some batches.

    What one batch's roundings come to is luck: on either side by a third. The adapters' scale is a
    power of 2 here, since one that is not costs a fused layer a rounding of A, whatever the weight.
    """
    twin, exact = (dense_twin(model, dtype) for dtype in (torch.bfloat16, torch.float64))
    errors: dict[str, list[float]] = {}
    for seed in range(6):
        torch.manual_seed(seed)
        ids = torch.randint(3, 101, (rows, length), device=DEVICE)
        inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": 13}
        truth, expected = true_loss_and_gradients(exact, inputs)
        stock_loss, stock = loss_and_gradients(twin, inputs)
        loss, gradients = loss_and_gradients(model, inputs)
        assert gradients.keys() == expected.keys()
        errors.setdefault("loss", []).append(float((loss - truth) / truth))
        errors.setdefault("stock loss", []).append(float((stock_loss - truth) / truth))
        for name, found in (("gradients", gradients), ("stock gradients", stock)):
            error = [(found[n] - expected[n]).norm() / expected[n].norm() for n in expected]
            errors.setdefault(name, []).extend(map(float, error))
    for name in ("loss", "gradients"):
        ours, theirs = (torch.tensor(errors[n]).norm() for n in (name, f"stock {name}"))
        count = len(errors[name])
        assert ours <= 1.1 * theirs + 2**-9 * count**0.5, name


def four_bit(weight: torch.Tensor, blocksize: int, quant_type: str = "nf4") -> Any:
    bitsandbytes = import_bitsandbytes()
    parameter = bitsandbytes.nn.Params4bit(
        weight.detach().float(),
        requires_grad=False,
        quant_type=quant_type,
        blocksize=blocksize,
        compress_statistics=True,
    )
    return parameter.to(DEVICE)


def linear4bit(weight: torch.Tensor, blocksize: int, quant_type: str = "nf4") -> Any:
    bitsandbytes = import_bitsandbytes()
    rows, columns = weight.shape
    made = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, quant_type=quant_type, compute_dtype=torch.float32
    )
    made.weight = four_bit(weight, blocksize, quant_type)
    return made


def decoded_twin(model: Any) -> Any:
    """The dense twin in float64 of a model with 4-bit linears too."""
    twin = restore(copy.deepcopy(model))
    for parent, name, base in list(bases(twin)):
        part = read_linear(name, base)
        exact = torch.empty(part.out_features, part.in_features, device=DEVICE)
        decode_weights([part], [exact])
        dense = torch.nn.Linear(part.in_features, part.out_features, bias=False, device=DEVICE)
        dense.weight = torch.nn.Parameter(exact, requires_grad=False)
        set_base(parent, name, dense)
    return dense_twin(twin, torch.float64)


def check_mixed(model: Any, inputs: dict[str, Any]) -> float:
    """Fused, in float32, no further from the float64 twin than the same twin in float32."""
    twin = decoded_twin(model)
    truth, expected = true_loss_and_gradients(twin, inputs)
    _, stock = loss_and_gradients(copy.deepcopy(twin).float(), inputs)
    loss, gradients = loss_and_gradients(model, inputs)
    assert float(loss) == pytest.approx(float(truth), rel=1e-6)
    # float32's own error is some 1e-7; a sum in another order may cost as much again, and on a GPU,
    # whose GEMMs split their sums by shape, twice that
    errors = (largest_error(gradients, expected), largest_error(stock, expected))
    assert errors[0] <= (2 if DEVICE == "cpu" else 4) * errors[1] + 2**-22, errors
    return float(loss)
