"""The parts of the memory against tensors, a real optimiser, and what autograd really saves."""

from __future__ import annotations

import pytest
import torch
from llama_helpers import DEVICE, adapt, load_4bit, save_llama

from colab_qlora.errors import UserError
from colab_qlora.teaching import (
    LayerShape,
    MemoryPart,
    describe_memory,
    draw_memory,
    layer_bytes_per_token,
    layer_shape,
    memory_parts,
    weight_parts,
)
from colab_qlora.teaching.activations import layer_input_bytes_per_token, other_bytes_per_token
from colab_qlora.teaching.memory import GIB, optimizer_state_bytes

LLAMA_3_8B = LayerShape(32, 4096, 14336, 32, 4096, 1024, 128256)


def by_name(parts):
    assert len({part.name for part in parts}) == len(parts)
    return {part.name: round(part.gib * GIB) for part in parts}


def storage_bytes(tensors):
    """By storage, and not by what the tensors say of themselves."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_measured_parts_are_the_bytes_of_all_tensors(adapted):
    parts = weight_parts(adapted)
    assert all(part.is_measured and part.note.startswith("measured") for part in parts)
    tensors = [*adapted.parameters(), *adapted.buffers()]
    for state in [getattr(p, "quant_state", None) for p in adapted.parameters()]:
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax]
            tensors += [state.state2.code]
    sizes = by_name(parts)
    expected = storage_bytes(tensors)
    # bitsandbytes keeps the offset as a view of nothing larger, so that storages are exact
    assert sum(sizes.values()) == expected
    lora = sum(4 * p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert sizes["LoRA weights"] == lora
    assert list(sizes) == ["4-bit weights", "16-bit weights", "LoRA weights"]


def test_four_bit_weights_are_half_a_byte_and_their_constants(quantised):
    weights = sum(2 * n for n in (128 * 128, 64 * 128, 64 * 128, 128 * 128, *[320 * 128] * 3))
    blocks = weights // 64
    tables = 14 * (16 + 256) * 4
    size = by_name(weight_parts(quantised))["4-bit weights"]
    assert size >= weights // 2 + blocks + tables
    assert size <= weights // 2 + blocks + tables + 14 * (8 + 4 * 3)


def test_tied_embeddings_count_once(tmp_path):
    tied = load_4bit(save_llama(tmp_path / "tied", tie_word_embeddings=True))
    loose = load_4bit(save_llama(tmp_path / "loose", tie_word_embeddings=False))
    difference = by_name(weight_parts(loose))["16-bit weights"]
    difference -= by_name(weight_parts(tied))["16-bit weights"]
    assert difference == 2 * 512 * 128


def test_a_float32_model_says_so(tmp_path):
    model = load_4bit(save_llama(tmp_path, torch.float32), torch.float32)
    assert list(by_name(weight_parts(model))) == ["4-bit weights", "32-bit weights"]


def test_parts_of_a_training_step(adapted):
    parts = memory_parts(adapted, 3, 40)
    sizes = by_name(parts)
    lora = sizes["LoRA weights"]
    assert sizes["gradients"] == lora
    shape = layer_shape(adapted.config)
    assert (shape.query, shape.key_value, shape.layers, shape.vocabulary) == (128, 64, 2, 512)
    casts = DEVICE == "cpu"
    full = layer_bytes_per_token(shape, 7 * 8, 2, casts)
    # h and float32 of the last norm, its output, and one inverse root
    assert sizes["activations"] == 120 * (2 * 2 * 128 + 4 * 128 + 2 * 128 + 4)
    assert sizes["logits and loss"] == 120 * 512 * 12
    assert sizes["one layer at work"] == 320 * 128 * 2 + 120 * full
    assert sizes["CUDA context"] == (0 if DEVICE == "cpu" else GIB // 2)
    for part in parts:
        assert part.is_measured == part.note.startswith("measured")
        assert part.is_measured or part.note.startswith(("computed", "assumed"))
    plain = by_name(memory_parts(adapted, 3, 40, checkpointing=False))
    assert plain["activations"] == 120 * (2 * full + 4 * 128 + 2 * 2 * 128 + 4)
    assert plain["one layer at work"] == 320 * 128 * 2


@pytest.mark.parametrize("bytes_per_logit", [0, 12, 14, 1000])
def test_only_the_larger_of_logits_and_layer_is_at_the_peak(adapted, bytes_per_logit):
    parts = {p.name: p for p in memory_parts(adapted, 3, 40, bytes_per_logit=bytes_per_logit)}
    logits, layer = parts["logits and loss"], parts["one layer at work"]
    assert logits.gib * GIB == pytest.approx(120 * 512 * bytes_per_logit)
    assert logits.is_at_peak == (logits.gib >= layer.gib) != layer.is_at_peak
    assert all(p.is_at_peak for p in parts.values() if p not in (logits, layer))


@pytest.mark.parametrize("bits", [8, 32])
def test_optimiser_state_is_what_bitsandbytes_allocates(quantised, bits):
    import bitsandbytes

    model = adapt(quantised, rank=24)  # some tensors above 4096 numbers, some below
    sizes = {p.numel() >= 4096 for p in model.parameters() if p.requires_grad}
    assert sizes == {True, False}
    trainable = [p for p in model.parameters() if p.requires_grad]
    kind = bitsandbytes.optim.AdamW8bit if bits == 8 else bitsandbytes.optim.AdamW32bit
    optimizer = kind(trainable, lr=1e-3)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    part = by_name(memory_parts(model, 1, 8, optimizer_bits=bits))["optimiser state"]
    assert part == storage_bytes(states)


@pytest.mark.parametrize("numbers", [1, 4095, 4096, 4097, 65536])
@pytest.mark.parametrize("bits", [8, 32])
def test_state_of_one_tensor(numbers, bits):
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.zeros(numbers, device=DEVICE))
    kind = bitsandbytes.optim.AdamW8bit if bits == 8 else bitsandbytes.optim.AdamW32bit
    optimizer = kind([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {k: v for k, v in optimizer.state[parameter].items() if not k.startswith("qmap")}
    held = sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v))
    assert optimizer_state_bytes(numbers, bits) == held


def test_formula_gives_the_tables_for_llama_3_8b():
    assert layer_bytes_per_token(LLAMA_3_8B) == 184_680  # table B2, fused casts
    own = layer_bytes_per_token(LLAMA_3_8B, separate_casts=True)
    # table B2 leaves log-sum-exp and the norms' float32 (136 bytes) out of this row
    assert own - 136 == 217_312
    assert layer_input_bytes_per_token(LLAMA_3_8B) == 8_192
    assert other_bytes_per_token(LLAMA_3_8B) == 24_580
    # memory_allocated after the forward pass of 4 checkpointed layers on an H100, 2 x 2048 tokens:
    # 57,608 bytes a token, of which 260 are the rotary tables and the positions
    assert 4 * 8_192 + 24_580 + 260 == 57_608


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_sum_is_the_peak_of_a_real_step(tmp_path, checkpointing):
    import bitsandbytes

    from colab_qlora.models.adapters import set_gradient_checkpointing

    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    # as many key/value heads as heads, so that lean attention is there without flash attention too
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000}
    folder = save_llama(tmp_path, dtype, **sizes, **heads, max_position_embeddings=512)
    before = torch.cuda.memory_allocated()
    model = adapt(load_4bit(folder, dtype), rank=16).train()
    set_gradient_checkpointing(model, checkpointing)
    model.enable_input_require_grads()
    model.config.use_cache = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trainable, lr=1e-4)
    ids = torch.randint(0, 32000, (8, 512), device="cuda")
    for _ in range(2):  # the first step makes the optimiser's state
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    parts = memory_parts(model, 8, 512, checkpointing=checkpointing)
    counted = [part for part in parts if part.is_at_peak and part.name != "CUDA context"]
    assert sum(part.gib for part in counted) == pytest.approx(peak, rel=0.04)


def saved_bytes_per_token(folder, dtype, tokens=97, peft_sees_autocast=False):
    """What autograd really saves in one layer; 97 is prime, so that weights are told apart."""
    model = adapt(load_4bit(folder, dtype), rank=8)
    model.train()
    trunk = model.base_model.model.model
    hidden = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    positions = trunk.rotary_emb(hidden, torch.arange(tokens)[None])
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    skipped = {t.untyped_storage().data_ptr() for t in (*positions, *model.parameters())}
    half = dtype != torch.float32
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        pytest.MonkeyPatch.context() as patch,
    ):
        if peft_sees_autocast:
            # only in here: autocast asks on entry what to set on exit, and would stay on for good
            patch.setattr(torch, "is_autocast_enabled", lambda *_: True)
        trunk.layers[0](hidden, position_embeddings=positions)
    sizes = [s.nbytes() for address, s in saved.items() if address not in skipped]
    return sum(size for size in sizes if size % tokens == 0) / tokens


@pytest.mark.skipif(DEVICE != "cpu", reason="the GPU pads log-sum-exp; measured by hand there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "intermediate_size": 192}])
def test_formula_is_what_autograd_saves(tmp_path, dtype, changes):
    folder = save_llama(tmp_path, dtype, **changes)
    shape = layer_shape(load_4bit(folder, dtype).config)
    half = dtype == torch.bfloat16
    formula = layer_bytes_per_token(shape, 7 * 8, dtype.itemsize, separate_casts=half)
    assert saved_bytes_per_token(folder, dtype) == formula


@pytest.mark.skipif(DEVICE != "cpu", reason="imitates on a CPU what PEFT does on a GPU")
def test_formula_is_what_autograd_saves_where_peft_sees_the_autocast(llama_folder):
    shape = layer_shape(load_4bit(llama_folder).config)
    measured = saved_bytes_per_token(llama_folder, torch.bfloat16, peft_sees_autocast=True)
    assert measured == layer_bytes_per_token(shape, 7 * 8, 2)


def test_wrong_requests_are_refused(quantised, adapted):
    with pytest.raises(UserError, match="batch_size is not positive: got 0"):
        memory_parts(adapted, 0, 8)
    with pytest.raises(UserError, match="seq_length"):
        memory_parts(adapted, 1, -8)
    with pytest.raises(UserError, match="got 16 bits; allowed: 8 or 32"):
        memory_parts(adapted, 1, 8, optimizer_bits=16)


def test_a_model_without_adapters_is_refused(quantised):
    with pytest.raises(UserError, match="no LoRA adapters"):
        memory_parts(quantised, 1, 8)
    assert weight_parts(quantised)


def test_other_architectures_are_refused():
    from transformers import BloomConfig

    with pytest.raises(UserError, match="bloom without intermediate_size"):
        layer_shape(BloomConfig())


EIGHT_B = [
    MemoryPart("4-bit weights", 3.46, True, "measured: 3.1% of it for block constants"),
    MemoryPart("16-bit weights", 1.96, True, "measured: embedding, norms, output head"),
    MemoryPart("LoRA weights", 0.156, True, "measured: A and B of all layers"),
    MemoryPart("gradients", 0.156, False, "computed: one number for each of 41,943,040 parameters"),
    MemoryPart("optimiser state", 0.08, False, "computed: two 8-bit numbers for each parameter"),
    MemoryPart("activations", 1.1, False, "computed: 4,096 tokens x (32 x 8,192 + 24,580) bytes"),
    MemoryPart("logits and loss", 5.87, False, "computed: 525,336,576 x 12 bytes"),
    MemoryPart(
        "one layer at work", 0.81, False, "computed: a decoded weight and 4,096 x 184,680", False
    ),
    MemoryPart("CUDA context", 0.5, False, "assumed: CUDA's own"),
]
AT_PEAK = [part for part in EIGHT_B if part.is_at_peak]


@pytest.mark.parametrize("limit", [None, 0.5, 3.4, 5.4, 5.7, 8.0, 14.74, 15.0, 80.0, 4000.0])
def test_picture_is_readable_at_any_limit(assert_readable, limit):
    fig = draw_memory(EIGHT_B, limit)
    assert_readable(fig)
    assert [t.get_text() for t in fig.texts if t.get_gid() == "key"] == list("12345678")


def test_picture_of_a_small_model_is_readable(adapted, assert_readable):
    for parts in (memory_parts(adapted, 2, 64), weight_parts(adapted)):
        for limit in (None, 14.74):
            assert_readable(draw_memory(parts, limit))


def test_segments_are_as_wide_as_their_sizes_and_computed_ones_hatched():
    fig = draw_memory(EIGHT_B, 14.74)
    fig.canvas.draw()
    segments = {a.get_gid(): a for a in fig.findobj() if (a.get_gid() or "").startswith("segment")}
    widths = {}
    for artist in fig.findobj():
        if (artist.get_gid() or "").startswith("segment") and artist.get_height() > 0.06:
            widths[artist.get_gid()] = artist.get_window_extent().width
    assert len(widths) == len(AT_PEAK) == len(segments)
    per_gib = widths["segment logits and loss"] / 5.87
    for part in AT_PEAK:
        assert widths[f"segment {part.name}"] == pytest.approx(part.gib * per_gib, abs=0.01)
        assert bool(segments[f"segment {part.name}"].get_hatch()) != part.is_measured


def test_empty_parts_are_left_out(assert_readable):
    parts = [*EIGHT_B[:-1], MemoryPart("CUDA context", 0.0, False, "none on a CPU")]
    words = " ".join(text.get_text() for text in draw_memory(parts).texts)
    assert "CUDA context" not in words
    assert "one layer at work" in words and "not numbered: at another moment" in words
    assert "another moment" not in " ".join(text.get_text() for text in draw_memory(AT_PEAK).texts)
    with pytest.raises(UserError, match="no memory to show"):
        draw_memory([parts[-1]])
    with pytest.raises(UserError, match="limit_gib is not a size"):
        draw_memory(EIGHT_B, 0)


def test_words_say_the_total_the_largest_and_whether_it_fits():
    total = sum(part.gib for part in AT_PEAK)
    text = describe_memory(EIGHT_B, 20)
    assert f"{total:.2f} GiB" in text and "5.58 GiB measured" in text
    assert "logits and loss with 5.87 GiB, 44%" in text
    assert f"fits in 20 GiB with {20 - total:.2f} GiB to spare" in text
    assert f"does not fit in 10 GiB: {total - 10:.2f} GiB too much" in describe_memory(EIGHT_B, 10)
    assert "fit" not in describe_memory(EIGHT_B)
    assert "all of it measured" in describe_memory(EIGHT_B[:2])
