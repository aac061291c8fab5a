"""Which attention kernel a call takes, and why not a faster one: pure rules, no GPU needed.

Every backend named here is exact: it computes softmax(scale * q k^T + mask) v with the sums in
float32 or wider, and differs from the others by roundings alone. So the choice is one of speed, and
the rules below are what each kernel cannot do.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from colab_qlora.kernels.attention_shape import AttentionShape
from colab_qlora.kernels.backend import HAS_TRITON, compute_capability

Capability = tuple[int, int]

# Fastest first, as benchmarks/kernels found on an H200 (2 x 2048 tokens, forward and backward, ms;
# results/kernels_bfloat16.json) and otherwise torch's own order, which prefers cuDNN on sm_90 and
# sm_100 alone:
#   32 heads of 128 over 8    cuDNN 0.63   Triton 0.88   flash 1.06   efficient 2.25
#   32 heads of 64 over 8     cuDNN 0.42   Triton 0.55   flash 0.62   efficient 1.47
#   16 heads of 256 over 8                 Triton 1.62   flash 1.25   efficient 6.31
DENSE_ORDER = ("flash", "cudnn", "efficient", "triton", "math")
_HOPPER = ("cudnn", "triton", "flash", "efficient", "math")
_CUDNN_FIRST = ("cudnn", "flash", "efficient", "triton", "math")
DENSE_ORDER_OF_MAJOR = {9: _CUDNN_FIRST, 10: _CUDNN_FIRST}
_TRITON_HEAD_DIM = 128
# Packed: 1 x 8192 tokens of 8 documents took Triton 1.50 ms, flash_varlen 1.81, efficient_varlen
# 3.80 (the same file). Elsewhere by reasoning: the Triton kernel writes into the caller's buffers
# and sums the gradients of a shared head without expanding them; below sm_80 one launch comes
# before one a document.
PACKED_ORDER = ("triton", "flash_varlen", "efficient_varlen", "efficient", "math")
CPU_ORDER = ("cpu_flash", "math")

# what a kernel computes beyond dense and causal; "math", "efficient" and "cpu_flash" take packed
# documents as one call a run of equal lengths
FEATURES = {
    "cudnn": frozenset[str](),
    "flash": frozenset({"window"}),
    "flash_varlen": frozenset({"window", "packed"}),
    "triton": frozenset({"packed", "cap"}),
    "efficient_varlen": frozenset({"packed"}),
    "efficient": frozenset({"mask", "window", "packed"}),
    "cpu_flash": frozenset({"mask", "window", "packed"}),
    "math": frozenset({"mask", "window", "packed", "cap"}),
}

# the switches that `rank_backends` reads; "deterministic" asks for the same bits at every run
ALL_ENABLED = {
    "cudnn": True,
    "flash": True,
    "efficient": True,
    "triton": True,
    "deterministic": False,
}
# off by 6e-5 then, a tenth of the rounding of a score of 1 in float16; models have 30 and 50
_MOST_CAP = 1000
_ADJECTIVES = {"mask": "masked", "packed": "packed", "window": "windowed", "cap": "capped"}
_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Choice:
    """A backend and one sentence on why it stands where it stands.

    Attributes:
        name: a key of `FEATURES`, for the argument `backend` of `attention_forward`.
        reason: why it was taken, and why the faster ones were not.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class _Call:
    shape: AttentionShape
    dtype: torch.dtype
    capability: Capability
    enabled: Mapping[str, bool]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def rank_backends(
    shape: AttentionShape,
    dtype: torch.dtype,
    device_type: str,
    capability: Capability | None = None,
    enabled: Mapping[str, bool] | None = None,
) -> list[Choice]:
    """The backends that compute this attention exactly, fastest first; never empty.

    Args:
        shape: lengths, heads and features of the call.
        dtype: of q, k and v.
        device_type: "cuda", "cpu" or another of torch's.
        capability: (major, minor) of the GPU; asked for with "cuda".
        enabled: switches, see `ALL_ENABLED`, which stands in for those left out.
    """
    call = _Call(shape, dtype, capability or (0, 0), {**ALL_ENABLED, **(enabled or {})})
    ranked: list[Choice] = []
    refusals: list[str] = []
    for name in _order(shape, device_type, call.capability):
        refusal = _refusal(name, call)
        if refusal:
            refusals.append(f"{name} {refusal}")
            continue
        kind = " and ".join(_ADJECTIVES[x] for x in sorted(shape.features)) or "dense"
        place = f"slower than {ranked[-1].name}" if ranked else "the fastest exact kernel"
        where = device_type if capability is None else f"compute capability {_version(capability)}"
        reason = f"{place} for {kind} {call.dtype_name} attention on {where}"
        if refusals:
            reason += ", since " + "; ".join(refusals)
        ranked.append(Choice(name, reason + "."))
    return ranked


def choose_attention(q: torch.Tensor, shape: AttentionShape) -> Choice:
    """The fastest exact backend for these queries, on this machine, with torch's switches as set.

    Args:
        q: the queries; only device and dtype are looked at.
        shape: lengths, heads and features of the call.
    """
    capability = None
    if q.is_cuda:
        index = q.device.index
        capability = compute_capability(torch.cuda.current_device() if index is None else index)
    return rank_backends(shape, q.dtype, q.device.type, capability, enabled_backends())[0]


