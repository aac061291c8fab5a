"""Measure the rates that plans need, on the GPU that is there, at a model's own sizes.

About 2 s: each rate is that of many calls in a row, on a GPU that has been busy for a while, since
it clocks lower then than in the short bursts of a measurement (`gpu_timer.py`). Between any two of
them copies are timed (`copy_rates.py`), and what the host needs to start a kernel: both depend on
what else the host does, so they are taken at many moments. What it needs to start a layer's kernels
cannot be had without a model; it is put down as so many calls of torch. `profile_cache.py` keeps
what was measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.activations.copy_rates import CopyRates
from colab_qlora.activations.gpu_profile import GpuProfile, profile_named
from colab_qlora.activations.gpu_timer import EventTimer, GpuLoad, host_call_s
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.dtypes import pick_compute_dtype
from colab_qlora.errors import UserError
from colab_qlora.host import GIB, host_memory_gib

# with fewer tokens nothing is measured: the kernels of a layer are all latency
LEAST_TOKENS = 128
# element-wise passes are timed over this many tokens at least: with fewer they fit into the cache
LEAST_MOVED_TOKENS = 2048
# calls of torch that a host could make in the time that it needs for a layer, fitted to 2 x 512
# tokens of an 8B on the hosts of five H200s (benchmarks/LOG.md, 2026-11-30), and for the rest of a
# step, whose share is that of an H100's host
LAYER_CALLS, STEP_CALLS = 450, 449
# bytes of a number in NF4 with double quantisation
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384

Timer = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rates, and whether they hold for longer.

    Attributes:
        profile: the rates.
        is_sound: whether they are what was asked for: of all tokens, with copies, by a GPU that
            waited for nothing. Else something was short or in the way, now.
    """

    profile: GpuProfile
    is_sound: bool


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is timed, and how."""

    shape: ModelShape
    tokens: int
    seq_length: int
    device: torch.device
    dtype: torch.dtype
    timer: Timer

    def random(self, *size: int) -> torch.Tensor:
        # of random bits, which cost a GPU more power than zeros do, and thereby its clock
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_()


def measure_or_recorded(shape: ModelShape, tokens: int, seq_length: int) -> Measured:
    """`measure`, with fewer tokens where memory is short; in the end what is recorded."""
    asked = tokens
    while tokens >= LEAST_TOKENS:
        found = None
        try:
            found = measure(shape, tokens, min(seq_length, tokens))
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # not before the error is gone, whose frames hold what was measured with
        torch.cuda.empty_cache()
        if found is not None:
            return dataclasses.replace(found, is_sound=found.is_sound and tokens == asked)
        tokens //= 4
    return Measured(_recorded(), is_sound=False)


def measure(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    *,
    device: torch.device | None = None,
    timer: Timer | None = None,
) -> Measured:
    """The rates of a GPU.

    Args:
        shape: a model, whose GEMMs and heads are timed.
        tokens: of a micro-batch.
        seq_length: of each sequence; `tokens` holds one at least.
        device: None: the current GPU. A CPU has no copies.
        timer: seconds of a call; None: by CUDA events.

    Raises:
        torch.OutOfMemoryError: there is no room for these tokens.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    devices = [device] if device.type == "cuda" else []
    # a plan may be made in the middle of a user's forward pass
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices),
    ):
        rates, has_waited = _rates(shape, tokens, seq_length, device, timer)
    source = f"measured {datetime.date.today().isoformat()}, torch {torch.__version__}, "
    source += f"{tokens} tokens" + (", some calls waited for the host" if has_waited else "")
    profile = GpuProfile(**_machine(device), **rates, source=source, is_measured=True)
    copies = min(profile.copy_down_bytes_per_s, profile.copy_up_bytes_per_s)
    return Measured(profile, is_sound=not has_waited and (copies > 0 or not devices))


def _rates(
    shape: ModelShape, tokens: int, seq_length: int, device: torch.device, timer: Timer | None
) -> tuple[dict[str, Any], bool]:
    """The rates by the profile's names; and whether the GPU waited for the host in one of them."""
    is_gpu = device.type == "cuda"
    dtype = pick_compute_dtype(torch) if is_gpu else torch.float32
    load = GpuLoad(device, dtype) if is_gpu else None
    copies = CopyRates(load) if load is not None else None
    by_events = EventTimer(load) if load is not None else None
    time_call = timer or by_events
    assert time_call is not None
    host_s: list[float] = []

    def timed(call: Callable[[], Any]) -> float:
        seconds = time_call(call)
        host_s.append(host_call_s(device))
        # last, so that the GPU is as busy as ever when the next call is timed
        if copies is not None:
            copies.round()
        return seconds

    work = _Work(shape, tokens, seq_length, device, dtype, timed)
    rates = {
        "gemm_flops_per_s": _gemm_rate(work),
        **_attention_rates(work),
        "move_bytes_per_s": _move_rate(work),
        "decode_bytes_per_s": _decode_rate(work),
    }
    down, up = copies.rates() if copies is not None else (0.0, 0.0)
    call_s = statistics.median(host_s)
    rates |= {"copy_down_bytes_per_s": down, "copy_up_bytes_per_s": up}
    rates |= {"layer_launch_s": LAYER_CALLS * call_s, "step_launch_s": STEP_CALLS * call_s}
    return rates, by_events is not None and by_events.has_waited


