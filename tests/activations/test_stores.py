"""Tensors that travel: what comes back is what left, in an order that needs no waiting."""

from __future__ import annotations

import gc
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import DEVICE, FAMILIES, batch, gradients, tiny_model  # noqa: E402

from colab_qlora.activations.host_pool import HostPool  # noqa: E402
from colab_qlora.activations.model_shape import ModelShape, shape_of  # noqa: E402
from colab_qlora.activations.saved_classes import CLASSES, OFFLOADABLE, names_of  # noqa: E402
from colab_qlora.activations.stores import Copies, CopyLane, OffloadingStore  # noqa: E402
from colab_qlora.models import fused_state  # noqa: E402
from colab_qlora.models.fuse import fuse  # noqa: E402

EVERYTHING = frozenset({"h0", "q", "k", "v", "o"})
ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU; this machine has none")


class Recorder(CopyLane):
    """A lane of a GPU that there is not: copies have ends, and waits are written down."""

    def __init__(self, pool: HostPool) -> None:
        super().__init__(torch.device("cpu"), pool)
        self.log: list[tuple[Any, ...]] = []
        self.ends = 0

    def _copy(self, copies: Copies, stream: Any, after: Any) -> Any:
        super()._copy(copies, None, after)
        self.ends += 1
        self.log.append((self.direction, self.ends, copies[0][0].data_ptr(), after))
        return self.ends

    def copy_down(self, copies: Copies) -> Any:
        self.direction = "down"
        return super().copy_down(copies)

    def copy_up(self, copies: Copies, after: Any) -> Any:
        self.direction = "up"
        return super().copy_up(copies, after)

    def wait(self, event: Any) -> None:
        if event is not None:
            self.log.append(("wait", event))


def chain(lane: CopyLane, layers: int, offload: frozenset[str] = EVERYTHING) -> list[Any]:
    stores: list[OffloadingStore] = []
    for _ in range(layers):
        stores.append(OffloadingStore(frozenset(), offload, lane, stores[-1] if stores else None))
    return stores


