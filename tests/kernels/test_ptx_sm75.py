"""What Triton makes for a T4, executed: every op that a T4 runs by Triton, against its reference.

An op is called as always, with its kernels replaced: each launch has to fit a compile case, whose
PTX for sm_75 then runs, on any NVIDIA GPU of compute capability 7.5 up. Without a GPU the same
calls are packed for that PTX and interpreted, so that only the driver's part is left untested.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_helpers import DEVICE, assert_as_exact_as_stock, relative_error

from colab_qlora.kernels import (
    copy_rows,
    int8_decode,
    label_count,
    lora_borders,
    mixed_group,
    nf4,
    nf4_group,
    nf4_many,
    nf4_search,
    qkv_gradients,
    rms_norm,
    rope,
    swiglu,
)
from colab_qlora.kernels import cross_entropy_rows as cross_entropy
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.kernels.compile_case import CompileCase
from colab_qlora.kernels.compile_check import compile_kernel, load_cases
from colab_qlora.kernels.launch import ReadyLaunches
from colab_qlora.kernels.ptx_run import driver_ptx_version, launch_ptx, pack, read_entry

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

# float32 results (losses, rstd): what the approximate exp, log and rsqrt of a GPU may differ by
FLOAT_TOLERANCE = 2e-6

KINDS = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}


class Code(NamedTuple):
    """A compiled case: PTX, the kernel's name in it, and its shared memory in bytes."""

    ptx: str
    name: str
    shared_bytes: int


@dataclass
class Launch:
    """One launch of an op's kernel: its arguments by name, and Triton's options."""

    kernel: Any
    grid: tuple[int, ...]
    values: dict[str, Any]
    options: dict[str, Any]


class StandIn:
    """Takes a kernel's place in its module and hands its launches to `execute`."""

    def __init__(self, kernel: Any, execute: Callable[[Launch], None]) -> None:
        self.kernel, self.execute = kernel, execute

    def __getitem__(self, grid):
        def launch(*positional, **keywords):
            names = self.kernel.arg_names
            values = dict(zip(names, positional, strict=False))
            values |= {name: keywords.pop(name) for name in names if name in keywords}
            assert set(values) == set(names)
            self.execute(Launch(self.kernel, grid, values, keywords))

        return launch


def fits(case: CompileCase, launch: Launch) -> bool:
    """True if the case's code may run with the launch's arguments: it relies on nothing else."""
    options = {"num_warps": 4, **launch.options}
    options.pop("num_stages", None)
    if case.kernel is not launch.kernel or options != {"num_warps": case.num_warps, **case.options}:
        return False
    for name, value in launch.values.items():
        if name in case.constexprs:
            if value != case.constexprs[name]:
                return False
            continue
        is_tensor = isinstance(value, torch.Tensor)
        number = value.data_ptr() if is_tensor else value
        if KINDS.get(value.dtype if is_tensor else type(value)) != case.signature[name]:
            return False
        if name in case.divisible_by_16 and number % 16:
            return False
    return True


def own_arguments(case: CompileCase, launch: Launch) -> list[Any]:
    return [launch.values[name] for name in case.kernel.arg_names if name in case.signature]


def run_ptx(case: CompileCase, code: Code, launch: Launch) -> None:
    """What is tested: the PTX for sm_75, on the GPU that is here."""
    arguments = own_arguments(case, launch)
    launch_ptx(code.ptx, code.name, launch.grid, case.num_warps, code.shared_bytes, arguments)


def pack_and_interpret(case: CompileCase, code: Code, launch: Launch) -> None:
    """What can be tested without a GPU: everything before the driver, and the kernel's numbers."""
    entry = read_entry(code.ptx, code.name)
    arguments = own_arguments(case, launch)
    assert len(pack(code.name, entry.parameters, arguments)) == len(arguments) + 2
    assert entry.threads == 32 * case.num_warps and not entry.reads_scratch
    for parameter, argument in zip(entry.parameters, arguments, strict=False):
        assert (parameter.kind == "pointer") == isinstance(argument, torch.Tensor)
    # the driver, unlike ptxas, cannot be told to fuse no multiplication with an addition
    if case.options.get("enable_fp_fusion") is False:
        assert "fma." not in code.ptx and "mul.f32" not in code.ptx
        assert "mul.rn.f32" in code.ptx
    launch.kernel[launch.grid](**launch.values, **launch.options)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half().to(DEVICE)


