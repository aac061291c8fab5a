"""Measure the rates that plans need, on the GPU that is there, at a model's own sizes.

About 2 s: each rate is that of many calls in a row, on a GPU that has been busy for a while, since
it clocks lower then than in the short bursts of a measurement. Copies are timed while GEMMs
run, since that is when they are made. What the host needs to start a layer's kernels cannot be had
without a model; it is put down as so many calls of torch, one of which is timed.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colab_qlora.activations.gpu_profile import GpuProfile, profile_named
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.cache import cache_folder
from colab_qlora.dtypes import pick_compute_dtype
from colab_qlora.errors import UserError
from colab_qlora.host import host_memory_gib

GIB = 2**30
RUNS = 5
# each rate is measured for about so long, of at most so many calls
BUSY_S, MOST_RUNS = 0.06, 300
# the host's share of a call's time from which the GPU sleeps until all calls are queued; no GPU
# clocks much higher
HOST_BOUND_SHARE, LONGEST_SLEEP_S, CYCLES_PER_S = 0.5, 0.1, 2e9
# element-wise passes are timed over this many tokens at least: with fewer they fit into the cache
LEAST_MOVED_TOKENS = 2048
WARM_UP_S = 0.3
HOST_CALLS = 200
# calls of torch that a host could make in the time that it needs for a layer, and for the rest of a
# step: on the hosts of five H200s 2 x 512 tokens of an 8B, which wait for the host, took a fifth
# longer than 376 calls a layer would have; the share of the rest is that of an H100's
LAYER_CALLS, STEP_CALLS = 450, 449
# of what is kept on disk: another number wherever a rate is measured otherwise
FORMAT = 4
COPY_BYTES = 64 * 2**20
# bytes of a number in NF4 with double quantisation
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384
# more tokens than this and rates do not change
MOST_TOKENS = 8192

Timer = Callable[[Callable[[], Any]], float]


def cached_profile(shape: ModelShape, tokens: int, seq_length: int) -> GpuProfile:
    """`measure` for these sizes, rounded up to powers of two; from disk if it was done before."""
    tokens, seq_length = (_next_power(min(n, MOST_TOKENS)) for n in (tokens, seq_length))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    key = (
        FORMAT,
        properties.name,
        torch.__version__,
        torch.version.cuda,
        dataclasses.astuple(shape),
        (tokens, seq_length),
        _attention_kernels(),
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = cache_folder() / "gpu_profiles" / f"{digest}.json"
    found = read_profile(path)
    if found is None:
        found = measure_or_recorded(shape, tokens, seq_length)
        if found.is_measured:
            write_profile(path, found)
    return found


def _attention_kernels() -> tuple[bool, ...]:
    """Which of torch's are switched on: attention's rate is that of the best among them."""
    switches = torch.backends.cuda
    return (
        switches.flash_sdp_enabled(),
        switches.cudnn_sdp_enabled(),
        switches.mem_efficient_sdp_enabled(),
    )


def measure_or_recorded(shape: ModelShape, tokens: int, seq_length: int) -> GpuProfile:
    """`measure`, with fewer tokens where memory is short; in the end what is recorded."""
    while tokens >= 128:
        try:
            return measure(shape, tokens, min(seq_length, tokens))
        except torch.OutOfMemoryError:
            tokens //= 4
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    try:
        return profile_named(name)
    except UserError:
        # whatever it is: rates of the slowest, which rank what is worth keeping all the same
        total = torch.cuda.get_device_properties(0).total_memory
        return dataclasses.replace(profile_named("T4"), name=name, memory_bytes=total)


def measure(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    *,
    device: torch.device | None = None,
    timer: Timer | None = None,
) -> GpuProfile:
    """The rates of a GPU.

    Args:
        shape: a model, whose GEMMs and heads are timed.
        tokens: of a micro-batch.
        seq_length: of each sequence; `tokens` holds one at least.
        device: None: the current GPU.
        timer: seconds of a call; None: by CUDA events.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    timer = _event_timer if timer is None else timer
    dtype = pick_compute_dtype(torch) if device.type == "cuda" else torch.float32
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        _warm_up(device, dtype)
        gemm = _gemm_rate(shape, tokens, device, dtype, timer)
        ahead, back, name = _attention_rates(shape, tokens, seq_length, device, dtype, timer)
        move = _move_rate(shape, tokens, device, dtype, timer)
        decode = _decode_rate(shape, device, dtype, timer)
        down, up = _copy_rates(device, dtype)
        call_s = host_call_s(device)
    is_gpu = device.type == "cuda"
    host_free = host_memory_gib()[1] or 0.0
    today = datetime.date.today().isoformat()
    return GpuProfile(
        name=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        source=f"measured {today}, torch {torch.__version__}, {tokens} tokens",
        capability=torch.cuda.get_device_capability(device) if is_gpu else (0, 0),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_gpu else 0,
        host_bytes=int(host_free * GIB),
        gemm_flops_per_s=gemm,
        attention_flops_per_s=ahead,
        attention_backward_flops_per_s=back,
        move_bytes_per_s=move,
        decode_bytes_per_s=decode,
        copy_down_bytes_per_s=down,
        copy_up_bytes_per_s=up,
        layer_launch_s=LAYER_CALLS * call_s,
        step_launch_s=STEP_CALLS * call_s,
        attention=name,
        is_measured=True,
    )


