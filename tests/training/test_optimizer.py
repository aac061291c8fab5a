"""The flat AdamW against torch's and bitsandbytes', its checkpoints, its place in the trainer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.teaching.memory import optimizer_state_bytes  # noqa: E402
from colab_qlora.training import adamw_moments  # noqa: E402
from colab_qlora.training import optimizer as optimizer_module  # noqa: E402
from colab_qlora.training.flat_parameters import ALIGNMENT, FlatParameters  # noqa: E402
from colab_qlora.training.optimizer import FlatAdamW  # noqa: E402
from colab_qlora.training.optimizer_choice import flat_adamw_for  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Parameters = list[torch.nn.Parameter]
Make = Callable[..., Any]

ODD_SHAPES = [(16, 33), (), (0,), (1,), (7, 3, 5), (0, 4), (257,), (64, 80)]
# 8-bit ones of whole blocks, as LoRA matrices are
WHOLE_SHAPES = [(16, 256), (512, 16), (64, 80), (4096,)]
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def make_parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in shapes
    ]


def twins(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[Parameters, Parameters]:
    return make_parameters(shapes, dtype), make_parameters(shapes, dtype)


def set_gradients(*lists: Parameters, step: int, without: Sequence[int] = ()) -> None:
    """The same gradients in every list, of very different sizes, and None for `without`."""
    for parameters in lists:
        generator = torch.Generator().manual_seed(1000 + step)
        for index, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator) * 10.0 ** (index % 5 - 3)
            p.grad = None if index in without else gradient.to(p)


def assert_close_if_decayed_late(one: torch.Tensor, other: torch.Tensor, steps: int) -> None:
    """Tensors of under 4,096 numbers: bitsandbytes' code for a GPU decays after the update.

    torch's AdamW, bitsandbytes on a CPU and ours decay before it. A step's update is about the
    learning rate a number, so the two part by lr * lr * weight_decay a step.
    """
    if DEVICE == "cpu":
        assert_close([one], [other], 2e-6)
        return
    apart = SETTINGS["lr"] ** 2 * SETTINGS["weight_decay"] * steps
    error = (one - other).double().square().mean().sqrt().item()
    assert error <= 1.5 * apart + 2e-6 * other.double().square().mean().sqrt().item()


def assert_close(ours: Parameters, theirs: Parameters, relative: float) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        error = (a - b).double().norm().item()
        assert error <= relative * b.double().norm().item(), (index, error)


def assert_equal(ours: Parameters, theirs: Parameters) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), (index, (a - b).abs().max())


def flats_of(optimizer: FlatAdamW) -> list[FlatParameters]:
    return [part.flat for parts in optimizer._parts for part in parts]


# ---- the arithmetic


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("dtype", "relative"),
    # the rounding of 20 steps
    [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)],
)
def test_32_bits_are_torch_adamw(
    dtype: torch.dtype, relative: float, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(adamw_moments, "FUSED_DEVICES", ())
    ours, theirs = twins(ODD_SHAPES, dtype)

    def groups(parameters: Parameters) -> list[dict]:
        return [
            {"params": parameters[:3], "weight_decay": 0.3},
            {"params": parameters[3:], "lr": 3e-3, "betas": (0.9, 0.99)},
        ]

    optimizer = FlatAdamW(groups(ours), **SETTINGS)
    # in bfloat16 torch's two forms drift apart by 5 %: one rounds between its operations
    kind = {"fused": fused} if dtype is torch.bfloat16 else {"foreach": False}
    stock = torch.optim.AdamW(groups(theirs), **SETTINGS, **kind)
    start = [p.detach().clone() for p in ours]
    for step in range(20):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        stock.step()
    assert_close(ours, theirs, relative)
    assert all(not torch.equal(a, b) for a, b in zip(ours, start, strict=True) if a.numel())


def test_dtypes_have_tensors_of_their_own() -> None:
    def mixed() -> Parameters:
        kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
        return [make_parameters([(9, 7)], kind, seed)[0] for seed, kind in enumerate(kinds)]

    ours, theirs = mixed(), mixed()
    optimizer, stock = FlatAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    assert len(flats_of(optimizer)) == 3
    for step in range(5):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        stock.step()
    for a, b, relative in zip(ours, theirs, (1e-6, 1e-2, 1e-14, 1e-6), strict=True):
        assert a.dtype == b.dtype
        assert_close([a], [b], relative)
        assert optimizer.state[a]["exp_avg"].dtype == a.dtype


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8_bits_are_bitsandbytes(weight_decay: float) -> None:
    settings = {**SETTINGS, "weight_decay": weight_decay}
    ours, theirs = twins(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **settings, bits=8)
    stock = bitsandbytes.optim.AdamW8bit(theirs, **settings)
    for step in range(8):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        stock.step()
    assert_equal(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert optimizer.state[a].keys() == stock.state[b].keys()
        for name, value in stock.state[b].items():
            mine = optimizer.state[a][name]
            assert torch.equal(mine, value) if torch.is_tensor(value) else mine == value, name


def test_8_bits_of_sizes_that_fill_no_block() -> None:
    ours, theirs = twins([(4100,), (3, 2001), (4096,), (5, 7)])  # the last one stays in 32 bits
    optimizer = FlatAdamW(ours, **SETTINGS, bits=8)
    stock = bitsandbytes.optim.AdamW8bit(theirs, **SETTINGS)
    for step in range(8):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        stock.step()
    assert_close(ours[:3], theirs[:3], 1e-6)
    assert_close_if_decayed_late(ours[3], theirs[3], steps=8)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert optimizer.state[a]["absmax1"].shape == stock.state[b]["absmax1"].shape
        differing = (optimizer.state[a]["state1"] != stock.state[b]["state1"]).float().mean()
        assert differing < 1e-3
    assert optimizer.state[ours[3]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_tensor_can_hold_no_more_than_bitsandbytes_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer_module, "MOST_NUMBERS", 10_000)
    ours, theirs = twins(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=8)
    assert [len(flat.parameters) for flat in flats_of(optimizer)] == [1, 1, 2]
    monkeypatch.setattr(optimizer_module, "MOST_NUMBERS", 15_000)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=8)
    assert [len(flat.parameters) for flat in flats_of(optimizer)] == [2, 2]
    whole = FlatAdamW(theirs, **SETTINGS, bits=8)
    set_gradients(ours, theirs, step=0)
    optimizer.step()
    whole.step()
    assert_equal(ours, theirs)


# ---- parameters without a gradient


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_without_a_gradient_do_not_move(bits: int) -> None:
    ours, theirs = twins(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=bits)
    stock = (torch.optim.AdamW if bits == 32 else bitsandbytes.optim.AdamW8bit)(theirs, **SETTINGS)
    for step, without in enumerate([(1,), (0, 3), (), (2, 3), (0, 1, 2, 3), (1, 2), ()]):
        set_gradients(ours, theirs, step=step, without=without)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        stock.step()
        for index in without:
            assert torch.equal(ours[index], before[index]), (step, index)
            assert ours[index].grad is None
        if step == 0:
            assert len(optimizer.state) == 3
            assert ours[1] not in optimizer.state
    assert [optimizer.state[p]["step"] for p in ours] == [5, 4, 4, 4]
    assert_close(ours, theirs, 2e-6)


def test_frozen_parameters_stay() -> None:
    ours = make_parameters([(9,), (8,)])
    ours[0].requires_grad_(False)
    before = ours[0].clone()
    optimizer = FlatAdamW(ours, **SETTINGS)
    optimizer.attach_gradients()
    ours[1].square().sum().backward()
    optimizer.step()
    assert ours[0].grad is None
    assert torch.equal(ours[0], before)


# ---- memory and layout


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_are_aligned_views_with_zeros_between(bits: int) -> None:
    parameters = make_parameters([(5000,), (), (0,), (16, 33), (64, 80)])
    parameters[4].data = parameters[4].data.t()  # not contiguous
    before = [p.detach().clone() for p in parameters]
    optimizer = FlatAdamW(parameters, **SETTINGS, bits=bits)
    assert_equal(parameters, before)
    optimizer.attach_gradients()
    for step in range(3):
        set_gradients(parameters, step=step)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    for flat in flats_of(optimizer):
        gaps = torch.ones_like(flat.values, dtype=torch.bool)
        for slot, p in zip(flat.slots, flat.parameters, strict=True):
            assert slot.start % ALIGNMENT == 0
            if p.numel():
                assert p.data_ptr() == flat.values.data_ptr() + slot.start * p.element_size()
                assert p.data_ptr() % 16 == 0
            gaps[slot.start : slot.start + slot.numbers] = False
        assert gaps.any()
        assert not flat.gradient[gaps].any()
        if bits == 32 or DEVICE == "cuda":  # bitsandbytes on the CPU has no exact zero
            assert not flat.values[gaps].any()


@pytest.mark.parametrize("bits", [8, 32])
def test_state_takes_the_bytes_that_the_memory_plan_says(bits: int) -> None:
    parameters = make_parameters([*WHOLE_SHAPES, (16, 16)])
    optimizer = FlatAdamW(parameters, lr=1e-3, bits=bits)
    set_gradients(parameters, step=0)
    optimizer.step()
    storages = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and not name.startswith("qmap"):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) == sum(optimizer_state_bytes(p.numel(), bits) for p in parameters)


NO_LAUNCH = ("as_strided", "slice", "view", "detach", "alias", "promote_types", "profiler")


def test_a_step_is_few_launches_however_many_tensors() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            # views launch nothing
            if not any(word in str(func) for word in NO_LAUNCH):
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    counts = {}
    for tensors in (3, 60):
        for bits in (8, 32):
            parameters = make_parameters([(16, 256)] * tensors)
            optimizer = FlatAdamW(parameters, **SETTINGS, bits=bits)
            for step in range(2):  # the first one makes the state
                set_gradients(parameters, step=step)
                with Count() as count:
                    optimizer.clip_grad_norm_(1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            counts[tensors, bits] = len(count.names)
    assert counts[3, 8] == counts[60, 8] <= 10, count.names
    assert counts[3, 32] == counts[60, 32] <= 10, count.names


def test_gradient_tensor_is_there_only_when_needed() -> None:
    parameters = make_parameters(WHOLE_SHAPES)
    optimizer = FlatAdamW(parameters, **SETTINGS)
    (flat,) = flats_of(optimizer)
    assert flat.gradient is None
    set_gradients(parameters, step=0)
    optimizer.clip_grad_norm_(1.0)
    assert flat.gradient is not None
    optimizer.step()
    assert flat.gradient is None
    optimizer.attach_gradients()
    optimizer.step()
    assert flat.gradient is not None
    optimizer.zero_grad()
    assert flat.gradient is None


# ---- memory that someone else re-points


@pytest.mark.parametrize("bits", [8, 32])
def test_repointed_parameters_are_adopted_again(bits: int) -> None:
    ours, theirs = twins(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=bits)
    other = FlatAdamW(theirs, **SETTINGS, bits=bits)
    for step in range(6):
        set_gradients(ours, theirs, step=step)
        if step == 2:
            ours[1].data = ours[1].data.clone()
        if step == 4:
            for p in ours:
                p.data = p.data.clone()
            optimizer.clip_grad_norm_(1e9)
        optimizer.step()
        other.step()
    assert_equal(ours, theirs)
    assert [optimizer.state[p]["step"] for p in ours] == [6] * 4
    values = flats_of(optimizer)[0].values
    pointers = {p.untyped_storage().data_ptr() for p in ours}
    assert pointers == {values.untyped_storage().data_ptr()}


def test_a_cast_model_is_adopted_again() -> None:
    ours, theirs = twins([(4, 9), (300,)])
    optimizer, stock = FlatAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    set_gradients(ours, theirs, step=0)
    optimizer.step()
    stock.step()
    for p in (*ours, *theirs):
        p.grad = None
        p.data = p.data.double()
    stock.load_state_dict(stock.state_dict())  # casts torch's state
    set_gradients(ours, theirs, step=1)
    optimizer.step()
    stock.step()
    assert_close(ours, theirs, 1e-7)
    assert optimizer.state[ours[0]]["exp_avg"].dtype == torch.float64


@pytest.mark.gpu
def test_a_moved_model_is_adopted_again() -> None:
    model = torch.nn.Linear(64, 80).to(DEVICE)
    optimizer = FlatAdamW(model.parameters(), **SETTINGS, bits=8)
    for device in ("cuda", "cpu", "cuda"):
        model.to(device)
        optimizer.zero_grad()
        model(torch.ones(1, 64, device=device)).sum().backward()
        optimizer.step()
        assert {flat.values.device.type for flat in flats_of(optimizer)} == {device}
    assert optimizer.state[model.weight]["step"] == 3


def test_a_parameter_of_another_shape_is_refused() -> None:
    (parameter,) = make_parameters([(6,)])
    optimizer = FlatAdamW([parameter], **SETTINGS)
    set_gradients([parameter], step=0)
    optimizer.step()
    parameter.grad = None
    parameter.data = torch.ones(3, device=DEVICE)
    parameter.grad = torch.ones(3, device=DEVICE)
    with pytest.raises(UserError, match="another shape"):
        optimizer.step()


def test_autograd_notices_a_step_between_forward_and_backward() -> None:
    (parameter,) = make_parameters([(6,)])
    optimizer = FlatAdamW([parameter], **SETTINGS)
    loss = parameter.square().sum()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- gradients


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    return torch.nn.Sequential(*layers).to(DEVICE)


@pytest.mark.parametrize("how", ["model", "none", "zero", "attach"])
def test_every_way_of_zeroing(how: str) -> None:
    ours, theirs = _model(), _model()
    optimizer = FlatAdamW(ours.parameters(), **SETTINGS)
    stock = torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    if how == "attach":
        optimizer.attach_gradients()
    for step in range(4):
        for part in range(2):  # accumulated over two batches
            batch = torch.full((2, 8), 1.0 + step + part, device=DEVICE)
            for model in (ours, theirs):
                model(batch).square().mean().backward()
        if how == "attach":
            gradient = flats_of(optimizer)[0].gradient
            assert all(
                p.grad.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
                for p in ours.parameters()
            )
        optimizer.step()
        stock.step()
        stock.zero_grad()
        if how == "model":
            ours.zero_grad()
            assert all(p.grad is None for p in ours.parameters())
        elif how == "none":
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in ours.parameters())
        elif how == "zero":
            optimizer.zero_grad(set_to_none=False)
            assert not any(p.grad.any() for p in ours.parameters())
        else:
            optimizer.attach_gradients()
            assert not any(p.grad.any() for p in ours.parameters())
    assert_close(list(ours.parameters()), list(theirs.parameters()), 2e-6)


def test_stale_gradients_do_not_count() -> None:
    parameters = make_parameters([(300,), (4, 5)])
    optimizer = FlatAdamW(parameters, **SETTINGS)
    optimizer.attach_gradients()
    set_gradients(parameters, step=0)
    optimizer.clip_grad_norm_(1.0)
    parameters[0].grad = None  # its place in the flat gradient holds a value still
    expected = parameters[1].grad.norm()
    assert torch.allclose(optimizer.clip_grad_norm_(1.0), expected)


def test_strided_gradients() -> None:
    ours, theirs = twins([(6, 8)])
    optimizer, stock = FlatAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    gradient = torch.randn(8, 6, device=DEVICE).t()
    ours[0].grad, theirs[0].grad = gradient, gradient.clone()
    optimizer.step()
    stock.step()
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1e-4, 1e9])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours, theirs = twins([*WHOLE_SHAPES, (5, 7), ()])
    optimizer = FlatAdamW(ours, **SETTINGS)
    set_gradients(ours, theirs, step=0, without=[1])
    before = [None if p.grad is None else p.grad.clone() for p in ours]
    norm = optimizer.clip_grad_norm_(max_norm)
    stock = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == torch.float32
    assert torch.allclose(norm, stock, rtol=1e-6, atol=0)
    assert ours[1].grad is None
    for a, b, untouched in zip(ours, theirs, before, strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=2e-6, atol=0)
            assert max_norm < 1e9 or torch.equal(a.grad, untouched)
    start = ours[0].detach().clone()
    optimizer.step()  # the clipped gradients are those that count
    moment = torch.zeros_like(start).lerp_(ours[0].grad, 1 - SETTINGS["betas"][0])
    # a GPU may round once where torch's own operations round twice
    assert torch.allclose(optimizer.state[ours[0]]["exp_avg"], moment, rtol=3e-7, atol=0)


def test_norm_over_groups_and_dtypes() -> None:
    ours = [*make_parameters([(300,)]), *make_parameters([(50,)], torch.bfloat16, 1)]
    theirs = [p.detach().clone() for p in ours]
    optimizer = FlatAdamW([{"params": ours[:1]}, {"params": ours[1:]}], **SETTINGS)
    set_gradients(ours, theirs, step=0)
    assert torch.allclose(
        optimizer.clip_grad_norm_(1e-2), torch.cat([t.grad.float() for t in theirs]).norm()
    )
    clipped = torch.cat([p.grad.float() for p in ours]).norm().item()
    assert clipped == pytest.approx(1e-2, rel=1e-2)  # bfloat16's rounding


def test_norm_of_many_numbers_is_exact() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2**22, device=DEVICE))
    optimizer = FlatAdamW([parameter], **SETTINGS)
    parameter.grad = torch.rand(2**22, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = parameter.grad.double().norm().item()
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(exact, rel=1e-6)


def test_gradients_that_are_not_finite_are_passed_on_as_by_torch() -> None:
    for bad in (float("inf"), float("nan")):
        ours, theirs = twins([(4,), (5,)])
        optimizer = FlatAdamW(ours, **SETTINGS)
        set_gradients(ours, theirs, step=0)
        for parameters in (ours, theirs):
            parameters[0].grad[1] = bad
        norm = optimizer.clip_grad_norm_(1.0)
        stock = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert torch.equal(norm.isnan(), stock.isnan()) and torch.equal(norm.isinf(), stock.isinf())
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.grad.isnan(), b.grad.isnan())


def test_nothing_to_clip() -> None:
    optimizer = FlatAdamW(make_parameters([(3,)]), **SETTINGS)
    assert optimizer.clip_grad_norm_(1.0).item() == 0
    with pytest.raises(UserError, match="max_norm is not positive: got 0"):
        optimizer.clip_grad_norm_(0)


# ---- what goes with an optimiser


def test_gradient_scaler_skips_a_step_that_overflows() -> None:
    ours, theirs = twins(WHOLE_SHAPES)
    optimizer, stock = FlatAdamW(ours, **SETTINGS), FlatAdamW(theirs, **SETTINGS)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        set_gradients(ours, theirs, step=step)
        for p in ours:
            p.grad = scaler.scale(p.grad)
        if step == 2:
            ours[2].grad[3, 4] = float("inf")
        before = [p.detach().clone() for p in ours]
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_equal(ours, before)
        else:
            stock.clip_grad_norm_(1.0)
            stock.step()
    assert scaler.get_scale() == 512.0
    assert_equal(ours, theirs)


def test_learning_rate_schedule_and_closure() -> None:
    ours, theirs = twins([(40, 8)])
    optimizer, stock = FlatAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (optimizer, stock)]

    def closure(parameters: Parameters) -> Any:
        parameters[0].grad = None
        loss = (parameters[0] - 2).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        loss = optimizer.step(lambda: closure(ours))
        other = stock.step(lambda: closure(theirs))
        assert loss.item() == pytest.approx(other.item(), rel=1e-5)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert_close(ours, theirs, 2e-6)


def test_groups_can_be_added() -> None:
    ours, theirs = twins([(9,), (300, 2)])
    optimizer, stock = FlatAdamW(ours[:1], **SETTINGS), torch.optim.AdamW(theirs[:1], **SETTINGS)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": ours[1:], "lr": 0.1})
            stock.add_param_group({"params": theirs[1:], "lr": 0.1})
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        stock.step()
    assert_close(ours, theirs, 2e-6)
    with pytest.raises(UserError, match=r"shape \(2,\) is not floating point: got torch.int64"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2).long(), False)]})
    optimizer.step()
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "no such optimiser state: got 4 bits"),
        ({"lr": -1.0}, "lr is negative"),
        ({"eps": float("nan")}, "eps is negative"),
        ({"weight_decay": -0.1}, "weight_decay is negative"),
        ({"betas": (0.9, 1.0)}, "betas are out of range"),
    ],
)
def test_wrong_hyperparameters(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlatAdamW(make_parameters([(3,)]), **{**SETTINGS, **change})


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("where", ["gather", "moments"])
def test_out_of_memory_leaves_it_usable(
    bits: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = twins([*WHOLE_SHAPES, (5, 7)])
    half = len(ours) // 2

    def build(parameters: Parameters) -> FlatAdamW:
        groups = [{"params": parameters[:half]}, {"params": parameters[half:]}]
        return FlatAdamW(groups, **SETTINGS, bits=bits)

    optimizer, other = build(ours), build(theirs)
    before = [p.detach().clone() for p in ours]
    calls = []
    stock = torch.zeros_like

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == (2 if where == "gather" else 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(*args, **kwargs)

    set_gradients(ours, theirs, step=0)
    monkeypatch.setattr(torch, "zeros_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    monkeypatch.undo()
    assert_equal(ours, before)
    for step in range(3):
        if step:
            set_gradients(ours, theirs, step=step)
        optimizer.step()
        other.step()
    assert_equal(ours, theirs)


# ---- checkpoints


def saved_and_loaded(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location="cpu")


def train(optimizer: Any, parameters: Parameters, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step=step, without=[1] if step == 0 else [])
        optimizer.step()


# the last one ends within a block
CHECKPOINT_SHAPES = [*WHOLE_SHAPES, (5, 7), (), (4100,)]


@pytest.mark.parametrize("bits", [8, 32])
def test_resumed_run_is_bitwise_the_unbroken_one(bits: int) -> None:
    whole, first = twins(CHECKPOINT_SHAPES)
    unbroken = FlatAdamW(whole, **SETTINGS, bits=bits)
    train(unbroken, whole, range(6))
    optimizer = FlatAdamW(first, **SETTINGS, bits=bits)
    train(optimizer, first, range(3))
    state = saved_and_loaded(optimizer.state_dict())
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = FlatAdamW(second, lr=7.0, bits=bits)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == SETTINGS["lr"]
    train(resumed, second, range(3, 6))
    assert_equal(second, whole)
    for a, b in zip(second, whole, strict=True):
        for name, value in unbroken.state[b].items():
            mine = resumed.state[a][name]
            assert torch.equal(mine, value) if torch.is_tensor(value) else mine == value


@pytest.mark.parametrize("bits", [8, 32])
def test_loading_one_own_state_changes_nothing(bits: int) -> None:
    whole, ours = twins(CHECKPOINT_SHAPES)
    unbroken = FlatAdamW(whole, **SETTINGS, bits=bits)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=bits)
    for step in range(4):
        train(unbroken, whole, range(step, step + 1))
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, ours, range(step, step + 1))
    assert_equal(ours, whole)


def test_state_does_not_depend_on_the_order_in_the_flat_tensor() -> None:
    whole, first = twins([(300,), (64, 80), (16,), (4096,)])
    unbroken = FlatAdamW(whole, **SETTINGS)
    train(unbroken, whole, range(6))
    optimizer = FlatAdamW(first, **SETTINGS)
    train(optimizer, first, range(3))
    state = saved_and_loaded(optimizer.state_dict())
    order = [2, 0, 3, 1]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = FlatAdamW([second[i] for i in order], **SETTINGS)
    state["state"] = {place: state["state"][i] for place, i in enumerate(order)}
    resumed.load_state_dict(state)
    train(resumed, second, range(3, 6))
    assert_close(second, whole, 1e-7)  # where a vector instruction ends may round otherwise


def test_parameters_that_a_state_lacks_begin_anew() -> None:
    ours = make_parameters(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=8)
    train(optimizer, ours, range(3))
    state = optimizer.state_dict()
    del state["state"][2]
    optimizer.load_state_dict(state)
    assert ours[2] not in optimizer.state
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    fresh = FlatAdamW(theirs, **SETTINGS, bits=8)
    set_gradients(ours, theirs, step=9)
    optimizer.step()
    fresh.step()
    assert torch.equal(ours[2], theirs[2])
    assert not torch.equal(ours[0], theirs[0])
    assert [optimizer.state[p]["step"] for p in ours] == [4, 3, 1, 4]


@pytest.mark.parametrize("to_ours", [True, False])
@pytest.mark.parametrize("bits", [8, 32])
def test_checkpoints_go_from_and_to_the_stock_optimisers(bits: int, to_ours: bool) -> None:
    stock = torch.optim.AdamW if bits == 32 else bitsandbytes.optim.AdamW8bit

    def build(parameters: Parameters, flat: bool) -> Any:
        if flat:
            return FlatAdamW(parameters, **SETTINGS, bits=bits)
        return stock(parameters, **SETTINGS)

    whole, first = twins([*WHOLE_SHAPES, (5, 7)])
    unbroken = build(whole, False)
    train(unbroken, whole, range(6))
    optimizer = build(first, not to_ours)
    train(optimizer, first, range(3))
    state = saved_and_loaded(optimizer.state_dict())
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = build(second, to_ours)
    if bits == 8 and not to_ours:
        # bitsandbytes calls the 32-bit moments of a small tensor otherwise
        small = state["state"][4]
        small["state1"], small["state2"] = small.pop("exp_avg"), small.pop("exp_avg_sq")
    resumed.load_state_dict(state)
    train(resumed, second, range(3, 6))
    if bits == 8:
        assert_equal(second[:4], whole[:4])
        assert_close_if_decayed_late(second[4], whole[4], steps=6)
    else:
        assert_close(second, whole, 2e-6)


def test_states_of_another_kind_are_refused_and_change_nothing() -> None:
    ours = make_parameters(WHOLE_SHAPES)
    optimizer = FlatAdamW(ours, **SETTINGS, bits=8)
    train(optimizer, ours, range(3))
    state = saved_and_loaded(optimizer.state_dict())
    whole = FlatAdamW(make_parameters(WHOLE_SHAPES), bits=32)
    with pytest.raises(UserError, match="of another kind: got absmax1, .* Resume with the model"):
        whole.load_state_dict(state)

    broken = []
    for key, change in [
        ("absmax1", torch.zeros(2)),
        ("state2", torch.zeros(4, dtype=torch.uint8)),
        ("qmap1", torch.zeros(256)),
    ]:
        entry = {**state["state"][3], key: change}
        broken.append(({**state, "state": {**state["state"], 3: entry}}, f"{key} of a parameter"))
    group = {**state["param_groups"][0], "amsgrad": True}
    broken.append(({**state, "param_groups": [group]}, "AdamW with amsgrad"))
    before = saved_and_loaded(optimizer.state_dict())
    for damaged, message in broken:
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(damaged)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**state, "param_groups": state["param_groups"] * 2})
    after = optimizer.state_dict()
    for index, entry in before["state"].items():
        for name, value in entry.items():
            now = after["state"][index][name]
            assert torch.equal(now.cpu(), value) if torch.is_tensor(value) else now == value


# ---- in the trainer


def _arguments(**change: Any) -> SimpleNamespace:
    betas = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    rest = {"learning_rate": 0.5, "world_size": 1, "deepspeed": None, "fsdp": [], **betas}
    return SimpleNamespace(**{"optim": "adamw_8bit", **rest, **change})


def _adapted(*names: str) -> torch.nn.Module:
    model = torch.nn.ParameterDict({name: torch.zeros(2) for name in names})
    model.peft_config = {}
    return model


def test_the_choice() -> None:
    lora = _adapted("lora_A", "lora_B")
    kind, arguments = flat_adamw_for(_arguments(), lora)
    assert kind is FlatAdamW
    assert arguments == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "bits": 8}
    for optim, bits in [("adamw_bnb_8bit", 8), ("adamw_torch", 32), ("adamw_torch_fused", 32)]:
        assert flat_adamw_for(_arguments(optim=optim), lora)[1]["bits"] == bits
    for change in ({"optim": "sgd"}, {"optim": "paged_adamw_8bit"}, {"world_size": 2}):
        assert flat_adamw_for(_arguments(**change), lora) is None
    assert flat_adamw_for(_arguments(), _adapted("lora_A", "embed_tokens")) is None
    assert flat_adamw_for(_arguments(), torch.nn.Linear(2, 2)) is None


@pytest.mark.model
def test_trainer_learns_with_it_as_with_the_stock_one(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer_helpers import losses_of

    from colab_qlora.training import fused_trainer as trainer_module

    clipped = []
    clip = FlatAdamW.clip_grad_norm_

    def spy(self: FlatAdamW, max_norm: float) -> torch.Tensor:
        clipped.append(max_norm)
        return clip(self, max_norm)

    monkeypatch.setattr(FlatAdamW, "clip_grad_norm_", spy)
    # at this rank some matrices have 4096 numbers or more, and some fewer
    settings = {"lora": {"r": 64}, "max_grad_norm": 0.25, "max_steps": 2}
    ours = make_trainer(tmp_path / "ours", **settings)
    names = list(ours.model.state_dict())
    ours.train()
    optimizer = ours.optimizer.optimizer
    assert isinstance(optimizer, FlatAdamW)
    assert {part.bits for part in optimizer._parts[0]} == {8, 32}
    assert clipped == [0.25] * 2
    assert sum("FlatAdamW" in note for note in ours.notes) == 1
    assert list(ours.model.state_dict()) == names

    monkeypatch.setattr(trainer_module, "flat_adamw_for", lambda *args: None)
    stock = make_trainer(tmp_path / "stock", **settings)
    stock.train()
    assert not isinstance(stock.optimizer.optimizer, FlatAdamW)
    assert not any("FlatAdamW" in note for note in stock.notes)
    assert len(clipped) == 2
    assert losses_of(ours) == pytest.approx(losses_of(stock), rel=1e-4)
    norms = [[e["grad_norm"] for e in t.state.log_history if "loss" in e] for t in (ours, stock)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