def agree(run: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor) -> None:
    """Require of `run` by Triton what tests ask of kernels, the torch reference being the stock."""
    with use_backend("triton"):
        results = run(*tensors)
    with use_backend("torch"):
        references = run(*tensors)
        truths = run(*(tensor.double() for tensor in tensors))
    for index, (got, stock, truth) in enumerate(zip(results, references, truths, strict=True)):
        if got.dtype == torch.float32:
            assert relative_error(got, truth) <= relative_error(stock, truth) + FLOAT_TOLERANCE
        else:
            assert got.dtype == torch.float16
            assert_as_exact_as_stock(got, stock, truth, f"result {index}")


def rms_norm_with_extras(monkeypatch):
    """Wide rows, with a residual, several a program in the backward pass."""
    monkeypatch.setattr(rms_norm, "WEIGHT_GRAD_PROGRAMS", 2)

    def run(x, residual, weight, dy, residual_grad):
        y, rstd, h = rms_norm.rms_norm_forward(x, weight, 1e-5, residual=residual)
        grads = rms_norm.rms_norm_backward(
            dy, h, weight, rstd, residual_grad=residual_grad, needs_weight_grad=True
        )
        return y, rstd, h, *grads

    agree(run, randn(5, 4096), randn(5, 4096), randn(4096), randn(5, 4096), randn(5, 4096))


def rms_norm_of_heads(monkeypatch):
    """Many rows a program, and the last of them only half full; heads of a wider buffer."""

    def run(wide, weight, dy):
        x = wide[:, :16]
        y, rstd, h = rms_norm.rms_norm_forward(x, weight, 1e-5)
        return y, rstd, *rms_norm.rms_norm_backward(dy, h, weight, rstd, needs_weight_grad=True)

    agree(run, randn(3, 20, 128), randn(128), randn(3, 16, 128))


def rms_norm_of_input(monkeypatch):
    """Without the extras."""

    def run(x, weight, dy):
        y, rstd, h = rms_norm.rms_norm_forward(x, weight, 1e-5)
        return y, rstd, rms_norm.rms_norm_backward(dy, h, weight, rstd)[0]

    agree(run, randn(3, 14336), randn(14336), randn(3, 14336))


def rope_both_ways(monkeypatch):
    """Two sequences that share their tables."""

    def run(q, k, cos, sin):
        turned = [x.clone() for x in (q, k, q, k)]
        rope.rope_(*turned[:2], cos, sin)
        rope.rope_(*turned[2:], cos, sin, inverse=True)
        return tuple(turned)

    angle = torch.rand(3, 64).mul(7).repeat(1, 2).to(DEVICE)
    agree(run, randn(6, 32, 128), randn(6, 8, 128), angle.cos(), angle.sin())


def gradients_of_heads(monkeypatch):
    """Into columns of one buffer, with tables and without; then the same in place."""

    def run(dq, dk, dv, cos, sin):
        wide = dq.new_zeros(6, 48 * 128 + 16)
        parts = wide[:, 16:].unflatten(1, (48, 128)).split([32, 8, 8], dim=1)
        qkv_gradients.place_qkv_gradients(dq, dk, dv, cos, sin, *parts)
        turned = wide.clone()
        qkv_gradients.place_qkv_gradients(*parts, cos, sin, *parts)
        twice = wide.clone()
        qkv_gradients.place_qkv_gradients(dq, dk, dv, None, None, *parts)
        return turned, twice, wide

    angle = torch.rand(3, 64).mul(7).repeat(1, 2).to(DEVICE)
    heads = (randn(6, count, 128) for count in (32, 8, 8))
    agree(run, *heads, angle.cos(), angle.sin())


def copied_rows(monkeypatch):
    """Into columns of a wider buffer; a tile that is not full."""

    def run(x):
        wide = x.new_zeros(len(x), 16 + x.shape[1])
        copy_rows.copy_rows(x, wide[:, 16:])
        return (wide,)

    for width in (64, 4096):
        agree(run, randn(7, width))


