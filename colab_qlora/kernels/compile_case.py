"""What `compile_check` compiles: a kernel, the types of its arguments, and its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HALF = "*fp16"
BFLOAT = "*bf16"
FLOAT = "*fp32"


@dataclass(frozen=True)
class CompileCase:
    """One kernel as one launch specialises it.

    Attributes:
        name: op, pass and size, such as "rms_norm_forward 4096".
        kernel: the `@triton.jit` function.
        signature: argument name to Triton type: "*fp16", "*fp32", "*u8", "*i32", "i32", "i64",
            "fp32". "*fp16" stands for the model's half type, which is bf16 on newer GPUs.
        constexprs: values of the `tl.constexpr` arguments.
        num_warps: as launched.
        num_stages: as launched.
        divisible_by_16: arguments known to be multiples of 16, as Triton finds out at a launch.
        uses_dot: True if the kernel holds a `tl.dot`; such a kernel never runs below sm_80, and is
            not compiled for sm_75.
        options: further options of the launch, such as {"enable_fp_fusion": False}.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    divisible_by_16: tuple[str, ...] = ()
    uses_dot: bool = False
    options: dict[str, Any] = field(default_factory=dict)
