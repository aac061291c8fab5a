"""Does 4-bit training work on this machine: one small layer, forward and backward, in seconds.

Two checks. A 256 x 256 matrix goes to NF4 and back: the relative error of normal values with blocks
of 64 is about 0.09, so a value outside 0.05 to 0.15 means that the library decodes wrongly. Then a
`Linear4bit` layer runs forward and backward, against the same product with the decoded weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from colab_qlora.dtypes import pick_compute_dtype
from colab_qlora.models.quiet_import import import_bitsandbytes

SIZE = 256
ERROR_RANGE = (0.05, 0.15)
# bfloat16 keeps 8 bits: a sum of 256 products is within about 1 % of the exact one, float16 within
# 0.1 %
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-3}


@dataclass(frozen=True)
class SelfTest:
    """What the self test found.

    Attributes:
        ok: every check passed.
        lines: one line a check.
        device: "cuda", "cpu", or "" if torch is missing.
        dtype: what the layer computed in, such as "float16".
        nf4_error: relative error of the NF4 round trip.
        seconds: how long the checks took, imports not counted.
    """

    ok: bool
    lines: tuple[str, ...]
    device: str = ""
    dtype: str = ""
    nf4_error: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join(self.lines)


def self_test(seconds: float = 5) -> SelfTest:
    """Runs both checks. Never raises: what is missing or broken becomes a line.

    Args:
        seconds: how long the checks may take before a line says that this machine is slow (a shared
            CPU, or a GPU that another program uses).
    """
    try:
        import torch
    except Exception as error:  # a broken torch raises more than ImportError
        return SelfTest(False, (f"torch cannot be imported: {error}",))
    try:
        bitsandbytes = import_bitsandbytes()
    except Exception as error:
        return SelfTest(False, (f"bitsandbytes cannot be imported: {error}",))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    lines: list[str] = []
    nf4_error: float | None = None
    dtype_name = ""
    ok = True
    try:
        dtype = pick_compute_dtype()
        dtype_name = str(dtype).removeprefix("torch.")
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(SIZE, SIZE, generator=generator).to(device, dtype)
        nf4_error = _round_trip_error(torch, bitsandbytes, matrix)
        decodes, line = _judge_round_trip(nf4_error, device)
        lines.append(line)
        errors = _layer_errors(torch, bitsandbytes, device, dtype)
        computes, line = _judge_layer(errors, dtype_name)
        lines.append(line)
        ok = decodes and computes
    except Exception as error:  # any failure of the library is the finding itself
        ok = False
        text = str(error).strip().splitlines()
        lines.append(f"4-bit check failed: {type(error).__name__}: {text[0] if text else ''}")
    spent = time.perf_counter() - started
    lines.append(
        f"took {spent:.1f} s"
        + ("" if spent <= seconds else f": slower than {seconds:g} s, is something else running?")
    )
    return SelfTest(ok, tuple(lines), device, dtype_name, nf4_error, spent)


def _judge_round_trip(error: float, device: str) -> tuple[bool, str]:
    good = ERROR_RANGE[0] < error < ERROR_RANGE[1]
    line = f"NF4 round trip on {device}: relative error {error:.3f}"
    return good, line + ("" if good else f", expected {ERROR_RANGE[0]} to {ERROR_RANGE[1]}")


def _judge_layer(errors: tuple[float, float], dtype_name: str) -> tuple[bool, str]:
    limit = TOLERANCE[dtype_name]
    good = all(error < limit for error in errors)
    line = "4-bit layer in {}: output off by {:.1e}, gradient by {:.1e}".format(dtype_name, *errors)
    return good, line + ("" if good else f", expected below {limit:.0e}")


def _relative(torch: Any, value: Any, exact: Any) -> float:
    exact = exact.detach().float()
    return float(torch.linalg.norm(value.detach().float() - exact) / torch.linalg.norm(exact))


def _round_trip_error(torch: Any, bitsandbytes: Any, matrix: Any) -> float:
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    decoded = bitsandbytes.functional.dequantize_4bit(packed, state)
    return _relative(torch, decoded, matrix)


def _layer_errors(torch: Any, bitsandbytes: Any, device: str, dtype: Any) -> tuple[float, float]:
    """Relative error of a Linear4bit's output and of the gradient of its input."""
    layer = bitsandbytes.nn.Linear4bit(
        SIZE, SIZE, bias=False, compute_dtype=dtype, quant_type="nf4"
    ).to(device)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, SIZE, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(32, SIZE, generator=generator).to(device, dtype)
    output = layer(inputs)
    output.backward(upstream)
    expected = inputs.detach().float() @ weight.float().T
    gradient = upstream.float() @ weight.float()
    return _relative(torch, output, expected), _relative(torch, inputs.grad, gradient)
