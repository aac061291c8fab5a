"""The costs against what the code really holds, multiplies and allocates, on tiny models."""

from __future__ import annotations

import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "layers"))

from layer_helpers import DEVICE, FAMILIES, SIZES, batch, tiny_model  # noqa: E402

from colab_qlora.activations import (  # noqa: E402
    costs,
    phase_costs,
    scratch_costs,
    static_costs,
)
from colab_qlora.activations.cost_settings import CostSettings  # noqa: E402
from colab_qlora.activations.host_pool import HostPool  # noqa: E402
from colab_qlora.activations.model_shape import (  # noqa: E402
    ModelShape,
    adapter_sizes,
    ranks_of,
    shape_of,
)
from colab_qlora.activations.stores import CopyLane, OffloadingStore  # noqa: E402
from colab_qlora.errors import UserError  # noqa: E402
from colab_qlora.kernels.attention import choose_attention  # noqa: E402
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend  # noqa: E402
from colab_qlora.layers import decoder_layer, linear_group  # noqa: E402
from colab_qlora.layers.saved import (  # noqa: E402
    ALL_NAMES,
    KEEP_ALL,
    KEEP_INPUT,
    SavedTensors,
    checked_plan,
)
from colab_qlora.models import fused_head, fused_state  # noqa: E402
from colab_qlora.models.fuse import fuse, fused_layers, restore  # noqa: E402
from colab_qlora.models.fused_state import FusedState, LayerChoice  # noqa: E402

LLAMA_3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128_256)
SPARE = linear_group.PADDING.get(DEVICE, 1)
GEMMS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
SOME_PLANS = (
    KEEP_ALL,
    KEEP_INPUT,
    frozenset({"h0", "k", "o", "gate"}),
    frozenset({"h0", "lse", "xa_o", "gate", "up"}),
    KEEP_ALL - {"xa_qkv", "xa_o", "xa_gate_up", "xa_down"},
    KEEP_ALL - {"v", "h1", "up"},
)


def random_plan(pick: random.Random) -> frozenset[str]:
    return checked_plan(pick.sample(ALL_NAMES, pick.randint(0, len(ALL_NAMES))))


def test_llama_3_8b_is_as_in_the_notes() -> None:
    kept = costs.kept_costs(LLAMA_3_8B, 1, 2048, 16)
    assert tuple(kept) == ALL_NAMES
    assert sum(cost.bytes for cost in kept.values()) == 94_568
    assert round(sum(costs.forward_flops(LLAMA_3_8B, 1, 2048, 16).values()) / 1e5) == 4556
    in_mflop = {name: round(cost.rebuild_flops / 1e6, 2) for name, cost in kept.items()}
    assert in_mflop["q"] == in_mflop["h1"] == 33.82  # 33.55 and 0.26
    assert in_mflop["k"] == in_mflop["v"] == 8.55
    assert in_mflop["gate"] == in_mflop["up"] == 118.03
    assert in_mflop["o"] == 16.78
    products = sum(in_mflop[name] for name in ALL_NAMES if name.startswith("xa_"))
    assert products == pytest.approx(1.25, abs=0.02)
    weights = static_costs.static_bytes(LLAMA_3_8B, 16)
    assert weights["weights"] == 32 * 218_103_808 * (0.5 + 1 / 64 + 4 / 16384)
    on_load = ("weights", "weight tables", "embedding", "head", "norms", "adapters")
    assert sum(weights[name] for name in on_load) / 2**30 == pytest.approx(5.47, abs=0.005)
    assert weights["optimizer states"] / 2**30 == pytest.approx(0.08, abs=0.001)


def test_peaks_of_llama_3_8b_are_those_measured_on_an_h100() -> None:
    settings = CostSettings(attention="cudnn")
    everything = phase_costs.peak_bytes(LLAMA_3_8B, 2, 2048, 16, [KEEP_ALL] * 32, settings)
    assert everything / 2**30 == pytest.approx(18.0, rel=0.01)
    inputs = phase_costs.peak_bytes(LLAMA_3_8B, 2, 2048, 16, [KEEP_INPUT] * 32, settings)
    # measured before three mends, added here by their sizes: a second chunk's gate and up, and
    # gradient of the norm's output; gate and up decoded in one buffer
    before = 2 * 2048 * (2 * 14336 + 64 + 4096) + 2 * 4160 * 14336
    assert (inputs + before) / 2**30 == pytest.approx(7.38, rel=0.01)