def test_views_come_back_as_they_left() -> None:
    lane = CopyLane(torch.device("cpu"), HostPool(10**6))
    first, second = chain(lane, 2)
    buffer = torch.randn(7, 20).bfloat16()
    buffer[:, 19] = torch.nan
    tensors = {
        "q": buffer[:, :8],
        "k": buffer[:, 8:12],
        "v": buffer[:, 12:16].unflatten(1, (2, 2)),
        "h0": torch.randn(3, 5, dtype=torch.float64).T,
        "o": torch.randn(0, 4),
    }
    want = {name: tensor.clone() for name, tensor in tensors.items()}
    strides = {name: tensor.stride() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        first.put(name, tensor)
    assert lane.pool.bytes_held() == 7 * 20 * 2 + 15 * 8
    first.end_forward()
    second.put("h0", torch.zeros(1))
    second.end_forward()
    # memory that was let go belongs to others now
    buffer.fill_(torch.nan)
    tensors["h0"].fill_(torch.nan)
    second.get("h0")
    for name, tensor in want.items():
        got = first.get(name)
        assert torch.equal(got, tensor)
        assert got.stride() == strides[name]
        assert got.dtype == tensor.dtype
    assert first.get("gate") is None
    first.release()
    second.release()
    blocks = lane.pool.bytes_held()
    lane.pool.reserve([7 * 20 * 2, 15 * 8])
    assert lane.pool.bytes_held() == blocks


def test_scratch_is_copied_before_it_is_written_over() -> None:
    lane = CopyLane(torch.device("cpu"), HostPool(10**6))
    store = OffloadingStore(frozenset({"k"}), frozenset({"q"}), lane, None)
    scratch = torch.ones(4, 4)
    for name in ("q", "k", "v"):
        store.put(name, scratch, is_scratch=True)
    scratch.zero_()
    assert torch.equal(store.get("q"), torch.ones(4, 4))
    assert torch.equal(store.get("k"), torch.ones(4, 4))
    assert store.get("v") is None


def test_the_order_of_copies_and_waits() -> None:
    lane = Recorder(HostPool(10**6))
    stores = chain(lane, 4, frozenset({"h0"}))
    left = {}
    for number, store in enumerate(stores):
        waits = sum(entry[0] == "wait" for entry in lane.log)
        store.put("h0", torch.full((8,), float(number)))
        # the copy of the layer before has until the end of this one
        assert sum(entry[0] == "wait" for entry in lane.log) == waits
        store.end_forward()
        left[number] = lane.ends
        memory = [next(iter(s._parcels.values())).memory is not None for s in stores[: number + 1]]
        # its own and nobody else's; the one before has left, and that was waited for
        assert memory == [False] * number + [True]
        if number:
            assert ("wait", left[number - 1]) in lane.log
    log_of_forward = list(lane.log)
    assert [entry[0] for entry in log_of_forward] == ["down"] + ["down", "wait"] * 3
    for number in (3, 2, 1, 0):
        lane.log.clear()
        assert stores[number].get("h0")[0] == number
        assert stores[number].get("h0") is not None
        ups = [entry for entry in lane.log if entry[0] == "up"]
        if number == 3:  # it never left the GPU
            assert not any(entry[0] == "wait" for entry in lane.log)
        else:
            assert lane.log[0] == ("wait", stores[number]._came)
        # exactly the layer before comes while this one works, after it has left
        assert len(ups) == (number > 0)
        if number:
            assert ups[0][3] == left[number - 1]
        stores[number].release()
    assert lane.pool.bytes_held() == 4 * 32
    lane.pool.reserve([32] * 4)
    assert lane.pool.bytes_held() == 4 * 32


@pytest.mark.parametrize("begins_backward", [False, True])
def test_a_pass_that_is_dropped_gives_its_blocks_back(begins_backward: bool) -> None:
    lane = Recorder(HostPool(10**6))
    stores = chain(lane, 3, frozenset({"h0"}))
    for store in stores:
        store.put("h0", torch.ones(8))
        store.end_forward()
    if begins_backward:
        stores[2].get("h0")
    came = [store._came for store in stores if store._came]
    del stores, store
    gc.collect()
    # what was on its way back is waited for before its memory belongs to others
    assert all(("wait", event) in lane.log for event in came)
    assert len(came) == begins_backward
    lane.pool.reserve([32] * 3)
    assert lane.pool.bytes_held() == 96


class Chained:
    """Stands in for `SavedTensors`: names in `offload` travel."""

    def __init__(self, offload: dict[int, frozenset[str]], lane: CopyLane, layers: int) -> None:
        self.offload, self.lane, self.layers, self.count = offload, lane, layers, 0
        self.last: OffloadingStore | None = None

    def __call__(self, plan: frozenset[str]) -> OffloadingStore:
        number, self.count = self.count % self.layers, self.count + 1
        away = plan & self.offload.get(number, frozenset())
        previous = self.last if number else None
        self.last = OffloadingStore(plan - away, away, self.lane, previous)
        return self.last


def random_choice(pick: random.Random, shape: ModelShape) -> tuple[frozenset[str], frozenset[str]]:
    stored = {"input", *(name for name in CLASSES if pick.random() < 0.6)}
    away = {name for name in stored if name in OFFLOADABLE and pick.random() < 0.6}
    return names_of(stored, shape), names_of(away, shape)


FAMILIES_AND_DTYPES = [
    *itertools.product(
        ("llama", "qwen3", "llama_biases", "smollm3"), (torch.float32, torch.bfloat16)
    ),
    ("phi4_mini", torch.bfloat16),
    ("gemma2", torch.float32),
    ("gemma3", torch.bfloat16),
]


@pytest.mark.parametrize(("family", "dtype"), FAMILIES_AND_DTYPES)
def test_plans_of_every_kind_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model, inputs, pick = tiny_model(family, dtype), batch(), random.Random(family)
    state, shape = fuse(model), shape_of(FAMILIES[family])
    state.graphs.is_on = False  # recorded layers ask for no store
    state.mlp_tokens = state.max_weight_bytes = 2**62
    state.plan = names_of(CLASSES)
    want = gradients(model, inputs)
    everything = names_of(CLASSES)
    plans = [
        (everything, names_of(OFFLOADABLE, shape)),
        (names_of(["input"]), names_of(["input"], shape)),
        (names_of(["input"]), frozenset()),
        *(random_choice(pick, shape) for _ in range(6)),
    ]
    lane = CopyLane(torch.device(DEVICE), HostPool(10**8))
    for plan, away in plans:
        chained = Chained({n: away for n in range(3) if n != 1 or pick.random() < 0.5}, lane, 3)
        monkeypatch.setattr(fused_state, "SavedTensors", chained)
        state.plan = plan
        got = gradients(model, inputs)
        assert all(torch.equal(got[name], want[name]) for name in want), (plan, away)
        chained.last = None
        gc.collect()
        held = lane.pool.bytes_held()
        lane.pool.free()  # everything is free again
        assert lane.pool.bytes_held() == 0
        assert bool(held) == bool(away)


def test_accumulation_evaluation_and_a_pass_without_a_way_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = tiny_model("llama", torch.float32), batch()
    state = fuse(model)
    state.plan = names_of(CLASSES)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = []
        for micro_batch in range(3):
            loss = model(**inputs).loss
            if micro_batch == 1:
                with torch.no_grad():
                    model.eval()(**batch(length=7))
                    model.train()
                model(**inputs)  # nobody asks for its gradients
            loss.backward()
            losses.append(loss.detach())
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": torch.stack(losses), **found}

    want = run()
    lane = CopyLane(torch.device(DEVICE), HostPool(10**8))
    away = names_of(OFFLOADABLE)
    chained = Chained(dict.fromkeys(range(3), away), lane, 3)
    monkeypatch.setattr(fused_state, "SavedTensors", chained)
    got = run()
    assert lane.pool.bytes_held() > 0
    assert all(torch.equal(got[name], want[name]) for name in want)


@ON_GPU
def test_nothing_waits_for_the_gpu_and_memory_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    device, layers, size = torch.device("cuda"), 12, 2**22
    lane = CopyLane(device, HostPool(2**30))
    lane.pool.reserve([size] * layers)

    def run(stores: list[Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number, store in enumerate(stores):
                store.put("h0", torch.full((size // 4,), float(number), device=device))
                store.end_forward()
            wrong = torch.zeros((), device=device)
            for number, store in reversed(list(enumerate(stores))):
                wrong += (store.get("h0") != number).sum()
                store.release()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(wrong) == 0
        return torch.cuda.max_memory_allocated() - before

    for _ in range(3):
        moved = run(chain(lane, layers, frozenset({"h0"})))
    kept = run([OffloadingStore(frozenset({"h0"}), frozenset(), lane, None) for _ in range(layers)])
    assert kept - moved >= (layers - 3) * size