def explain_attention(
    shape: AttentionShape,
    dtype: torch.dtype,
    capability: Capability | None,
    enabled: Mapping[str, bool] | None = None,
) -> str:
    """One sentence on what a GPU of this capability would take (None: a CPU); needs no GPU.

    Example:
        >>> shape = AttentionShape(2, 2048, 32, 8, 128, scale=128**-0.5)
        >>> explain_attention(shape, torch.float16, (9, 0))
        'cudnn: the fastest exact kernel for dense float16 attention on compute capability 9.0.'
    """
    device_type = "cpu" if capability is None else "cuda"
    choice = rank_backends(shape, dtype, device_type, capability, enabled)[0]
    return f"{choice.name}: {choice.reason}"


def enabled_backends() -> dict[str, bool]:
    """The switches of this process, for `rank_backends`."""
    backends = torch.backends.cuda
    return {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "triton": has_triton_kernel(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@functools.cache
def has_triton_kernel() -> bool:
    """True if Triton is installed and so is our kernel."""
    name = "colab_qlora.kernels.flash_attention"
    return HAS_TRITON and importlib.util.find_spec(name) is not None


def _order(shape: AttentionShape, device_type: str, capability: Capability) -> tuple[str, ...]:
    if device_type == "cpu":
        return CPU_ORDER
    if device_type != "cuda":
        return ("math",)
    if shape.packed:
        return PACKED_ORDER
    if capability[0] == 9 and shape.head_dim <= _TRITON_HEAD_DIM:
        return _HOPPER
    return DENSE_ORDER_OF_MAJOR.get(capability[0], DENSE_ORDER)


def _refusal(name: str, call: _Call) -> str | None:
    """Why this backend cannot run the call, as a clause without its subject; None if it can."""
    missing = call.shape.features - FEATURES[name]
    if missing:
        return f"takes no {' and no '.join(sorted(missing))}"
    rules = _RULES.get(name)
    return next((why for broken, why in rules(call) if broken), None) if rules else None


def _flash_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    head_dim, capability = call.shape.head_dim, call.capability
    yield not call.enabled["flash"], "is switched off (torch.backends.cuda.enable_flash_sdp)"
    yield from _half_rules(call)
    yield (
        head_dim % 8 > 0 or head_dim > 256,
        f"takes no head_dim {head_dim} (multiples of 8 to 256)",
    )
    # these GPUs have less shared memory than the backward of these head sizes needs
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    yield small and 192 < head_dim <= 224, f"has no backward for head_dim {head_dim} here"


def _cudnn_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    head_dim, length = call.shape.head_dim, call.shape.seq_length
    yield not call.enabled["cudnn"], "is switched off (torch.backends.cuda.enable_cudnn_sdp)"
    yield call.enabled["deterministic"], "is not deterministic, which torch was asked to be"
    yield from _half_rules(call)
    yield (
        head_dim % 8 > 0 or head_dim > 128,
        f"takes no head_dim {head_dim} (multiples of 8 to 128)",
    )
    # it builds a plan for every new length, and up to 9.15 its backward reads past the end of
    # others (pytorch issue 169849)
    yield length % 128 > 0, f"takes no {length} tokens (multiples of 128)"


def _triton_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    yield not call.enabled["triton"], "is not installed"
    # whoever switches flash attention off, to imitate a T4, means this one too
    yield not call.enabled["flash"], "is switched off (torch.backends.cuda.enable_flash_sdp)"
    yield from _half_rules(call)
    head_dim, cap = call.shape.head_dim, call.shape.cap
    yield head_dim > 256, f"takes no head_dim {head_dim} (up to 256)"
    # its tanh is off by 6e-8, and bounded scores by that times the cap
    yield cap is not None and cap > _MOST_CAP, f"takes no cap of {cap} (up to {_MOST_CAP})"


def _efficient_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    yield (
        not call.enabled["efficient"],
        "is switched off (torch.backends.cuda.enable_mem_efficient_sdp)",
    )
    yield call.dtype not in (*_HALF, torch.float32), f"takes no {call.dtype_name}"
    yield _needs(call, (5, 0))
    wide = call.dtype == torch.bfloat16 and call.capability < (8, 0)
    yield (
        wide,
        f"takes no bfloat16 below compute capability 8.0, this is {_version(call.capability)}",
    )
    head_dim, multiple = call.shape.head_dim, 4 if call.dtype == torch.float32 else 8
    yield head_dim % multiple > 0, f"takes no head_dim {head_dim} (multiples of {multiple})"


def _cpu_flash_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    yield not call.enabled["flash"], "is switched off (torch.backends.cuda.enable_flash_sdp)"
    yield call.dtype not in _FLOATS, f"takes no {call.dtype_name}"


def _half_rules(call: _Call) -> Iterator[tuple[bool, str]]:
    yield call.dtype not in _HALF, f"takes no {call.dtype_name} (float16, bfloat16)"
    yield _needs(call, (8, 0))


def _needs(call: _Call, least: Capability) -> tuple[bool, str]:
    text = f"needs compute capability {_version(least)}, this is {_version(call.capability)}"
    return call.capability < least, text


def _version(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


_RULES: dict[str, Callable[[_Call], Iterator[tuple[bool, str]]]] = {
    "cudnn": _cudnn_rules,
    "flash": _flash_rules,
    "flash_varlen": _flash_rules,
    "triton": _triton_rules,
    "efficient_varlen": _efficient_rules,
    "efficient": _efficient_rules,
    "cpu_flash": _cpu_flash_rules,
}