def test_everything_is_rebuilt_from_the_input_in_the_end() -> None:
    kept = costs.kept_costs(LLAMA_3_8B, 7, 7, {"q_proj": 3})
    for name, cost in kept.items():
        assert bool(cost.needs) == (name != "h0")
        # what a tensor is computed from comes before it
        assert all(ALL_NAMES.index(other) < ALL_NAMES.index(name) for other in cost.needs)
        assert all(kept[other].needs == cost.needs for other in cost.together if other != "xa_o")
        assert not cost.decoded_numbers or cost.rebuild_flops >= 2 * 7 * cost.decoded_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama_biases",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "phi4_mini",
        "gemma2",
        "gemma3",
    ],
)
def test_kept_bytes_are_those_of_the_store(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model, stores = tiny_model(family, dtype), []

    def recorded(plan: frozenset[str]) -> SavedTensors:
        stores.append(SavedTensors(plan))
        return stores[-1]

    monkeypatch.setattr(fused_state, "SavedTensors", recorded)
    state, pick = fuse(model), random.Random(family)
    shape = shape_of(FAMILIES[family])
    given = (shape, 22, 11, 3)
    for plan in (*SOME_PLANS, *(random_plan(pick) for _ in range(4))):
        state.plan = plan
        stores.clear()
        loss = model(**batch()).loss
        backend = choose_attention(torch.empty(0, dtype=dtype, device=DEVICE), state.last_shape)
        settings = CostSettings(
            itemsize=dtype.itemsize, spare_multiple=SPARE, attention=backend.name
        )
        kept = costs.kept_costs(*given, dtype.itemsize)
        assert len(stores) == 3
        for store in stores:
            stored = costs.stored_names(shape, plan)
            assert store._tensors.keys() == stored
            found = {name: t.numel() * t.element_size() for name, t in store._tensors.items()}
            expected = {name: kept[name].bytes for name in stored}
            if backend.name == "efficient":  # rows of its own length; `held_bytes` knows them
                assert found.pop("lse", 0) >= expected.pop("lse", 0)
            assert found == expected
            memory = {t.untyped_storage().data_ptr(): t for t in store._tensors.values()}
            held = sum(t.untyped_storage().nbytes() for t in memory.values())
            assert held == costs.held_bytes(*given, plan, settings)
        del loss


def test_rows_of_lse_are_padded_by_the_memory_efficient_attention() -> None:
    plain, efficient = (
        costs.held_bytes(LLAMA_3_8B, 66, 33, 16, KEEP_ALL, CostSettings(attention=name))
        for name in ("flash", "efficient")
    )
    assert efficient - plain == 2 * 31 * 32 * 4


def gemm_flops(counter: FlopCounterMode, module: str = "Global") -> int:
    return sum(n for op, n in counter.get_flop_counts()[module].items() if op in GEMMS)


def stock_layer(rank: int) -> Any:
    """A call of a layer of a tiny model that is not fused, with 2 sequences of 11 tokens."""
    trunk = tiny_model("llama", torch.float32, r=rank).get_base_model().model
    hidden = torch.randn(2, 11, 48, device=DEVICE, requires_grad=True)
    tables = trunk.rotary_emb(hidden, torch.arange(11, device=DEVICE)[None])

    def call() -> torch.Tensor:
        return trunk.layers[0](hidden, position_embeddings=tables)

    return call


ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's attention may be made of GEMMs")


@ON_CPU
@pytest.mark.parametrize("rank", [1, 3])
def test_flops_are_those_of_the_models_own_layer(rank: int) -> None:
    call, shape = stock_layer(rank), shape_of(FAMILIES["llama"])
    expected = costs.forward_flops(shape, 22, 11, rank)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as forward:
        call()
    assert gemm_flops(forward) == expected["linears"] + expected["adapters"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as plain:
        call()
    # the plain attention is made of GEMMs, over the masked half too
    assert gemm_flops(plain) - gemm_flops(forward) == 2 * expected["attention"]

    kept = costs.kept_costs(shape, 22, 11, rank)
    rebuilt = sum(kept[name].rebuild_flops for name in ("q", "k", "v", "h1", "gate", "up"))
    down = gemm_flops(forward, "LlamaDecoderLayer.mlp.down_proj")
    assert down == 2 * 22 * (48 * 80 + rank * (48 + 80))
    assert rebuilt == gemm_flops(forward) - down

    def backward(checkpointed: bool) -> int:
        out = (
            torch.utils.checkpoint.checkpoint(call, use_reentrant=False) if checkpointed else call()
        )
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        return gemm_flops(counter)

    # stock checkpointing computes the layer up to the last tensor that it keeps
    assert rebuilt <= backward(True) - backward(False) <= rebuilt + down


def backward_flops(model: Any, state: Any, plan: frozenset[str]) -> int:
    """FLOPs of the backward pass in GEMMs."""
    state.plan = plan
    loss = model(**batch()).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return gemm_flops(counter)


@ON_CPU
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize(
    "rank", [3, dict.fromkeys(("q_proj", "v_proj", "up_proj", "down_proj"), 2)]
)
def test_rebuild_flops_are_those_of_the_fused_layer(family: str, rank: Any) -> None:
    if family == "phi3" and isinstance(rank, dict):
        rank = {"qkv_proj": 2, "down_proj": 2}
    targets = list(rank) if isinstance(rank, dict) else "all-linear"
    r = rank if isinstance(rank, int) else 2
    model = tiny_model(family, torch.float32, r=r, target_modules=targets)
    state, shape, pick = fuse(model), shape_of(FAMILIES[family]), random.Random(5)
    # one GEMM for each group: the counter does not see those that add in place, addmm_
    state.holds_gate_up = True
    settings = CostSettings(itemsize=4, spare_multiple=SPARE, holds_gate_up=True)
    least = backward_flops(model, state, KEEP_ALL)
    for plan in (*SOME_PLANS, *(random_plan(pick) for _ in range(4))):
        want = costs.rebuild_flops(shape, 22, 11, rank, plan, settings)
        assert backward_flops(model, state, plan) - least == 3 * want["linears"], sorted(plan)
        assert bool(want["attention"]) != (plan >= {"o", "lse"})


def test_attention_counts_what_is_seen() -> None:
    shape = ModelShape(1, 8, 8, 3, 1, 4, 8)
    for window, length in itertools.product((None, 1, 5, 100), (1, 7, 32)):
        seen = ModelShape(1, 8, 8, 3, 1, 4, 8, window=window)
        pairs = sum(min(row + 1, window or length) for row in range(length))
        exact = 2 * 4 * shape.query * pairs
        # half a pair a row is the diagonal, which the formula halves as all notes do
        assert exact - 4 * shape.query * 2 * length <= costs.attention_flops(
            seen, 2 * length, length
        )
        assert costs.attention_flops(seen, 2 * length, length) <= exact


@pytest.mark.parametrize("numbers", [(48, 80), (1, 65), (3, 43), (576, 1536), (1000, 131)])
def test_nf4_bytes_are_those_of_bitsandbytes(numbers: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(numbers), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(DEVICE)
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.state2.absmax]
    assert static_costs.nf4_bytes(math.prod(numbers)) == sum(t.nbytes for t in tensors)


def quantise(model: Any) -> None:
    """Give a model bitsandbytes' linears in place of its own, but for the head."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4"
            )
            packed.bias = module.bias
            model.set_submodule(name, packed)


@pytest.mark.parametrize(
    "family",
    ["llama", "llama_biases", "qwen2", "qwen3", "smollm3", "phi3", "phi4_mini", "gemma2", "gemma3"],
)
@pytest.mark.parametrize("is_4bit", [True, False])
def test_static_bytes_are_those_of_a_model(family: str, is_4bit: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from colab_qlora.training.optimizer import FlatAdamW

    is_tied = family in ("qwen2", "smollm3", "phi4_mini", "gemma2", "gemma3")
    config = type(FAMILIES[family])(
        **{**FAMILIES[family].to_dict(), "tie_word_embeddings": is_tied}
    )
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if is_4bit:
        quantise(model)
    # matrices of 60 x 48 and 60 x 80 numbers on both sides of 4096
    targets = list(shape_of(config).linears)
    model = get_peft_model(model.to(DEVICE), LoraConfig(r=60, target_modules=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer = FlatAdamW(trained, bits=8)
    optimizer.step()
    found = static_costs.static_bytes(shape_of(config), 60, CostSettings(is_4bit=is_4bit))
    assert found["gradients"] == gradients
    assert found["adapters"] == nbytes(trained)
    states = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
    assert found["optimizer states"] == nbytes(states)
    base = [p for p in model.parameters() if not p.requires_grad]
    constants = [t for p in base if (state := getattr(p, "quant_state", None)) for t in (
        state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code
    )]  # fmt: skip
    names = ("weights", "weight tables", "embedding", "head", "norms", "biases", "rotation")
    # Gemma's factor of the embedding is one number, and not counted
    buffers = [buffer for buffer in model.buffers() if buffer.numel() > 1]
    assert sum(found[name] for name in names) == nbytes([*base, *buffers, *constants])
    assert bool(found["head"]) != is_tied


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the memory that the tensors are in, each piece once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_scratch_bytes_are_those_of_the_scratch(
    monkeypatch: pytest.MonkeyPatch, family: str, multiple: int | None
) -> None:
    if multiple:
        monkeypatch.setitem(linear_group.PADDING, DEVICE, multiple)
    pick, shape = random.Random(3), shape_of(FAMILIES[family])
    rank = {"q_proj": 2, "o_proj": 2, "gate_proj": 2}
    if family == "phi3":
        rank = {"qkv_proj": 2, "o_proj": 2}
    for given, targets in ((3, "all-linear"), (rank, list(rank))):
        r = given if isinstance(given, int) else 2
        model = tiny_model(family, torch.float32, r=r, target_modules=targets)
        state = fuse(model)
        for plan in (*SOME_PLANS, *(random_plan(pick) for _ in range(4))):
            chosen = {
                "mlp_tokens": pick.choice([None, 5, 100]),
                "max_weight_bytes": pick.choice([None, None, 1, 20_000]),
                "holds_gate_up": pick.choice([True, False]),
            }
            for name, value in (chosen | {"plan": plan}).items():
                setattr(state, name, value)
            state.scratch.free()
            model(**batch()).loss.backward()
            settings = CostSettings(itemsize=4, spare_multiple=multiple or SPARE, **chosen)
            slots = scratch_costs.scratch_bytes(shape, 22, given, [plan], settings)
            assert sum(slots.values()) == state.scratch.bytes_held(), (sorted(plan), chosen)


def test_scratch_is_as_large_as_any_layer_wants_it() -> None:
    both = scratch_costs.scratch_bytes(LLAMA_3_8B, 4096, 16, [KEEP_ALL, KEEP_INPUT])
    alone = [
        scratch_costs.scratch_bytes(LLAMA_3_8B, 4096, 16, [plan]) for plan in (KEEP_ALL, KEEP_INPUT)
    ]
    assert both == {slot: max(one.get(slot, 0) for one in alone) for slot in both}
    # gate and up of one layer, decoded together
    assert both["weight"] == 2 * (2 * 14336 + 64) * (4096 + 64)


def choice_of(state: FusedState, plan: frozenset[str]) -> LayerChoice:
    return LayerChoice(plan, state.mlp_tokens, state.max_weight_bytes, state.holds_gate_up)


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 4096, 9001])
def test_chunks_of_the_mlp_are_those_of_the_state(tokens: int) -> None:
    parts = fuse(tiny_model())
    model = tiny_model(lora_dropout=0.1)
    drawing, plain = fuse(model), tiny_model()
    fuse(plain)
    for source, state, has_dropout in ((plain, parts, False), (model, drawing, True)):
        layer = fused_layers(source)[0].train()
        found = state.reading_of(layer, choice_of(state, KEEP_ALL))[1]
        for plan, mlp_tokens in itertools.product(SOME_PLANS, (None, 3, 10_000)):
            choice = choice_of(FusedState(mlp_tokens=mlp_tokens), plan)
            real = state.mlp_chunks(found, choice, tokens)
            settings = CostSettings(mlp_tokens=mlp_tokens, has_dropout=has_dropout)
            ours = scratch_costs.mlp_chunks(plan, tokens, settings)
            assert ours == tuple(min(size or tokens, tokens) for size in real)


PHASES = {
    "forward attention": (decoder_layer, "attention_half"),
    "forward mlp": (decoder_layer, "mlp_half"),
    "loss forward": (fused_head, "linear_cross_entropy"),
    "backward rebuild": (decoder_layer, "rebuild_attention"),
    "backward mlp": (decoder_layer, "mlp_half_backward"),
    "backward attention": (decoder_layer, "attention_half_backward"),
}


def name_phases(patch: pytest.MonkeyPatch) -> None:
    """Let a profile tell when each phase began and ended, by its own clock."""

    def named(phase: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(phase):
                return function(*args, **kwargs)

        return call

    for phase, (module, name) in PHASES.items():
        patch.setattr(module, name, named(phase, getattr(module, name)))


def recorded_peaks(step: Any) -> dict[str, int]:
    """Most bytes held of those that the step was handed, in each phase and in all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    results = profiled.profiler.kineto_results
    passes = [(e.name(), e.start_ns(), e.end_ns()) for e in results.events() if e.name() in PHASES]
    memory, waiting = [], list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            memory.append((event.start_time_ns, event.extra_fields))
    peaks, held = {"": 0}, {}
    for moment, change in sorted(memory, key=lambda entry: entry[0]):
        if change.alloc_size > 0:
            held[change.ptr] = change.alloc_size
        else:  # of what was there before, nothing is known, and nothing subtracted
            held.pop(change.ptr, None)
        now = sum(held.values())
        inside = [phase for phase, begin, end in passes if begin <= moment <= end]
        for phase in ("", *inside):
            peaks[phase] = max(peaks.get(phase, 0), now)
    return peaks


@pytest.mark.skipif(
    not HAS_TRITON or not is_interpreting() or DEVICE != "cpu",
    reason="needs the CPU's allocator, and kernels that allocate as on a GPU",
)
@pytest.mark.parametrize(
    ("family", "plan", "mlp_tokens", "offload"),
    [
        ("llama", KEEP_ALL, None, ""),
        ("llama", KEEP_INPUT, 14, ""),
        ("llama", KEEP_ALL - {"v", "h1", "up", "xa_down"}, None, ""),
        ("llama", KEEP_ALL, None, "h0"),
        ("llama", KEEP_ALL, None, "q k v h1"),
        ("llama", KEEP_ALL - {"gate", "up", "o", "lse"}, None, "h0 q k v h1"),
        ("phi3", KEEP_INPUT, 14, ""),
        ("gemma3", KEEP_ALL - {"v", "h1", "up", "xa_down"}, None, ""),
        ("gemma3", KEEP_ALL, None, "h0 down"),
    ],
)
def test_peaks_are_those_of_the_allocator(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    plan: frozenset[str],
    mlp_tokens: int | None,
    offload: str,
) -> None:
    away, layers = frozenset(offload.split()), 5 if offload else 2
    monkeypatch.setitem(linear_group.PADDING, "cpu", 16)
    changes = {"num_hidden_layers": layers, "tie_word_embeddings": False}
    if family == "gemma3":
        changes |= {"layer_types": ["full_attention"] * layers, "final_logit_softcapping": None}
        changes |= {"rope_parameters": None}
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), **changes})
    monkeypatch.setitem(FAMILIES, "some_layers", config)
    model = tiny_model("some_layers", torch.float32, r=1)
    state = fuse(model)
    state.plan, state.mlp_tokens = plan, mlp_tokens
    ids = torch.randint(3, 101, (2, 14))
    threads = torch.get_num_threads()
    lane, stores = CopyLane(torch.device("cpu"), HostPool(10**9)), []

    def new_store(names: frozenset[str]) -> OffloadingStore:
        stores.append(OffloadingStore(names - away, away, lane, stores[-1] if stores else None))
        return stores[-1]

    if away:
        monkeypatch.setattr(fused_state, "SavedTensors", new_store)

    def step() -> None:
        stores.clear()
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # the scratch is there from now on
    model.zero_grad()
    torch.set_num_threads(1)  # the CPU's attention has a buffer for each
    try:
        with monkeypatch.context() as patch, use_backend("triton"):
            name_phases(patch)
            peaks = recorded_peaks(step)
    finally:
        torch.set_num_threads(threads)
    settings = CostSettings(
        itemsize=4, mlp_tokens=mlp_tokens, spare_multiple=16, attention="cpu_flash",
        is_4bit=False, gemm_workspace_bytes=0,
    )  # fmt: skip
    each = [plan - away] * layers, settings, [away] * layers
    given = (shape_of(config), 2, 14, 1, *each)
    static = static_costs.static_bytes(given[0], 1, settings)
    there = sum(static.values()) - static["gradients"] - static["CUDA context"]
    there += sum(scratch_costs.scratch_bytes(given[0], 28, 1, [plan], settings).values())
    phases = {phase: size - there for phase, size in phase_costs.peak_phases(*given).items()}
    assert phase_costs.peak_bytes(*given) - there == max(phases.values())
    if away:
        assert lane.pool.bytes_held() > 0
    # the CPU's attention has a buffer of its own, and small things are not counted
    assert peaks.pop("") == pytest.approx(max(phases.values()), rel=0.03)
    assert peaks.keys() >= PHASES.keys() - {"backward rebuild"}
    for phase, size in peaks.items():
        # Triton's interpreter holds the tensors of the last launch until the next one
        late = 2 * 28 * 48 * 4 if phase in ("backward rebuild", "backward mlp") else 0
        assert 0.95 * (size - late) <= phases[phase] <= 1.05 * size, phase
    restore(model)


