"""A kept launch is the first one over again, and is taken for nothing but the same call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from kernel_helpers import CAN_RUN_TRITON, DEVICE

from colab_qlora.kernels import cross_entropy_rows as cross_entropy
from colab_qlora.kernels import launch, rms_norm, rope, swiglu
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.kernels.launch import ReadyLaunches, address, layout, start_repeatable

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

ROWS, HEADS, WIDTH = 6, 2, 32
# grid, stream, function, metadata and three hooks stand before the kernel's own arguments
LEADING = 9


class FakeKernel:
    """Takes a kernel's place: what it was launched with by Triton's way, and by the short one."""

    def __init__(self) -> None:
        self.first: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid):
        def start(*arguments, **options):
            self.first.append((grid, arguments, options))
            run = self.again
            return SimpleNamespace(
                run=lambda *arguments: run.append(arguments),
                function="function",
                packed_metadata="metadata",
            )

        return start


class Op(NamedTuple):
    """An op with one launch: `run` takes `inputs()`, and returns the outputs that it allocated."""

    module: ModuleType
    kernel: str
    launches: str
    run: Callable[..., dict[str, torch.Tensor]]
    inputs: Callable[[], dict[str, Any]]


def rows(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def norm(**inputs):
    y, rstd, h = rms_norm.rms_norm_forward(**inputs)
    allocated = {"rstd": rstd}
    if inputs["out"] is None:
        allocated["out"] = y
    if inputs["h_out"] is None and inputs["residual"] is not None:
        allocated["h"] = h
    return allocated


def norm_backward(**inputs):
    dx, _ = rms_norm.rms_norm_backward(**inputs)
    return {"out": dx} if inputs["out"] is None else {}


def rotate(**inputs):
    return rope.rope_(**inputs) or {}


def gate(**inputs):
    m = swiglu.glu_forward(**inputs)
    return {"out": m} if inputs["out"] is None else {}


def gate_backward(**inputs):
    outputs = dict(zip(("d_gate", "d_up", "m"), swiglu.glu_backward(**inputs), strict=True))
    return {name: o for name, o in outputs.items() if inputs[name] is None and o is not None}


def losses(**inputs):
    return cross_entropy.cross_entropy_rows_(**inputs) or {}


def norm_inputs(*shape: int, **extras: bool) -> dict[str, Any]:
    optional = {n: rows(*shape) if extras.get(n) else None for n in ("residual", "out", "h_out")}
    return {"x": rows(*shape), "weight": rows(shape[-1]), "eps": 1e-5, **optional}


def norm_backward_inputs(*shape: int, dweight: bool = False, **extras: bool) -> dict[str, Any]:
    names = ("residual_grad", "out", "normed")
    optional = {n: rows(*shape) if extras.get(n) else None for n in names}
    rstd = rows(*shape[:-1], dtype=torch.float32)
    needed = {"dy": rows(*shape), "h": rows(*shape), "weight": rows(shape[-1]), "rstd": rstd}
    return {**needed, **optional, "needs_weight_grad": dweight}


def rope_inputs(has_keys: bool) -> dict[str, Any]:
    table = rows(ROWS // 2, WIDTH, dtype=torch.float32)
    keys = rows(ROWS, 1, WIDTH) if has_keys else None
    q = rows(ROWS, HEADS, WIDTH)
    return {"q": q, "k": keys, "cos": table, "sin": table.clone(), "inverse": False}


def glu_inputs(given: bool) -> dict[str, Any]:
    names = {"gate": True, "up": True, "out": given}
    tensors = {name: rows(ROWS, WIDTH) if wanted else None for name, wanted in names.items()}
    return {**tensors, "activation": "silu"}


def glu_backward_inputs(given: bool, rebuild: bool) -> dict[str, Any]:
    names = {"dm": True, "gate": True, "up": True}
    names |= {"d_gate": given, "d_up": given, "m": given and rebuild}
    tensors = {name: rows(ROWS, WIDTH) if wanted else None for name, wanted in names.items()}
    return {**tensors, "activation": "silu", "rebuild": rebuild}


def loss_inputs() -> dict[str, Any]:
    targets = torch.zeros(ROWS, dtype=torch.long, device=DEVICE)
    tensors = {
        "logits": rows(ROWS, 130),
        "targets": targets,
        "losses": rows(ROWS, dtype=torch.float32),
    }
    return {**tensors, "softcap": None, "logit_scale": 1.0, "writes_gradient": True}


FORWARD = (rms_norm, "forward_kernel", "_forward_launches", norm)
BACKWARD = (rms_norm, "backward_kernel", "_backward_launches", norm_backward)
GLU_FORWARD = (swiglu, "forward_kernel", "_forward_launches", gate)
GLU_BACKWARD = (swiglu, "backward_kernel", "_backward_launches", gate_backward)
ROPE = (rope, "_rope_kernel", "_launches", rotate)
LOSSES = (cross_entropy, "_cross_entropy_rows_kernel", "_launches", losses)
OPS = {
    "norm": Op(*FORWARD, lambda: norm_inputs(ROWS, WIDTH)),
    "norm of heads": Op(*FORWARD, lambda: norm_inputs(ROWS, HEADS, WIDTH, out=True)),
    "norm of a sum": Op(*FORWARD, lambda: norm_inputs(ROWS, WIDTH, residual=True)),
    "norm of a sum in buffers": Op(
        *FORWARD, lambda: norm_inputs(ROWS, WIDTH, residual=True, out=True, h_out=True)
    ),
    "norm backward": Op(*BACKWARD, lambda: norm_backward_inputs(ROWS, WIDTH)),
    "norm backward with all": Op(
        *BACKWARD,
        lambda: norm_backward_inputs(
            ROWS, HEADS, WIDTH, dweight=True, residual_grad=True, out=True, normed=True
        ),
    ),
    "rope": Op(*ROPE, lambda: rope_inputs(True)),
    "rope of queries": Op(*ROPE, lambda: rope_inputs(False)),
    "glu": Op(*GLU_FORWARD, lambda: glu_inputs(False)),
    "glu in a buffer": Op(*GLU_FORWARD, lambda: glu_inputs(True)),
    "glu backward": Op(*GLU_BACKWARD, lambda: glu_backward_inputs(False, True)),
    "glu backward in buffers": Op(*GLU_BACKWARD, lambda: glu_backward_inputs(True, True)),
    "glu backward without m": Op(*GLU_BACKWARD, lambda: glu_backward_inputs(False, False)),
    "cross entropy": Op(*LOSSES, loss_inputs),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


@pytest.fixture(autouse=True)
def _launches_kept(monkeypatch):
    """Triton's backend, a stream where there is no GPU, and nothing kept from elsewhere."""
    monkeypatch.setattr(launch, "_CAN_REPEAT", True)
    stream = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, stream, lambda device: f"stream of {device}", raising=False)
    for op in OPS.values():
        monkeypatch.setattr(op.module, op.launches, ReadyLaunches())
    with use_backend("triton"):
        yield


