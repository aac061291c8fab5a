"""A table that waits on the host gives the rows it gave before, and comes back."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import DEVICE, batch, gradients, tiny_model  # noqa: E402

from colab_qlora import FastLanguageModel  # noqa: E402
from colab_qlora.activations.memory_plan import Machine  # noqa: E402
from colab_qlora.activations.this_machine import CPU_PROFILE  # noqa: E402
from colab_qlora.models import host_embedding, smart  # noqa: E402
from colab_qlora.models.adapters import set_gradient_checkpointing  # noqa: E402
from colab_qlora.models.fuse import causal_model, fuse, restore, unfused  # noqa: E402
from colab_qlora.models.host_embedding import (  # noqa: E402
    bring_back,
    compute_device,
    gather_rows,
    is_on_host,
    move_to_host,
    why_not_on_host,
)
from colab_qlora.quantization import merging  # noqa: E402
from colab_qlora.quantization.dynamic import ATTRIBUTE, DynamicQuantization  # noqa: E402

ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU; this machine has none")


@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (0, 4), (3,)])
def test_rows_are_those_of_the_embedding(shape: tuple[int, ...]) -> None:
    table = torch.randn(50, 12).bfloat16()
    ids = torch.randint(0, 50, shape)
    want = torch.nn.functional.embedding(ids, table)
    got = gather_rows(table, ids.to(DEVICE))
    assert got.device.type == DEVICE
    assert torch.equal(got.cpu(), want)


@pytest.mark.skipif(DEVICE != "cpu", reason="a wrong id on a GPU ends the process")
def test_an_id_that_there_is_not_is_an_error() -> None:
    with pytest.raises(IndexError):
        gather_rows(torch.randn(5, 2), torch.tensor([5]))


def test_there_and_back_changes_nothing_else() -> None:
    model, inputs = tiny_model("llama", torch.float32), batch()
    fuse(model)
    want = gradients(model, inputs)
    causal = causal_model(model)
    table = causal.get_input_embeddings()
    names, weight = list(model.state_dict()), table.weight
    move_to_host(causal)
    move_to_host(causal)
    assert is_on_host(table) and isinstance(table, torch.nn.Embedding)
    assert table.weight is weight and weight.device.type == "cpu"
    assert list(model.state_dict()) == names
    got = gradients(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_on_host(causal_model(other).get_input_embeddings())
        assert torch.equal(gradients(other, inputs)["loss"], want["loss"])
    bring_back(causal, torch.device(DEVICE))
    assert type(table) is torch.nn.Embedding and weight.device.type == DEVICE
    got = gradients(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_why_a_table_has_to_stay() -> None:
    assert why_not_on_host(causal_model(tiny_model("llama"))) == ""
    tied = causal_model(tiny_model("llama"))
    tied.lm_head.weight = tied.get_input_embeddings().weight
    assert why_not_on_host(tied) == "the head shares the embedding's weight"
    trained = causal_model(tiny_model("llama"))
    trained.get_input_embeddings().weight.requires_grad_(True)
    assert why_not_on_host(trained) == "the embedding is trained"
    kept = tiny_model("llama", modules_to_save=["lm_head"])
    kept.get_base_model().lm_head.original_module.weight = (
        kept.get_base_model().get_input_embeddings().weight
    )
    assert why_not_on_host(causal_model(kept)) == "the head shares the embedding's weight"
    dynamic = causal_model(tiny_model("llama"))
    setattr(dynamic, ATTRIBUTE, object.__new__(DynamicQuantization))
    assert why_not_on_host(dynamic) == "its precision may change while the model trains"
    adapted = causal_model(tiny_model("llama", target_modules=["embed_tokens", "q_proj"]))
    assert "the embedding is a" in why_not_on_host(adapted)


def test_a_plan_sends_the_table_away_and_inference_brings_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU with the rates of a small GPU, whose memory just misses the table."""
    model, inputs = tiny_model("llama", torch.float32), batch()
    fuse(model)
    want = gradients(model, inputs)
    place = smart._place_of_embedding
    monkeypatch.setattr(smart, "_place_of_embedding", lambda c, d: place(c, torch.device("cuda")))
    rates = replace(CPU_PROFILE, copy_up_bytes_per_s=1e10, copy_down_bytes_per_s=0.0)
    budgets: list[int] = [2**30]
    monkeypatch.setattr(
        smart._MachineNow, "__call__", lambda self, w: Machine(rates, budgets[0], 2**20)
    )
    set_gradient_checkpointing(model, "smart")
    runtime, table = smart.runtime_of(model), causal_model(model).get_input_embeddings()
    assert runtime is not None and runtime.workload.settings.embedding == "either"
    got = gradients(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not is_on_host(table)  # there is room for it
    (plan,) = runtime.plans.values()
    assert plan.step is not None
    lowest = replace(plan.workload, settings=replace(plan.workload.settings, embedding="gpu"))
    budgets[0] = smart_floor(lowest, rates) - table.weight.nbytes // 2
    runtime.lower_budget()
    runtime.share = 1.0
    got = gradients(model, inputs)
    assert is_on_host(table)
    assert runtime.workload.settings.embedding == "host"
    assert torch.equal(got["loss"], want["loss"])
    assert "wait on the host" in str(next(iter(runtime.plans.values())))
    FastLanguageModel.for_inference(model)
    assert not is_on_host(table) and not runtime.plans
    assert runtime.workload.settings.embedding == "either"


def smart_floor(workload: Any, rates: Any) -> int:
    """The least budget that has a plan for a workload, in bytes."""
    from colab_qlora.activations.memory_plan import plan_for

    found = plan_for(workload, Machine(rates, 1, 2**20))
    assert found.error is not None
    return found.error.floor_bytes


def test_rows_come_from_the_host_where_ids_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    causal, asked = causal_model(tiny_model("llama", torch.float32)), []
    move_to_host(causal)
    table, ids = causal.get_input_embeddings(), torch.zeros((2, 3), dtype=torch.long, device="meta")
    rows = torch.empty((2, 3, 4))
    monkeypatch.setattr(host_embedding, "gather_rows", lambda w, i: asked.append((w, i)) or rows)
    assert table(ids) is rows
    assert asked == [(table.weight, ids)]


def test_a_table_that_finds_no_room_stays_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("llama", torch.float32), batch()
    fuse(model)
    causal = causal_model(model)
    want = gradients(model, inputs)["loss"]
    move_to_host(causal)
    with monkeypatch.context() as patch:

        def full(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        patch.setattr(torch.Tensor, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            bring_back(causal, torch.device(DEVICE))
    assert is_on_host(causal.get_input_embeddings())
    assert torch.equal(gradients(model, inputs)["loss"], want)


def test_restoring_brings_it_back_and_measuring_does_not() -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    table = causal_model(model).get_input_embeddings()
    move_to_host(causal_model(model))
    with unfused(model):
        assert is_on_host(table)
    restore(model)
    assert type(table) is torch.nn.Embedding


def test_merging_finds_the_table_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    table = causal_model(model).get_input_embeddings()
    move_to_host(causal_model(model))

    class Stop(Exception):
        pass

    def weights_are_read(given: Any) -> Any:
        assert not is_on_host(table)
        raise Stop

    monkeypatch.setattr(merging, "check_unloadable", lambda given: None)
    monkeypatch.setattr(merging, "MergedWeights", weights_are_read)
    with pytest.raises(Stop):
        merging.merge_16_bit(model)


def test_a_model_computes_where_its_layers_are() -> None:
    model = tiny_model("llama", torch.float32)
    move_to_host(causal_model(model))
    elsewhere = model.to("meta")
    elsewhere.get_base_model().get_input_embeddings().weight = torch.nn.Parameter(
        torch.zeros(101, 4), requires_grad=False
    )
    assert next(elsewhere.parameters()).device.type == "cpu"
    assert compute_device(elsewhere).type == "meta"


def test_a_copied_layer_is_not_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    fuse(model)
    place = smart._place_of_embedding
    monkeypatch.setattr(smart, "_place_of_embedding", lambda c, d: place(c, torch.device("cuda")))
    set_gradient_checkpointing(model, "smart")
    model.enable_input_require_grads()
    whole = len(pickle.dumps(model))
    causal = causal_model(model)
    assert len(pickle.dumps(causal.model.layers[0])) < whole / 2
    assert len(pickle.dumps(causal.get_input_embeddings())) < whole / 2
    runtime = smart.runtime_of(copy.deepcopy(model))
    assert runtime is not None and runtime.workload.settings.embedding == "gpu"


@ON_GPU
def test_the_gpu_gets_the_memory_of_the_table() -> None:
    model = tiny_model("llama", torch.float32)
    causal = causal_model(model)
    causal.resize_token_embeddings(2**16)
    for parameter in causal.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    size, before = causal.get_input_embeddings().weight.nbytes, torch.cuda.memory_allocated()
    move_to_host(causal)
    assert before - torch.cuda.memory_allocated() >= size
