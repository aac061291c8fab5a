"""The chunked loss of the head against float64, stock torch and transformers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from colab_qlora.kernels import cross_entropy_rows as rows_module
from colab_qlora.kernels.backend import HAS_TRITON, use_backend
from colab_qlora.kernels.cross_entropy_rows import cross_entropy_rows_, gradient_scale
from colab_qlora.kernels.linear_cross_entropy import linear_cross_entropy
from colab_qlora.kernels.linear_cross_entropy_inputs import count_labels
from colab_qlora.kernels.logits_chunk import logits_chunk_rows

# several chunks of 16 rows, the fewest that are held
TINY_BUDGET = 1

# name: (shape of labels, width, vocab, options)
CASES: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "plain": ((2, 21), 63, 507, {}),
    "sequence": ((37,), 40, 1000, {}),
    "aligned": ((30,), 63, 123, {"shift": False}),
    "one row": ((1,), 33, 507, {"shift": False}),
    "several blocks": ((8,), 24, 5003, {"shift": False, "ignored": 0.0}),
    "chunks": ((3, 20), 63, 507, {"memory_budget_bytes": TINY_BUDGET}),
    "bias": ((2, 15), 63, 507, {"bias": True}),
    "softcap": ((2, 21), 63, 507, {"softcap": 3.0}),
    "all": (
        (3, 15),
        63,
        507,
        {
            "bias": True,
            "softcap": 5.0,
            "logit_scale": 0.25,
            "num_items_in_batch": 77,
            "memory_budget_bytes": TINY_BUDGET,
        },
    ),
}


def make(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    """[hidden, weight, bias or None, labels] and the options of a case."""
    shape, width, vocab, options = CASES[name]
    torch.manual_seed(seed)
    hidden = torch.randn(*shape, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype) if options.get("bias") else None
    labels = torch.randint(vocab, shape)
    if labels.numel() > 1:
        labels[torch.rand(shape) < options.get("ignored", 0.3)] = -100
        labels[..., 1] = vocab - 1
        labels[..., 2] = 0
    tensors = [None if x is None else x.to(DEVICE) for x in (hidden, weight, bias, labels)]
    return tensors, {k: v for k, v in options.items() if k not in ("bias", "ignored")}


def stock_loss(
    hidden, weight, labels, *, bias=None, shift=True, num_items_in_batch=None, softcap=None,
    logit_scale=1.0, ignore_index=-100, memory_budget_bytes=None,
):  # fmt: skip
    """All logits in the dtype, upcast, `F.cross_entropy`, as transformers computes it."""
    logits = F.linear(hidden, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.reshape(-1)
    n = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    logits = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / n


def with_gradients(loss_of, tensors, options, upstream=1.0) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of `upstream` times it for every float tensor."""
    hidden, weight, bias, labels = tensors
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    loss = loss_of(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    gradients = torch.autograd.grad(loss * upstream, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_float64(tensors: list[Any]) -> list[Any]:
    return [x if x is None or not x.is_floating_point() else x.double() for x in tensors]


def check_gradients(backend: str, dtype: torch.dtype, name: str) -> None:
    tensors, options = make(name, dtype)
    truth = with_gradients(stock_loss, in_float64(tensors), options)
    stock = with_gradients(stock_loss, tensors, options)
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, tensors, options)
    assert ours.keys() == truth.keys()
    # a float32 gradient is off by what its logits are off by. Each is a sum of `width` products,
    # which a GEMM adds up one after another or in parts: the padded rows of our logits may get
    # another GEMM than stock's do, whose bias is added elsewhere as well
    width = tensors[0].shape[-1]
    roundings = width**0.5 if dtype == torch.float32 else None
    for key in truth.keys() - {"loss"}:
        assert ours[key].dtype == dtype
        assert_as_exact_as_stock(ours[key], stock[key], truth[key], key, roundings=roundings)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_as_exact_as_stock(backend, dtype, name):
    check_gradients(backend, dtype, name)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_gradients_of_the_reference(name):
    check_gradients("torch", torch.bfloat16, name)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_as_exact_as_stock(backend, dtype, name):
    # eight losses, since the error of a single number is luck
    truth, stock, ours = [], [], []
    for seed in range(8):
        (hidden, weight, bias, labels), options = make(name, dtype, seed)
        exact = in_float64([hidden, weight, bias, labels])
        truth.append(stock_loss(exact[0], exact[1], labels, bias=exact[2], **options))
        stock.append(stock_loss(hidden, weight, labels, bias=bias, **options))
        with use_backend(backend):
            ours.append(linear_cross_entropy(hidden, weight, labels, bias=bias, **options))
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    assert_as_exact_as_stock(torch.stack(ours), torch.stack(stock), torch.stack(truth), "losses")


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_as_exact_as_stock_and_touch_nothing_else(backend, dtype, softcap, monkeypatch):
    monkeypatch.setattr(rows_module, "_REFERENCE_BLOCK_LOGITS", 3000)  # blocks of 2 rows and a rest
    torch.manual_seed(0)
    logits = (torch.randn(11, 1003) * 2).to(dtype).to(DEVICE)
    targets = torch.randint(1003, (11,), device=DEVICE)
    targets[:2] = torch.tensor([0, 1002])

    def autograd(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (logits * 0.5).detach().requires_grad_()
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        capped = capped if capped.dtype == torch.float64 else capped.float()
        losses = F.cross_entropy(capped, targets, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    truth, truth_gradient = autograd(logits.double())
    stock, stock_gradient = autograd(logits)
    buffer = torch.full((11, 1024), float("nan"), dtype=dtype, device=DEVICE)
    buffer[:, :1003] = logits
    losses = torch.full((11,), float("nan"), device=DEVICE)
    with use_backend(backend):
        cross_entropy_rows_(buffer[:, :1003], targets, losses, softcap=softcap, logit_scale=0.5)
    gradient = buffer[:, :1003].float() / gradient_scale(dtype)
    assert_as_exact_as_stock(losses, stock, truth, "losses")
    assert_as_exact_as_stock(gradient.to(dtype), stock_gradient, truth_gradient, "gradient")
    assert buffer[:, 1003:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_alone_are_the_same(backend):
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    with use_backend(backend):
        with_graph = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, weight, labels)
    assert with_graph.requires_grad and not alone.requires_grad
    assert relative_error(alone, with_graph) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_autograd(name):
    tensors, options = make(name, torch.float64)
    truth = with_gradients(stock_loss, tensors, options, upstream=3.0)
    ours = with_gradients(linear_cross_entropy, tensors, options, upstream=3.0)
    for key in truth:
        assert ours[key].dtype == torch.float64
        assert relative_error(ours[key], truth[key]) < 1e-12, key


@pytest.mark.parametrize("items", [None, 50])
def test_float64_equals_transformers(items, monkeypatch):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    # it upcasts logits by .float(), which would round float64 down
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    tensors, _ = make("plain", torch.float64)

    def theirs(hidden, weight, labels, bias=None, num_items_in_batch=None):
        logits = F.linear(hidden, weight, bias)
        return loss_utils.ForCausalLMLoss(logits, labels, weight.shape[0], num_items_in_batch)

    options = {"num_items_in_batch": items}
    truth = with_gradients(theirs, tensors, options)
    ours = with_gradients(linear_cross_entropy, tensors, options)
    for key in truth:
        assert truth[key].dtype == torch.float64
        assert relative_error(ours[key], truth[key]) < 1e-12, key


@pytest.mark.parametrize("name", ["plain", "bias", "softcap"])
def test_chunks_give_what_one_chunk_gives(name):
    tensors, options = make(name, torch.float64)
    whole = with_gradients(linear_cross_entropy, tensors, options)
    options["memory_budget_bytes"] = TINY_BUDGET
    parts = with_gradients(linear_cross_entropy, tensors, options)
    for key in whole:
        assert relative_error(parts[key], whole[key]) < 1e-14, key


@pytest.mark.parametrize("memory_budget_bytes", [None, TINY_BUDGET])
@pytest.mark.parametrize("items", [None, 0, 10, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 9), (0, 9), (2, 0), (0,), (1,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_label_gives_zero_and_no_nan(backend, shape, items, memory_budget_bytes):
    labels = torch.full(shape, -100, device=DEVICE)
    if shape == (1,):
        labels[0] = 3  # the only position of a sequence has no successor to predict
    tensors = [
        torch.randn(*shape, 8, device=DEVICE),
        torch.randn(50, 8, device=DEVICE),
        torch.randn(50, device=DEVICE),
        labels,
    ]
    options = {"num_items_in_batch": items, "memory_budget_bytes": memory_budget_bytes}
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, tensors, options)
    assert ours["hidden"].shape == (*shape, 8)
    for key, value in ours.items():
        assert torch.equal(value, torch.zeros_like(value)), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors(backend):
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    truth = with_gradients(linear_cross_entropy, [hidden, weight, None, labels], {})
    wide = torch.full((4, 21, 126), float("nan"), device=DEVICE)
    wide[::2, :, ::2] = hidden
    strided = [wide[::2, :, ::2], weight.T.contiguous().T, None, labels.T.contiguous().T]
    assert not any(x.is_contiguous() for x in strided if x is not None)
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, strided, {})
    for key in truth:
        assert relative_error(ours[key], truth[key]) < 1e-6, key


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    tensors, options = make("all", torch.float32)
    before = [x.clone() for x in tensors]
    with use_backend(backend):
        with_gradients(linear_cross_entropy, tensors, options)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight", "hidden bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    (hidden, weight, bias, labels), _ = make("bias", torch.float32)
    all_of_them = with_gradients(linear_cross_entropy, [hidden, weight, bias, labels], {})
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name in trained.split():
        leaves[name].requires_grad_()
    linear_cross_entropy(hidden, weight, labels, bias=bias).backward()
    for name, leaf in leaves.items():
        if name in trained.split():
            assert torch.equal(leaf.grad, all_of_them[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("upstream", [8192.0, 65536.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_float16_gradients(backend, upstream):
    # rows so sure of their label (its logit is 17, all others 0) that every other probability is
    # 4e-8, below float16's smallest number; together they still are the whole gradient
    torch.manual_seed(0)
    labels = torch.arange(24)
    weight = torch.cat([17.0 * torch.eye(507, 24), torch.randn(507, 40) + 1.0], dim=1)
    hidden = torch.eye(24, 64)
    tensors = [hidden.half().to(DEVICE), weight.half().to(DEVICE), None, labels.to(DEVICE)]
    options = {"shift": False, "num_items_in_batch": 2000}
    truth = with_gradients(stock_loss, in_float64(tensors), options, upstream)
    stock = with_gradients(stock_loss, tensors, options, upstream)
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, tensors, options, upstream)
    for key in ("hidden", "weight"):
        assert_as_exact_as_stock(ours[key], stock[key], truth[key], key)


class Calls(TorchDispatchMode):
    """Counts the matrix products, and keeps the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_products_and_memory():
    torch.manual_seed(0)
    hidden = torch.randn(100, 24, device=DEVICE, requires_grad=True)
    weight = torch.randn(507, 24, device=DEVICE)
    labels = torch.randint(507, (100,), device=DEVICE)
    labels[:60] = -100
    chunk = 16 * 512  # vocabulary rounded up to a multiple of 64
    with Calls() as calls:
        loss = linear_cross_entropy(hidden, weight, labels, memory_budget_bytes=TINY_BUDGET)
    assert calls.products == 2 * 3  # 40 labelled rows in 3 chunks
    assert calls.largest <= max(chunk, weight.numel())
    with Calls() as calls:
        loss.backward()
    assert calls.products == 0 and calls.largest <= hidden.numel()


@pytest.mark.parametrize("how", ["no_grad", "nothing trained"])
def test_evaluation_does_no_gradient_work(how):
    (hidden, weight, _, labels), options = make("chunks", torch.float32)
    rows = int((labels[:, 1:] != -100).sum())
    hidden.requires_grad_(how == "no_grad")
    with Calls() as calls, torch.set_grad_enabled(how != "no_grad"):
        loss = linear_cross_entropy(hidden, weight, labels, **options)
    assert loss.grad_fn is None
    assert rows > 16 and calls.products == -(-rows // 16)


def test_the_host_reads_the_device_once(monkeypatch):
    reads = []
    reading = ["tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "cpu"]
    for owner, name in [(torch, "nonzero"), *((torch.Tensor, name) for name in reading)]:
        original = getattr(owner, name)

        def counted(*args, original=original, name=name, **kwargs):
            reads.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    (hidden, weight, _, labels), options = make("chunks", torch.float32)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, **options).backward()
    assert reads == ["tolist"]


@pytest.mark.gpu
@pytest.mark.parametrize("counts_first", [False, True])
def test_nobody_waits_for_labels_that_were_counted_first(counts_first):
    (hidden, weight, _, labels), options = make("chunks", torch.float16)
    weight.requires_grad_()
    items = torch.tensor(40, device=DEVICE)
    given = count_labels(labels) if counts_first else labels

    def step() -> None:
        loss = linear_cross_entropy(
            hidden.requires_grad_(), weight, given, num_items_in_batch=items, **options
        )
        loss.backward()

    step()  # compiles
    waits = []
    event = torch.cuda.Event

    class Watched(event):
        def synchronize(self) -> None:
            waits.append(self.query())
            super().synchronize()

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.Event = Watched
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.Event = event
    assert not any("called a synchronizing" in str(w.message) for w in caught)
    # counted long ago, the event is not one of this step's; else it is waited for once
    assert len(waits) == (0 if counts_first else 1)


def test_labels_that_were_counted_first_give_the_same():
    (hidden, weight, bias, labels), options = make("bias", torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    counted = count_labels(labels)
    assert torch.equal(
        linear_cross_entropy(hidden, weight, counted, bias=bias, **options), expected
    )


@pytest.mark.parametrize(
    "items",
    [41, torch.tensor(41), torch.tensor([41]), torch.tensor(41.0), torch.tensor(41, device=DEVICE)],
    ids=["int", "0-dim", "one element", "float", "on the device"],
)
def test_num_items_in_batch(items):
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    total = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=1)
    loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=items)
    assert loss.item() == pytest.approx(total.item() / 41, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_other_integer_types_and_an_ignored_token(dtype):
    (hidden, weight, _, labels), _ = make("aligned", torch.float32)
    used = torch.where(labels == -100, 122, labels.clamp(max=121))
    expected = linear_cross_entropy(hidden, weight, torch.where(used == 122, -100, used))
    ours = linear_cross_entropy(hidden, weight, used.to(dtype), ignore_index=122)
    assert torch.equal(ours, expected)


def test_labels_may_lie_on_the_cpu():
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels.cpu()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_is_never_predicted(backend):
    tensors, _ = make("several blocks", torch.float32)
    bias = torch.zeros(5003, device=DEVICE)
    bias[:4500] = float("-inf")  # the whole first block
    labels = torch.where(tensors[3] == -100, -100, 4600)
    tensors = [*tensors[:2], bias, labels]
    truth = with_gradients(stock_loss, in_float64(tensors), {})
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, tensors, {})
    for key in truth:
        assert relative_error(ours[key], truth[key]) < 1e-6, key


def test_autocast_changes_nothing():
    tensors, options = make("all", torch.float32)
    expected = with_gradients(linear_cross_entropy, tensors, options)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = with_gradients(linear_cross_entropy, tensors, options)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_backward_twice():
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels) * scale
    gradient = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("label", "shown"), [(507, "to 507"), (-1, "from -1"), (-101, "from -101")]
)
def test_a_label_outside_the_vocabulary(label, shown):
    (hidden, weight, _, labels), _ = make("plain", torch.float32)
    labels[1, 5] = label
    with Calls() as calls, pytest.raises(ValueError, match=rf"labels .*{shown}.*0 to 506"):
        linear_cross_entropy(hidden, weight, labels)
    assert calls.products == 0
    labels[1, 5] = -100
    labels[:, 0] = 9999  # nobody predicts the first token
    linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(5)}, "hidden"),
        ({"hidden": torch.zeros(2, 5, 8, dtype=torch.int32)}, "hidden .*int32"),
        ({"weight": torch.zeros(50, 9)}, r"weight .*\(50, 9\).*\(vocab, 8\)"),
        ({"weight": torch.zeros(0, 8)}, r"weight .*\(0, 8\)"),
        ({"weight": torch.zeros(50, 8).half()}, "weight .*float16.*float32"),
        ({"bias": torch.zeros(49)}, r"bias .*\(49,\).*\(50,\)"),
        ({"bias": torch.zeros(50).double()}, "bias .*float64.*float32"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, r"labels .*\(2, 4\).*\(2, 5\)"),
        ({"labels": torch.zeros(2, 5)}, "labels .*float32"),
        ({"softcap": 0.0}, "softcap"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes"),
        ({"num_items_in_batch": 0}, "num_items_in_batch .*0"),
        ({"num_items_in_batch": torch.tensor([1, 2])}, "num_items_in_batch"),
    ],
)
def test_other_mistakes(changes, message):
    arguments = {
        "hidden": torch.zeros(2, 5, 8),
        "weight": torch.zeros(50, 8),
        "labels": torch.zeros(2, 5, dtype=torch.int64),
        **changes,
    }
    with Calls() as calls, pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
    assert calls.products == 0


def test_chunk_rows():
    assert logits_chunk_rows(128_256, 2) == 1024
    assert logits_chunk_rows(262_144, 2) == 512
    assert logits_chunk_rows(262_144, 4) == 256
    assert logits_chunk_rows(32_001, 2, 64 * 2 * 32_064) == 64
    assert logits_chunk_rows(32_001, 2, 64 * 2 * 32_064 - 1) == 48
    assert logits_chunk_rows(32_001, 2, TINY_BUDGET) == 16
    with pytest.raises(ValueError, match="memory_budget_bytes"):
        logits_chunk_rows(32_000, 2, -1)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_compile_cases_name_every_argument():
    for case in rows_module.compile_cases():
        assert [*case.signature, *case.constexprs] == list(case.kernel.arg_names)
        assert set(case.divisible_by_16) <= set(case.signature)
