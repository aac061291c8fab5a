"""A micro-batch that runs out of memory halfway is repeated, and adds its part once."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import batch, tiny_model  # noqa: E402

from colab_qlora.activations.runtime import LESS_BUDGET  # noqa: E402
from colab_qlora.layers import decoder_layer  # noqa: E402
from colab_qlora.models.adapters import set_gradient_checkpointing  # noqa: E402
from colab_qlora.models.fuse import fuse  # noqa: E402
from colab_qlora.models.smart import runtime_of  # noqa: E402
from colab_qlora.training.micro_batch import MOST_TRIES, with_less_memory  # noqa: E402


def smart_model(**lora: Any) -> Any:
    model = tiny_model("llama", torch.float32, **lora)
    fuse(model)
    set_gradient_checkpointing(model, "smart")
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Fails:
    """Raises out of memory at given calls of the function that it stands in for."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, at: set[int]) -> None:
        self.calls, self.at, self.function = 0, at, getattr(decoder_layer, name)
        patch.setattr(decoder_layer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("name", ["attention_half", "mlp_half_backward", "attention_half_backward"])
@pytest.mark.parametrize("at", [{1}, {2}, {3}, {2, 4}, {3, 5}])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_of_an_undisturbed_run(
    monkeypatch: pytest.MonkeyPatch, name: str, at: set[int], dropout: float
) -> None:
    def run(fails: bool) -> tuple[dict[str, torch.Tensor], list[float], list[str]]:
        model, lines, losses = smart_model(lora_dropout=dropout), [], []
        torch.manual_seed(5)
        for micro_batch in range(3):

            def step() -> float:
                loss = model(**batch()).loss
                loss.backward()
                return float(loss.detach())

            with monkeypatch.context() as patch:
                if fails and micro_batch == 1:
                    Fails(patch, name, at)
                losses.append(with_less_memory(model, step, lines.append))
        if fails:
            assert runtime_of(model).share == pytest.approx(LESS_BUDGET ** len(at))
        return gradients(model), losses, lines

    (want, losses, quiet), (got, repeated, lines) = run(False), run(True)
    assert not quiet
    assert len(lines) == len(at)
    assert all("out of memory (CUDA out of memory)" in line for line in lines)
    assert "planning again with 90% of the memory" in lines[0]
    assert repeated == losses
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_it_gives_up_at_the_floor_and_after_many_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines = smart_model(), []

    def step() -> None:
        model(**batch()).loss.backward()

    with monkeypatch.context() as patch:
        fails = Fails(patch, "mlp_half", set(range(1, 1000)))
        with pytest.raises(torch.OutOfMemoryError):
            with_less_memory(model, step, lines.append)
        assert fails.calls == len(lines) + 1 == MOST_TRIES + 1
    model, lines = smart_model(), []
    runtime_of(model).is_at_floor = True
    with monkeypatch.context() as patch:
        Fails(patch, "mlp_half", {1})
        with pytest.raises(torch.OutOfMemoryError):
            with_less_memory(model, step_of(model), lines.append)
    assert not lines


def step_of(model: Any) -> Any:
    return lambda: model(**batch()).loss.backward()


def test_other_errors_and_models_without_a_planner_pass_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = smart_model()

    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        with_less_memory(model, broken, print)
    set_gradient_checkpointing(model, True)
    assert runtime_of(model) is None
    with monkeypatch.context() as patch:
        Fails(patch, "mlp_half", {random.choice([1, 2, 3])})
        with pytest.raises(torch.OutOfMemoryError):
            with_less_memory(model, step_of(model), print)