def test_gradients_are_there_before_the_pass_if_they_accumulate() -> None:
    plans = [KEEP_INPUT] * 32
    first, later = (
        phase_costs.peak_phases(LLAMA_3_8B, 1, 2048, 16, plans, CostSettings(has_gradients=has))
        for has in (False, True)
    )
    gradients = 4 * 32 * sum(adapter_sizes(LLAMA_3_8B, 16))
    assert later["forward mlp"] - first["forward mlp"] == gradients
    assert later["optimizer"] == first["optimizer"]


def test_constants_are_those_of_the_code() -> None:
    from colab_qlora.models.fused_state import LEAST_CHUNK_TOKENS
    from colab_qlora.teaching.memory import CUDA_CONTEXT_GIB
    from colab_qlora.training.flat_parameters import ALIGNMENT
    from colab_qlora.training.optimizer import LEAST_8BIT_NUMBERS

    assert scratch_costs._LEAST_CHUNK_TOKENS == LEAST_CHUNK_TOKENS
    assert static_costs.CUDA_CONTEXT_BYTES == CUDA_CONTEXT_GIB * 2**30
    assert static_costs._FLAT_ALIGNMENT == ALIGNMENT
    assert static_costs._LEAST_8BIT_NUMBERS == LEAST_8BIT_NUMBERS


def test_mistakes_are_named() -> None:
    config = transformers.LlamaConfig(**SIZES)
    config.num_attention_heads = 0
    with pytest.raises(UserError, match="num_attention_heads"):
        shape_of(config)
    del config.hidden_size
    with pytest.raises(UserError, match="model_type.*'gpt2'"):
        shape_of(transformers.GPT2Config())
    with pytest.raises(UserError, match="rank is not understood: got lm_head: 3"):
        ranks_of({"lm_head": 3})
    with pytest.raises(UserError, match="plans are not one for each layer: got 1; allowed: 32"):
        phase_costs.peak_bytes(LLAMA_3_8B, 1, 8, 16, [KEEP_ALL])
    with pytest.raises(UserError, match="attention is not known"):
        CostSettings(attention="unheard of")
    with pytest.raises(UserError, match="unknown tensor in the plan"):
        costs.held_bytes(LLAMA_3_8B, 1, 1, 16, {"m"})