def _machine(device: torch.device) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if is_gpu else "CPU",
        "capability": torch.cuda.get_device_capability(device) if is_gpu else (0, 0),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
        "host_bytes": int((host_memory_gib()[1] or 0.0) * GIB),
    }


def _recorded() -> GpuProfile:
    """What is recorded of this GPU; of one that is not known the rates of the slowest, which rank
    what is worth keeping all the same."""
    here = _machine(torch.device("cuda", torch.cuda.current_device()))
    try:
        found = profile_named(here["name"])
    except UserError:
        found = profile_named("T4")
    source = f"too little memory to measure; a recorded {found.name}'s: {found.source}"
    memory = {name: here[name] for name in ("name", "capability", "memory_bytes", "host_bytes")}
    return dataclasses.replace(found, **memory, source=source, is_measured=False)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # cuBLAS, cuDNN and Triton have words of their own
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _gemm_rate(work: _Work) -> float:
    """Of all GEMMs of a layer, forward and towards the input, with spare columns."""
    shape, seconds, flops, spare = work.shape, 0.0, 0, 64
    for inner, outer in (
        (shape.hidden, shape.qkv),
        (shape.query, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ):
        x = work.random(work.tokens, inner + spare)
        weight = work.random(outer, inner + spare)
        y = torch.empty((work.tokens, outer), dtype=work.dtype, device=work.device)
        seconds += work.timer(lambda x=x, w=weight, y=y: torch.mm(x, w.t(), out=y))  # type: ignore[misc]
        seconds += work.timer(lambda x=x, w=weight, y=y: torch.mm(y, w, out=x))  # type: ignore[misc]
        flops += 4 * work.tokens * (inner + spare) * outer
        del x, weight, y
    return flops / seconds


def _attention_rates(work: _Work) -> dict[str, Any]:
    from colab_qlora.activations.costs import attention_flops
    from colab_qlora.kernels import attention

    shape, seq_length = work.shape, work.seq_length
    rows = max(1, work.tokens // seq_length)
    heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
    call = attention.AttentionShape(rows, seq_length, *heads, shape.head_dim**-0.5)
    wide = work.random(rows * seq_length, shape.qkv)
    q, k, v = (
        part.unflatten(1, (-1, shape.head_dim))
        for part in wide.split([shape.query, shape.key_value, shape.key_value], dim=1)
    )
    forward_s = work.timer(lambda: attention.attention_forward(q, k, v, call))
    o, lse = attention.attention_forward(q, k, v, call)
    backward_s = work.timer(lambda: attention.attention_backward(o, q, k, v, o, lse, call))
    whole = dataclasses.replace(shape, window=None)
    flops = attention_flops(whole, rows * seq_length, seq_length)
    return {
        "attention_flops_per_s": flops / forward_s,
        "attention_backward_flops_per_s": 2.5 * flops / backward_s,
        "attention": attention.choose_attention(q, call).name,
    }


def _move_rate(work: _Work) -> float:
    """Of the gated unit, which moves more bytes than any other pass."""
    from colab_qlora.kernels import swiglu

    is_gpu = work.device.type == "cuda"
    tokens = max(work.tokens, LEAST_MOVED_TOKENS) if is_gpu else work.tokens
    gate, up = (work.random(tokens, work.shape.intermediate) for _ in range(2))
    out = torch.empty_like(gate)
    seconds = work.timer(lambda: swiglu.glu_forward(gate, up, activation="silu", out=out))
    return 3 * gate.nbytes / seconds


def _decode_rate(work: _Work) -> float:
    from colab_qlora.kernels import nf4

    rows, columns, device = work.shape.intermediate, work.shape.hidden, work.device
    count = rows * columns
    blocks = -(-count // 64)
    state = nf4.NF4State(
        packed=torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, device=device),
        code=torch.linspace(-1, 1, 16, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        blocksize=64,
        shape=(rows, columns),
        dtype=work.dtype,
        nested_absmax=torch.ones(-(-blocks // 256), device=device),
        nested_code=torch.linspace(-1, 1, 256, device=device),
        nested_blocksize=256,
        offset=torch.zeros((), device=device),
    )
    out = torch.empty((rows, columns), dtype=work.dtype, device=device)
    return count * (_NF4_BYTES + out.itemsize) / work.timer(lambda: nf4.decode(state, out))