def _gemm_rate(
    shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype, timer: Timer
) -> float:
    """Of all GEMMs of a layer, forward and towards the input, with spare columns."""
    seconds, flops, spare = 0.0, 0, 64
    for inner, outer in (
        (shape.hidden, shape.qkv),
        (shape.query, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ):
        x = torch.empty((tokens, inner + spare), dtype=dtype, device=device).normal_()
        weight = torch.empty((outer, inner + spare), dtype=dtype, device=device).normal_()
        y = torch.empty((tokens, outer), dtype=dtype, device=device)
        seconds += timer(lambda x=x, w=weight, y=y: torch.mm(x, w.t(), out=y))  # type: ignore[misc]
        seconds += timer(lambda x=x, w=weight, y=y: torch.mm(y, w, out=x))  # type: ignore[misc]
        flops += 4 * tokens * (inner + spare) * outer
        del x, weight, y
    return flops / seconds


def _attention_rates(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
) -> tuple[float, float, str]:
    from colab_qlora.activations.costs import attention_flops
    from colab_qlora.kernels.attention import (
        AttentionShape,
        attention_backward,
        attention_forward,
        choose_attention,
    )

    rows = max(1, tokens // seq_length)
    heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
    call = AttentionShape(rows, seq_length, *heads, shape.head_dim**-0.5)
    wide = torch.empty((rows * seq_length, shape.qkv), dtype=dtype, device=device).normal_()
    q, k, v = (
        part.unflatten(1, (-1, shape.head_dim))
        for part in wide.split([shape.query, shape.key_value, shape.key_value], dim=1)
    )
    o, lse = attention_forward(q, k, v, call)
    forward_s = timer(lambda: attention_forward(q, k, v, call))
    backward_s = timer(lambda: attention_backward(o, q, k, v, o, lse, call))
    whole = dataclasses.replace(shape, window=None)
    flops = attention_flops(whole, rows * seq_length, seq_length)
    return flops / forward_s, 2.5 * flops / backward_s, choose_attention(q, call).name


def _move_rate(
    shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype, timer: Timer
) -> float:
    """Of the gated unit, which moves more bytes than any other pass."""
    from colab_qlora.kernels.swiglu import glu_forward

    tokens = tokens if device.type == "cpu" else max(tokens, LEAST_MOVED_TOKENS)
    gate = torch.empty((tokens, shape.intermediate), dtype=dtype, device=device).normal_()
    up, out = gate.clone(), torch.empty_like(gate)
    seconds = timer(lambda: glu_forward(gate, up, activation="silu", out=out))
    return 3 * gate.nbytes / seconds


def _decode_rate(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, timer: Timer
) -> float:
    from colab_qlora.kernels.nf4 import NF4State, decode

    rows, columns = shape.intermediate, shape.hidden
    count = rows * columns
    blocks = -(-count // 64)
    state = NF4State(
        packed=torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, device=device),
        code=torch.linspace(-1, 1, 16, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        blocksize=64,
        shape=(rows, columns),
        dtype=dtype,
        nested_absmax=torch.ones(-(-blocks // 256), device=device),
        nested_code=torch.linspace(-1, 1, 256, device=device),
        nested_blocksize=256,
        offset=torch.zeros((), device=device),
    )
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    return count * (_NF4_BYTES + out.itemsize) / timer(lambda: decode(state, out))


def _copy_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second from and to pinned host memory while GEMMs run; 0 where that is refused."""
    if device.type != "cuda":
        return 0.0, 0.0
    try:
        host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return 0.0, 0.0
    there = torch.empty_like(host, device=device)
    square = torch.empty((4096, 4096), dtype=dtype, device=device).normal_()
    stream = torch.cuda.Stream(device)
    rates = []
    for source, target in ((there, host), (host, there)):
        found = []
        for _ in range(RUNS):
            torch.cuda.synchronize(device)
            for _ in range(8):
                torch.mm(square, square)
            with torch.cuda.stream(stream):
                began = stream.record_event(torch.cuda.Event(enable_timing=True))
                target.copy_(source, non_blocking=True)
                ended = stream.record_event(torch.cuda.Event(enable_timing=True))
            torch.cuda.synchronize(device)
            found.append(began.elapsed_time(ended) / 1e3)
        rates.append(COPY_BYTES / statistics.median(found))
    return rates[0], rates[1]


def _event_timer(call: Callable[[], Any]) -> float:
    """Seconds of a call on a GPU kept as busy as training keeps it: its clock is lower then."""
    seconds = _timed(call, 1)
    count = max(RUNS, math.ceil(BUSY_S / max(seconds, 1e-6)))
    return _timed(call, min(count, MOST_RUNS)) / min(count, MOST_RUNS)


def host_call_s(device: torch.device) -> float:
    """What the host needs to start one small kernel through torch."""
    x = torch.ones(16, 16, device=device)
    y = torch.empty_like(x)
    found = []
    for _ in range(RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(HOST_CALLS):
            torch.mm(x, x, out=y)
        found.append((time.perf_counter() - began) / HOST_CALLS)
    return statistics.median(found)


def _timed(call: Callable[[], Any], count: int) -> float:
    """Seconds of so many calls in a row on the GPU, after two that do not count.

    Calls that the host starts more slowly than the GPU runs them wait until all are queued.
    """
    call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    ended.record()
    ended.synchronize()
    # longer ones follow without a pause, since a GPU that has slept clocks higher
    if count > 1 and host_s > HOST_BOUND_SHARE * began.elapsed_time(ended) / 1e3:
        torch.cuda._sleep(int(CYCLES_PER_S * min(LONGEST_SLEEP_S, 1.5 * count * host_s)))
    began.record()
    for _ in range(count):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Bring a GPU to the clock that it holds under load, which takes it some tenths of a second."""
    if device.type != "cuda":
        return
    square = torch.empty((4096, 4096), dtype=dtype, device=device).normal_()
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_S:
        for _ in range(20):
            torch.mm(square, square)
        torch.cuda.synchronize(device)


def read_profile(path: Path) -> GpuProfile | None:
    """A profile from disk; None if there is none, or it is not whole."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["capability"] = tuple(fields["capability"])
        found = GpuProfile(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    rates = [value for name, value in fields.items() if name.endswith("_s")]
    is_whole = all(isinstance(rate, int | float) and 0 <= rate < math.inf for rate in rates)
    return found if is_whole and found.gemm_flops_per_s > 0 else None


def write_profile(path: Path, profile: GpuProfile) -> None:
    """Keep a profile for the next time; a folder that cannot be written to costs 2 s then."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(profile), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        return


def _next_power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
