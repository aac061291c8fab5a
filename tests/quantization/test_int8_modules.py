"""Int8 linears and embeddings: values, moves and casts, copies, PEFT around them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from colab_qlora.errors import UserError
from colab_qlora.kernels import int8_linear
from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting, use_backend
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear, tie
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (not is_interpreting() and DEVICE == "cpu"),
    reason="needs Triton with a GPU or its interpreter",
)


def linear(rows=37, columns=24, dtype=torch.float32, bias=True, **options) -> Int8Linear:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    made = Int8Linear.from_weight(weight, torch.randn(rows).to(dtype) if bias else None, **options)
    return made.to(DEVICE)


def embedding(rows=37, columns=24, dtype=torch.float32, **options) -> Int8Embedding:
    torch.manual_seed(0)
    return Int8Embedding.from_weight(torch.randn(rows, columns).to(dtype), **options).to(DEVICE)


def tied(dtype=torch.float32) -> torch.nn.ModuleDict:
    both = torch.nn.ModuleDict({"embed": embedding(dtype=dtype), "head": linear(dtype=dtype)})
    tie(both["embed"], both["head"])
    return both


def dense_twin(module: Int8Linear, dtype: torch.dtype) -> torch.nn.Linear:
    twin = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
    twin = twin.to(DEVICE, dtype).requires_grad_(False)
    twin.weight.copy_(decode_int8(module.weight, module.SCB, dtype))
    if module.bias is not None:
        twin.bias.copy_(module.bias)
    return twin


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (1,), (), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients_are_those_of_the_decoded_weight(dtype, shape, bias):
    module = linear(bias=bias).to(dtype)
    twin = dense_twin(module, dtype)
    for part in (module, twin):
        if bias:
            part.bias.requires_grad_()
    x = torch.randn(*shape, 24).to(DEVICE, dtype)
    ones, twos = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = module(ones), twin(twos)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    dy = torch.randn_like(ours)
    ours.backward(dy)
    theirs.backward(dy)
    assert torch.equal(ones.grad, twos.grad)
    if bias:
        torch.testing.assert_close(module.bias.grad, twin.bias.grad)


def test_the_decoded_weight_is_not_kept_for_the_backward_pass():
    module, kept = linear(), []
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(x).sum().backward()
    assert kept == [] and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_too_large_to_be_decoded_whole(monkeypatch, dtype):
    module = linear(200, 24).to(dtype)
    x = torch.randn(5, 24).to(DEVICE, dtype)
    truth_x = x.double().requires_grad_()
    exact = decode_int8(module.weight, module.SCB, torch.float64)
    truth = F.linear(truth_x, exact, module.bias.double())
    dy = torch.randn(5, 200).to(DEVICE, dtype)
    truth.backward(dy.double())

    def errors():
        seen = x.clone().requires_grad_()
        y = module(seen)
        y.backward(dy)
        pairs = ((y.detach(), truth.detach()), (seen.grad, truth_x.grad))
        return [float((a.double() - b).norm()) for a, b in pairs]

    whole = errors()
    monkeypatch.setattr(int8_linear, "MOST_DECODED_BYTES", 1)
    sizes = [float(truth.detach().norm()), float(truth_x.grad.norm())]
    for ours, theirs, size in zip(errors(), whole, sizes, strict=True):
        assert ours <= 1.1 * theirs + torch.finfo(dtype).eps / 2 * size


def test_autocast_computes_in_its_own_dtype():
    module = linear()
    twin = dense_twin(module, torch.float32)
    x = torch.randn(3, 24, device=DEVICE)
    ones, twos = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours, theirs = module(ones), twin(twos)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    assert ones.grad.dtype == torch.float32 and torch.equal(ones.grad, twos.grad)


@needs_triton
def test_the_kernel_gives_every_bit_of_the_reference():
    module, x = linear(), torch.randn(3, 24, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            results.append((module(x), module.decoded(torch.float16)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(2, 5), (1,), (), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embedding_picks_decoded_rows(dtype, shape):
    module = embedding(dtype=dtype, padding_idx=3)
    ids = torch.randint(37, shape, device=DEVICE)
    expected = F.embedding(ids, decode_int8(module.weight, module.SCB, dtype))
    assert torch.equal(module(ids), expected) and module(ids).dtype == dtype
    assert module.padding_idx == 3 and "padding_idx=3" in repr(module)


def test_sizes_names_and_dtypes_of_the_tensors():
    module = linear(dtype=torch.bfloat16)
    assert isinstance(module, torch.nn.Linear) and type(module.weight) is torch.nn.Parameter
    assert (module.in_features, module.out_features) == (24, 37)
    assert module.weight.dtype == torch.int8 and not module.weight.requires_grad
    assert dict(module.named_buffers()).keys() == {"SCB"} and module.SCB.dtype == torch.float32
    assert module.compute_dtype == module.decoded().dtype == torch.bfloat16
    assert linear(compute_dtype=torch.float16).compute_dtype == torch.float16
    codes, absmax = encode_int8(torch.randn(5, 8))
    assert Int8Linear.from_codes(codes, absmax).compute_dtype == torch.get_default_dtype()
    assert Int8Linear.from_codes(codes, absmax).weight.data_ptr() == codes.data_ptr()
    table = Int8Embedding.from_codes(codes, absmax, 1, torch.float16)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (5, 8, 1)


@pytest.mark.parametrize("make", [linear, embedding])
def test_statistics_find_the_module(make):
    module = torch.nn.ModuleDict({"one": make(), "two": torch.nn.Linear(3, 3)})
    assert [item.name for item in weight_items(module)] == ["one", "two"]


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.half().float(), torch.float32),
    "to dtype": (lambda m: m.to(torch.float16), torch.float16),
    "to both": (lambda m: m.to(DEVICE, torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "device": (lambda m: m.to(DEVICE), torch.bfloat16),
    "shared": (lambda m: m.cpu().share_memory(), torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("make", [linear, embedding])
def test_casts_leave_codes_and_scales_alone(make, cast):
    module = make(dtype=torch.bfloat16)
    codes, absmax = module.weight.clone(), module.SCB.clone()
    change, dtype = CASTS[cast]
    assert change(module) is module
    assert torch.equal(module.weight, codes.to(module.weight.device))
    assert module.SCB.dtype == torch.float32
    assert torch.equal(module.SCB, absmax.to(module.SCB.device))
    assert module.compute_dtype == dtype
    if make is linear:
        assert module.bias.dtype == dtype and not module.weight.requires_grad


def test_a_module_made_on_the_meta_device_is_filled_later():
    module = Int8Linear(24, 37, device="meta", compute_dtype=torch.float16)
    filled = module.to_empty(device=DEVICE)
    filled.load_state_dict(linear(dtype=torch.float16).state_dict())
    assert torch.equal(filled.decoded(), linear(dtype=torch.float16).decoded())
    assert type(linear().to("meta").weight) is torch.nn.Parameter


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_whole_and_apart(name):
    module = linear(dtype=torch.bfloat16)
    made = COPIES[name](module)
    assert type(made) is Int8Linear and made.compute_dtype == torch.bfloat16
    assert torch.equal(made.decoded(), module.decoded()) and torch.equal(made.bias, module.bias)
    assert made.weight.dtype == torch.int8 and not made.weight.requires_grad
    assert made.weight.data_ptr() != module.weight.data_ptr()
    assert made.SCB.data_ptr() != module.SCB.data_ptr()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [linear, embedding])
def test_state_dict_there_and_back(make, assign):
    module, other = make(), make()
    other.weight.zero_()
    other.SCB.zero_()
    state = copy.deepcopy(module.state_dict())
    assert {"weight", "SCB"} <= state.keys()
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.decoded(), module.decoded()) and other.SCB.dtype == torch.float32


@pytest.mark.parametrize("make", [linear, embedding])
def test_floats_are_not_loaded_as_codes(make):
    module = make()
    state = module.state_dict() | {"weight": module.decoded()}
    with pytest.raises(UserError, match=r"weight of the state dict is of another dtype: got torch"):
        module.load_state_dict(state)
    state = module.state_dict() | {"SCB": module.SCB.half()}
    with pytest.raises(UserError, match="SCB of the state dict is of another dtype"):
        module.load_state_dict(state)


MOVES = {
    **COPIES,
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "device": lambda module: module.to(DEVICE),
    "copy, then cast": lambda module: copy.deepcopy(module).to(DEVICE, torch.float16),
    "shared": lambda module: module.cpu().share_memory(),
    "one of them": lambda module: (module["head"].half(), module)[1],
}


@pytest.mark.parametrize("name", MOVES)
def test_a_tied_head_stays_tied(name):
    both = MOVES[name](tied())
    embed, head = both["embed"], both["head"]
    assert head.weight is embed.weight and head.SCB is embed.SCB
    assert len(weight_items(both)) == 1
    expected = tied()["head"].decoded(torch.float32)
    assert torch.equal(head.decoded(torch.float32), expected.to(head.weight.device))
    assert embed.SCB.dtype == torch.float32


@pytest.mark.gpu
def test_a_tied_head_moves_to_the_gpu_and_back():
    both = tied().cpu()
    for device in ("cuda", "cpu"):
        both.to(device)
        assert both["head"].weight is both["embed"].weight and both["head"].SCB is both["embed"].SCB
        assert both["embed"].SCB.device.type == both["embed"].weight.device.type == device


def test_heads_of_another_shape_are_not_tied():
    with pytest.raises(
        UserError, match=r"head and embedding cannot share a weight: got \(37, 24\)"
    ):
        tie(embedding(36, 24), linear())


def test_biases_of_another_size_and_weights_that_are_none_are_refused():
    with pytest.raises(UserError, match="bias does not fit the codes"):
        Int8Linear.from_weight(torch.ones(4, 3), torch.ones(3))
    with pytest.raises(UserError, match="infinite or NaN"):
        Int8Linear.from_weight(torch.full((4, 3), torch.nan))


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(linear(24, 24), torch.nn.ReLU(), linear(37, 24)).requires_grad_(
        False
    )
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_peft_puts_its_plain_lora_around_it_and_trains_it(adapted):
    from peft.tuners.lora.layer import Linear

    wrapped = [m for m in adapted.modules() if hasattr(m, "lora_A")]
    assert [type(m) for m in wrapped] == [Linear, Linear]
    assert all(type(m.base_layer) is Int8Linear for m in wrapped)
    twin = copy.deepcopy(adapted)
    for module in twin.modules():
        if hasattr(module, "lora_A"):
            module.base_layer = dense_twin(module.base_layer, torch.float32)
    x = torch.randn(5, 24, device=DEVICE)
    gradients = []
    for model in (adapted, twin):
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_merging_ends_in_an_error_and_changes_no_code(adapted):
    codes = [m.weight.clone() for m in adapted.modules() if type(m) is Int8Linear]
    with pytest.raises(RuntimeError, match="can't be cast"):
        adapted.merge_adapter()
    after = [m.weight for m in adapted.modules() if type(m) is Int8Linear]
    assert all(torch.equal(a, b) for a, b in zip(codes, after, strict=True))