def glu(monkeypatch, activation):
    """Halves of one buffer, with a last tile that is almost empty."""

    def run(buffer, dm):
        gate, up = buffer.chunk(2, dim=1)
        m = swiglu.glu_forward(gate, up, activation=activation)
        return m, *swiglu.glu_backward(dm, gate, up, activation=activation)

    agree(run, randn(5, 2 * 2064), randn(5, 2064))


def quantised(rows: int, columns: int, *, nested: bool) -> torch.Tensor:
    """Random codes with bitsandbytes' attributes; the levels need not be those of NF4."""
    blocks = -(-rows * columns // 64)
    state = SimpleNamespace(
        quant_type="nf4", dtype=torch.float16, shape=torch.Size([rows, columns])
    )
    state.code = torch.randn(16).to(DEVICE)
    state.blocksize, state.state2 = 64, None
    state.absmax = torch.rand(blocks).to(DEVICE)
    if nested:
        absmax, code = torch.rand(-(-blocks // 256)).to(DEVICE), torch.rand(256).to(DEVICE)
        state.absmax = torch.randint(256, (blocks,), dtype=torch.uint8).to(DEVICE)
        state.state2 = SimpleNamespace(absmax=absmax, code=code, blocksize=256)
        state.offset = torch.tensor(0.7).to(DEVICE)
    packed = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8).to(DEVICE)
    packed.quant_state = state
    return packed


def agree_bit_by_bit(decode: Callable[..., None], weights: list[torch.Tensor]) -> None:
    """Decode into columns of a wider buffer, and require every bit of the reference's."""
    wides = []
    for backend in ("triton", "torch"):
        shapes = [weight.quant_state.shape for weight in weights]
        wides.append([randn(rows, columns + 8).fill_(torch.nan) for rows, columns in shapes])
        outs = [wide[:, :-8] for wide in wides[-1]]
        with use_backend(backend):
            decode(weights, outs)
    for got, expected in zip(*wides, strict=True):
        assert torch.equal(got[:, :-8], expected[:, :-8])
        assert got[:, -8:].isnan().all()


def nf4_single(monkeypatch):
    """Several programs; rows that share blocks; rows without 16-byte stores."""

    def decode(weights, outs):
        for weight, out in zip(weights, outs, strict=True):
            nf4.nf4_dequantize(weight, out=out)

    weights = [quantised(100, 200, nested=nested) for nested in (True, False)]
    agree_bit_by_bit(decode, [*weights, quantised(16, 65, nested=True)])


def nf4_together(monkeypatch):
    """Three weights of different rows, nested; then two that are not."""
    for nested, rows in ((True, (100, 20, 40)), (False, (40, 100))):
        weights = [quantised(count, 200, nested=nested) for count in rows]
        agree_bit_by_bit(nf4_many.nf4_dequantize_many, weights)


def nf4_with_borders(monkeypatch):
    """Two weights and their adapters in one launch; nested and not."""
    for nested in (True, False):
        weights = [quantised(count, 208, nested=nested) for count in (40, 100)]

        def run(buffer, *matrices, weights=weights):
            buffer = buffer.clone()
            outs = [buffer[:40, :208], buffer[40:140, :208]]
            blocks = [
                lora_borders.Border(0, 0, *matrices[:2], 1.7, True, 0.6),
                lora_borders.Border(40, 4, *matrices[2:], 1.0, True, 1.0),
            ]
            if not nf4_group.nf4_group_(weights, outs, buffer, 140, 208, blocks)[0]:
                nf4_many.nf4_dequantize_many(weights, outs)
                lora_borders.lora_borders_(buffer, 140, 208, blocks)
            return (buffer,)

        shapes = ((4, 208), (40, 4), (8, 208), (100, 8))
        agree(run, randn(156, 224), *(randn(*shape).float() for shape in shapes))


def weights_of_several_kinds(monkeypatch):
    """Groups of one to three weights, of which at most the NF4 ones are alike, and adapters."""
    make = {
        "nf4": lambda rows: quantised(rows, 208, nested=True),
        "int8": lambda rows: int8_decode.Int8Weight(
            torch.randint(-127, 128, (rows, 208), dtype=torch.int8).to(DEVICE),
            torch.rand(rows).to(DEVICE),
        ),
        "plain": lambda rows: randn(rows, 208),
    }
    groups = ("int8 nf4", "nf4 plain nf4", "plain nf4 int8", "nf4 nf4", "int8", "plain plain")
    for kinds in map(str.split, groups):
        rows = (40, 100, 16)[: len(kinds)]
        weights = [make[kind](count) for kind, count in zip(kinds, rows, strict=True)]
        height = sum(rows)

        def run(buffer, a, b, weights=weights, rows=rows, height=height):
            buffer = buffer.clone()
            outs = list(buffer[:height, :208].split(rows))
            blocks = [lora_borders.Border(16, 3, a, b, 1.7, True, 0.6)]
            if not mixed_group.mixed_group_(weights, outs, buffer, height, 208, blocks)[0]:
                for weight, out in zip(weights, outs, strict=True):
                    if isinstance(weight, int8_decode.Int8Weight):
                        int8_decode.int8_decode_(weight, out)
                    elif hasattr(weight, "quant_state"):
                        nf4.nf4_dequantize(weight, out=out)
                    else:
                        out.copy_(weight)
                lora_borders.lora_borders_(buffer, height, 208, blocks)
            return (buffer,)

        shapes = ((4, 208), (height - 20, 4))
        agree(run, randn(height + 16, 224), *(randn(*shape).float() for shape in shapes))


def int8_of_a_weight(monkeypatch):
    """Several programs; a last one that is not full; rows without 16-byte stores."""
    for rows, columns in ((100, 200), (16, 65)):
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8).to(DEVICE)
        weight = int8_decode.Int8Weight(codes, torch.rand(rows).to(DEVICE))
        wides = []
        for backend in ("triton", "torch"):
            wides.append(randn(rows, columns + 8).fill_(torch.nan))
            with use_backend(backend):
                int8_decode.int8_decode_(weight, wides[-1][:, :-8])
        assert torch.equal(wides[0][:, :-8], wides[1][:, :-8])
        assert wides[0][:, -8:].isnan().all()


def borders_of_a_weight(monkeypatch):
    """Two adapters, the second without its A; float32 and half, in several tiles each way."""

    def run(buffer, *matrices):
        buffer = buffer.clone()
        blocks = [
            lora_borders.Border(row, column, *matrices[index : index + 2], 1.7, has_a)
            for index, row, column, has_a in ((0, 3, 0, True), (2, 40, 4, False))
        ]
        lora_borders.lora_borders_(buffer, 45, 80, blocks)
        return (buffer,)

    shapes = ((4, 80), (37, 4), (8, 80), (5, 8))
    for dtype in (torch.float32, torch.float16):
        agree(run, randn(61, 96), *(randn(*shape).to(dtype) for shape in shapes))


def labels_counted(monkeypatch):
    """More labels than a step takes, some ignored; shifted and not."""
    labels = torch.randint(0, 2**40, (3, 700), device=DEVICE)
    labels[torch.rand(3, 700, device=DEVICE) < 0.2] = -100
    for shift in (True, False):
        with use_backend("triton"):
            results = label_count.label_count(labels, -100, shift)
        expected = label_count.label_count_reference(labels, -100, shift)
        assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


def cross_entropy_of_rows(monkeypatch):
    """Several blocks a row, the last one short, in rows of a wider buffer; with and without."""
    targets = torch.tensor([5, 9231, 4096]).to(DEVICE)
    for softcap, writes_gradient in ((None, True), (30.0, True), (None, False), (30.0, False)):

        def run(wide, softcap=softcap, writes_gradient=writes_gradient):
            logits = wide.clone()[:, :9232]
            kind = torch.float64 if wide.dtype == torch.float64 else torch.float32
            losses = torch.empty(3, dtype=kind, device=DEVICE)
            cross_entropy.cross_entropy_rows_(
                logits, targets, losses, softcap=softcap, writes_gradient=writes_gradient
            )
            if not writes_gradient:
                return (losses,)
            return losses, logits * (256 / cross_entropy.gradient_scale(wide.dtype))

        agree(run, randn(3, 9248) * 4)


def scales_searched(monkeypatch):
    """All four kinds of launch, judged by the error that is left: ties may go either way."""
    weight, h = randn(64, 512) / 8, torch.rand(512, device=DEVICE) + 0.1

    def errors(scales: torch.Tensor, blocksize: int, column_weights) -> torch.Tensor:
        blocks = weight.double().view(-1, blocksize)
        levels = torch.tensor(nf4_search.NF4_LEVELS, device=DEVICE, dtype=torch.float64)
        ratios = blocks / scales.double()[:, None]
        nearest = levels[(ratios[..., None] - levels).abs().argmin(2)] * scales.double()[:, None]
        squares = (blocks - nearest).square()
        if column_weights is not None:
            squares = squares * column_weights.double().expand_as(weight).reshape(-1, blocksize)
        return squares.sum(1)

    for blocksize in (64, 32):
        absmax = weight.float().view(-1, blocksize).abs().amax(1)
        cap = absmax * 1.2
        candidates = absmax[:, None] * torch.tensor([1.0, 0.9, 0.8, 1.4], device=DEVICE)
        calls = [(h, {"cap": cap})]
        if blocksize == 64:
            calls += [(None, {}), (h, {"scales": candidates})]
        for column_weights, options in calls:
            needs_codes = "cap" not in options
            codes = torch.empty(weight.numel(), dtype=torch.uint8, device=DEVICE)
            found = nf4_search.launch_search(
                weight, column_weights, absmax, blocksize, codes=codes if needs_codes else None,
                **options,
            )  # fmt: skip
            got = errors(found, blocksize, column_weights)
            stock = errors(absmax, blocksize, column_weights)
            assert (got <= stock * (1 + 1e-6)).all() and got.sum() < 0.95 * stock.sum()
            limit = options.get("cap")
            assert limit is None or (found <= limit * (1 + 1e-6)).all()
            if needs_codes:
                levels = torch.tensor(nf4_search.NF4_LEVELS, device=DEVICE).double()
                decoded = levels[codes.long()].view(-1, blocksize) * found.double()[:, None]
                squares = (weight.double().view(-1, blocksize) - decoded).square()
                if column_weights is not None:
                    squares = squares * column_weights.double().repeat(64).view(-1, blocksize)
                assert torch.allclose(squares.sum(1), got, rtol=1e-5)


class Scenario(NamedTuple):
    """Calls of an op, the kernels that it launches, and the compile cases that they have to fit."""

    call: Callable[..., None]
    module: ModuleType
    kernels: tuple[str, ...]
    cases: tuple[str, ...]


BOTH = ("forward_kernel", "backward_kernel")
SCENARIOS = [
    Scenario(
        rms_norm_with_extras,
        rms_norm,
        BOTH,
        ("rms_norm_forward 4096 residual", "rms_norm_backward 4096 residual dweight"),
    ),
    Scenario(
        rms_norm_of_heads,
        rms_norm,
        BOTH,
        ("rms_norm_forward 128", "rms_norm_backward 128 dweight"),
    ),
    Scenario(
        rms_norm_of_input, rms_norm, BOTH, ("rms_norm_forward 14336", "rms_norm_backward 14336")
    ),
    Scenario(rope_both_ways, rope, ("_rope_kernel",), ("rope 128", "rope 128 inverse")),
    Scenario(
        gradients_of_heads,
        qkv_gradients,
        ("_place_kernel",),
        ("qkv_gradients 128", "qkv_gradients 128 in place", "qkv_gradients 128 copied"),
    ),
    Scenario(copied_rows, copy_rows, ("_copy_rows_kernel",), ("copy_rows 64", "copy_rows 4096")),
    *(
        Scenario(
            functools.partial(glu, activation=activation),
            swiglu,
            BOTH,
            (f"glu_forward {activation}", f"glu_backward {activation}"),
        )
        for activation in swiglu.ACTIVATIONS
    ),
    Scenario(
        nf4_single,
        nf4,
        ("_dequantize_kernel",),
        ("nf4_dequantize nested", "nf4_dequantize plain", "nf4_dequantize nested, odd rows"),
    ),
    Scenario(
        nf4_together,
        nf4_many,
        ("_dequantize_many_kernel",),
        ("nf4_dequantize_many nested", "nf4_dequantize_many plain"),
    ),
    Scenario(
        nf4_with_borders,
        nf4_group,
        ("_group_kernel",),
        ("nf4_group nested", "nf4_group plain"),
    ),
    Scenario(
        weights_of_several_kinds,
        mixed_group,
        ("mixed_kernel",),
        (
            "mixed_group nf4 nf4 int8",
            "mixed_group nf4 nf4 plain",
            "mixed_group nf4 int8 plain",
            "mixed_group nf4 nf4 nf4",
            "mixed_group int8 int8 int8",
            "mixed_group plain plain plain",
        ),
    ),
    Scenario(
        scales_searched,
        nf4_search,
        ("_search_kernel",),
        (
            "nf4_search weighted",
            "nf4_search weighted, blocks of 32",
            "nf4_search plain, with codes",
            "nf4_search levels",
        ),
    ),
    Scenario(
        int8_of_a_weight,
        int8_decode,
        ("_decode_kernel",),
        ("int8_decode", "int8_decode odd rows"),
    ),
    Scenario(
        borders_of_a_weight,
        lora_borders,
        ("_borders_kernel",),
        ("lora_borders float adapters", "lora_borders half adapters"),
    ),
    Scenario(
        labels_counted,
        label_count,
        ("_count_kernel",),
        ("label_count shifted", "label_count aligned"),
    ),
    Scenario(
        cross_entropy_of_rows,
        cross_entropy,
        ("_cross_entropy_rows_kernel",),
        (
            "cross_entropy_rows losses and gradient 128256",
            "cross_entropy_rows losses and gradient softcap 256000",
            "cross_entropy_rows losses 128256",
            "cross_entropy_rows losses softcap 256000",
        ),
    ),
]
CASE_NAMES = [name for scenario in SCENARIOS for name in scenario.cases]

# the names of cases come in as arguments
COMPILE = """
import json, sys
from colab_qlora.kernels.compile_check import compile_kernel, load_cases
codes = {}
for case in load_cases(75):
    if case.name in sys.argv[1:]:
        kernel, _ = compile_kernel(case, 75)
        codes[case.name] = kernel.asm["ptx"], kernel.metadata.name, kernel.metadata.shared
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> dict[str, Code]:
    """Every case of the scenarios, compiled for sm_75 where Triton is no interpreter."""
    if not is_interpreting():
        version = driver_ptx_version()
        cases = [case for case in load_cases(75) if case.name in CASE_NAMES]
        kernels = {case.name: compile_kernel(case, 75, ptx_version=version)[0] for case in cases}
        return {
            name: Code(kernel.asm["ptx"], kernel.metadata.name, kernel.metadata.shared)
            for name, kernel in kernels.items()
        }
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, *CASE_NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: Code(*code) for name, code in json.loads(done.stdout).items()}


def play(scenario: Scenario, codes: dict[str, Code], execute: Callable, monkeypatch) -> None:
    """Call the op with its kernels replaced, and require that it launched just these cases."""
    cases, launched = load_cases(75), []

    def run(launch: Launch) -> None:
        names = [case.name for case in cases if fits(case, launch)]
        assert len(names) == 1, (names, launch.values, launch.options)
        launched.append(names[0])
        (case,) = (case for case in cases if case.name == names[0])
        execute(case, codes[case.name], launch)

    for name in scenario.kernels:
        kernel = getattr(scenario.module, name)
        monkeypatch.setattr(scenario.module, name, StandIn(kernel, run))
    # a layout that a test before this one launched would go past the stand-in
    for name, value in list(vars(scenario.module).items()):
        if isinstance(value, ReadyLaunches):
            monkeypatch.setattr(scenario.module, name, ReadyLaunches())
    torch.manual_seed(0)
    scenario.call(monkeypatch)
    assert set(launched) == set(scenario.cases)


def scenario_name(scenario: Scenario) -> str:
    return scenario.cases[0]


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", SCENARIOS, ids=scenario_name)
def test_the_code_for_a_t4_computes_what_the_reference_does(scenario, codes, monkeypatch):
    play(scenario, codes, run_ptx, monkeypatch)


@pytest.mark.skipif(not is_interpreting(), reason="needs Triton's interpreter; a GPU runs the PTX")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=scenario_name)
def test_the_launches_fit_the_code_for_a_t4(scenario, codes, monkeypatch):
    play(scenario, codes, pack_and_interpret, monkeypatch)


def test_every_kernel_that_a_t4_runs_is_executed():
    kernels = {case.kernel for case in load_cases(75) if not case.uses_dot}
    assert kernels == {case.kernel for case in load_cases(75) if case.name in CASE_NAMES}
