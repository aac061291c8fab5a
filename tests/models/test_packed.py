"""Packed documents: found by their positions, they never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from colab_qlora import FastLanguageModel, UserError, restore  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of  # noqa: E402

pytestmark = pytest.mark.model
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (5, 1, 9, 3)


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def packed() -> dict[str, Any]:
    torch.manual_seed(6)
    ids = torch.randint(5, 500, (1, sum(LENGTHS))).to(DEVICE)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
    labels = ids.clone()
    labels[positions == 0] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    # with a cache, which is the default of the config, transformers would not look for documents
    loss = model(**inputs, num_items_in_batch=10, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_packed_is_the_sum_of_the_documents(model: Any) -> None:
    inputs = packed()
    loss, together = gradients(model, inputs)
    state = state_of(model)
    assert state is not None
    bounds = state.last_shape.documents
    assert bounds == ((0, 5), (5, 6), (6, 15), (15, 18))
    assert not state.stock_passes
    losses, summed = [], {name: torch.zeros_like(g) for name, g in together.items()}
    for start, end in bounds:
        ids = inputs["input_ids"][:, start:end]
        one, found = gradients(model, {"input_ids": ids, "labels": ids})
        losses.append(one)
        for name, gradient in found.items():
            summed[name] += gradient
    assert state.last_shape.documents is None
    assert loss == pytest.approx(sum(losses), rel=1e-6)
    assert_close(together, summed)


def test_packed_equals_the_models_own_mask(model: Any) -> None:
    inputs = packed()
    loss, ours = gradients(model, inputs)
    # a layer that has to take its own code gets the same documents as a mask
    handle = fused_layers(model)[1].mlp.register_forward_hook(lambda *args: None)
    mixed, half = gradients(model, inputs)
    handle.remove()
    restore(model)
    stock, theirs = gradients(model, inputs)
    assert loss == pytest.approx(stock, rel=1e-6)
    assert mixed == pytest.approx(stock, rel=1e-6)
    assert_close(ours, theirs)
    assert_close(half, theirs)


def test_plain_positions_are_no_documents(model: Any) -> None:
    ids = packed()["input_ids"].repeat(2, 1)
    positions = torch.arange(ids.shape[1], device=DEVICE)[None]
    model(input_ids=ids, position_ids=positions, labels=ids)
    state = state_of(model)
    assert state is not None and state.last_shape.documents is None


def test_a_sequence_beyond_the_models_positions_is_refused(model: Any) -> None:
    ids = torch.zeros((1, 513), dtype=torch.long, device=DEVICE)
    with pytest.raises(UserError, match=r"got input_ids of 513 tokens; allowed: up to 512 tokens"):
        model(input_ids=ids, labels=ids)
    positions = torch.arange(513, device=DEVICE).remainder(300)[None]
    assert torch.isfinite(model(input_ids=ids, position_ids=positions, labels=ids).loss)