def replace_kernel(op: Op, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeKernel, list[str]]:
    names = getattr(op.module, op.kernel).arg_names
    fake = FakeKernel()
    monkeypatch.setattr(op.module, op.kernel, fake)
    return fake, names


def kept(op: Op) -> dict:
    return getattr(op.module, op.launches)._by_key


@every_op
def test_a_second_call_launches_what_the_first_did_at_its_own_addresses(op, monkeypatch):
    fake, names = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    inputs = op.inputs()
    allocated = op.run(**inputs)
    ((grid, arguments, _),), (again,) = fake.first, fake.again
    device = torch.empty(0, device=DEVICE).get_device()
    launched = (f"stream of {device}", "function", "metadata", None, None, None)
    assert again[:LEADING] == ((*grid, 1, 1)[:3] + launched)
    own = {t.data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    for name, before, now in zip(names, arguments, again[LEADING:], strict=True):
        if not isinstance(before, torch.Tensor):
            assert type(now) is type(before) and now == before, name
        elif name in allocated:
            assert now == allocated[name].data_ptr()
        else:
            assert now in own or name == "partial"


@every_op
def test_each_input_lies_where_the_kernel_looks_for_it(op, monkeypatch):
    fake, names = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    inputs = op.inputs()
    op.run(**inputs)
    launched = dict(zip(names, fake.again[0][LEADING:], strict=True))
    places = {"logits": "logits_pointer", "targets": "targets_pointer", "losses": "losses_pointer"}
    places |= {"h_out": "h"} if "h_out" in inputs else {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert launched[places.get(name, name)] == value.data_ptr(), name


@every_op
def test_what_is_kept_has_as_many_arguments_as_the_kernel_takes(op, monkeypatch):
    fake, names = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    (ready,) = kept(op).values()
    _, arguments, _ = fake.first[0]
    leading = len(arguments) - len(ready._constants)
    assert arguments[leading:] == ready._constants and len(arguments) == len(names)
    assert all(a is None or isinstance(a, torch.Tensor) for a in arguments[:leading])
    assert not any(isinstance(constant, torch.Tensor) for constant in ready._constants)
    # upper case marks what is compiled in
    assert [n.isupper() for n in names] == sorted(n.isupper() for n in names)


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def further_apart(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 1:
        return x.repeat_interleave(2)[::2]
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


OTHERS = {
    "alignment": off_by_one,
    "stride": further_apart,
    "dtype": lambda x: x.to(torch.int32 if x.dtype == torch.long else torch.bfloat16),
    "rows": lambda x: torch.cat([x, x]),
    "width": lambda x: torch.cat([x, x], dim=-1),
}
OTHER_NUMBERS = {
    "eps": 1e-6,
    "needs_weight_grad": True,
    "inverse": True,
    "activation": "gelu",
    "rebuild": False,
    "softcap": 30.0,
    "logit_scale": 0.5,
    "writes_gradient": False,
}


@pytest.mark.parametrize("other", OTHERS)
@every_op
def test_another_layout_of_any_tensor_is_another_launch_or_refused(op, other, monkeypatch):
    fake, _ = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    for name, value in op.inputs().items():
        # a weight with gaps is copied: its layout is the first one's again
        if not isinstance(value, torch.Tensor) or (name, other) == ("weight", "stride"):
            continue
        seen = len(fake.first)
        try:
            op.run(**(op.inputs() | {name: OTHERS[other](value)}))
        except ValueError:
            continue
        assert len(fake.first) == seen + 1, name
    assert not fake.again


@every_op
def test_an_output_that_is_given_or_left_out_is_another_launch_or_refused(op, monkeypatch):
    fake, _ = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    inputs = op.inputs()
    like = next(iter(inputs.values()))
    optional = ("out", "h_out", "residual", "residual_grad", "normed", "d_gate", "d_up", "m", "k")
    for name in [name for name in optional if name in inputs]:
        seen = len(fake.first)
        changed = torch.empty_like(like) if inputs[name] is None else None
        try:
            op.run(**(op.inputs() | {name: changed}))
        except ValueError:
            continue
        assert len(fake.first) == seen + 1, name
    assert not fake.again


@every_op
def test_another_number_or_flag_is_another_launch(op, monkeypatch):
    fake, _ = replace_kernel(op, monkeypatch)
    inputs = op.inputs()
    op.run(**inputs)
    others = {n: v for n, v in OTHER_NUMBERS.items() if n in inputs and inputs[n] != v}
    if inputs.get("m") is not None:
        others.pop("rebuild")
    for count, (name, value) in enumerate(others.items(), start=2):
        op.run(**(op.inputs() | {name: value}))
        assert len(fake.first) == count, name
    assert not fake.again


@every_op
def test_no_rows_are_no_launch(op, monkeypatch):
    fake, _ = replace_kernel(op, monkeypatch)
    inputs = op.inputs()
    per_row = {n for n, v in inputs.items() if isinstance(v, torch.Tensor)}
    per_row -= {"weight", "cos", "sin"}
    for _ in range(2):
        op.run(**{n: v[:0] if n in per_row else v for n, v in inputs.items()})
    assert not fake.first and not fake.again and not kept(op)


@every_op
def test_the_torch_reference_runs_where_it_is_asked_for(op, monkeypatch):
    fake, _ = replace_kernel(op, monkeypatch)
    op.run(**op.inputs())
    with use_backend("torch"):
        op.run(**op.inputs())
    assert len(fake.first) == 1 and not fake.again


@pytest.mark.skipif(not (CAN_RUN_TRITON and is_interpreting()), reason="needs the interpreter")
@every_op
def test_nothing_is_kept_in_the_interpreter(op):
    op.run(**op.inputs())
    assert not kept(op)


def test_nothing_is_kept_of_a_triton_that_is_not_known(monkeypatch):
    monkeypatch.setattr(launch, "_CAN_REPEAT", False)
    ready, kernel = ReadyLaunches(), FakeKernel()
    ready.start("key", kernel, (1,), (rows(1),), ())
    assert len(kernel.first) == 1 and ready.get("key") is None


def test_a_kept_rotation_still_refuses_what_autograd_would_have_to_record(monkeypatch):
    fake, _ = replace_kernel(OPS["rope"], monkeypatch)
    inputs = rope_inputs(True)
    rope.rope_(**inputs)
    for name in ("q", "k"):
        wanting = inputs | {name: inputs[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} needs a gradient"):
            rope.rope_(**wanting)
        with torch.no_grad():
            rope.rope_(**wanting)
    assert len(fake.first) == 1 and len(fake.again) == 2


def test_a_weight_with_gaps_is_copied_for_a_kept_launch_too(monkeypatch):
    fake, names = replace_kernel(OPS["norm"], monkeypatch)
    inputs = norm_inputs(ROWS, WIDTH)
    norm(**inputs)
    weight = further_apart(inputs["weight"])
    norm(**(inputs | {"weight": weight}))
    assert len(fake.first) == 1
    assert fake.again[0][LEADING + names.index("weight")] != weight.data_ptr()


def test_partial_sums_of_a_kept_launch_have_a_row_for_each_of_its_programs(monkeypatch):
    replace_kernel(OPS["norm backward"], monkeypatch)
    inputs = norm_backward_inputs(5, 2048, dweight=True)
    norm_backward(**inputs)
    monkeypatch.setattr(rms_norm, "WEIGHT_GRAD_PROGRAMS", 2)
    shapes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: shapes.append(a) or empty(*a, **k))
    norm_backward(**inputs)
    (ready,) = kept(OPS["norm backward"]).values()
    assert ready.grid == (5, 1, 1) and shapes == [(5, 2048)]


def test_no_more_launches_are_kept_than_allowed(monkeypatch):
    assert launch.MOST_KEPT >= 1024  # a batch of every length up to that has its own
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    ready, kernel = ReadyLaunches(), FakeKernel()
    for key in range(8):
        ready.start(key, kernel, (1,), (rows(1),), (key,))
        assert len(ready._by_key) <= 3 and ready.get(key) is not None
    ready.get(7)(1)
    assert kernel.again[0][LEADING:] == (1, 7)


def test_a_launch_may_keep_its_addresses():
    x, kernel = rows(2), FakeKernel()
    start_repeatable(kernel, (4, 2), [x, None, 3, 0.5], num_warps=2)()
    assert kernel.first[0][2] == {"num_warps": 2}
    assert kernel.again[0][:3] == (4, 2, 1)
    assert kernel.again[0][LEADING:] == (x.data_ptr(), None, 3, 0.5)


def test_layout_and_address_of_what_is_not_there():
    assert layout(None) is None and address(None) is None
    assert layout(rows(2)) != layout(None) and address(x := rows(1)) == x.data_ptr()
