"""GGUF files: read back against W + scaling B A in float64, by transformers, and by llama.cpp."""

from __future__ import annotations

import errno
import shutil
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from model_files import (  # noqa: E402
    KINDS,
    LLAMA_3_ROPE,
    adapted,
    exact_tensors,
    read_gguf,
    write_model,
)
from small_checkpoint import load_mixed, load_nf4, load_plain  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.export import gguf_file, gguf_tensors  # noqa: E402
from colab_qlora.export.gguf_methods import OURS, find_methods  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.export.save_gguf import save_pretrained_gguf  # noqa: E402


@pytest.fixture(scope="module")
def saved(folder, tokenizer, tmp_path_factory):
    """All methods that need no llama.cpp, of one model: (model, files by method)."""
    model = adapted(load_nf4(folder))
    files = save_pretrained_gguf(
        model, tmp_path_factory.mktemp("saved"), tokenizer, quantization_method=list(OURS)
    )
    return model, dict(zip(OURS, files, strict=True))


def test_float32_is_the_exact_sum(folder, saved):
    model, files = saved
    exact = exact_tensors(folder, model)
    _, tensors = read_gguf(files["f32"])
    assert len(exact) == 14
    for name, weight in exact.items():
        kind, ours = tensors[name]
        assert kind == "F32"
        assert np.abs(ours - weight).max() <= 1e-6, name
    assert {kind for kind, _ in tensors.values()} == {"F32"}


@pytest.mark.parametrize(("method", "bits"), [("f16", 10), ("bf16", 7)])
def test_16_bits_are_rounded_once(folder, saved, method, bits):
    model, files = saved
    _, tensors = read_gguf(files[method])
    for name, weight in exact_tensors(folder, model).items():
        kind, ours = tensors[name]
        assert kind == method.upper()
        half_ulp = 2.0 ** (np.floor(np.log2(np.abs(weight).clip(6e-5))) - bits - 1)
        assert (np.abs(ours - weight) <= half_ulp + 1e-7).all(), name
    norm = tensors["blk.1.attn_norm.weight"]
    assert norm[0] == "F32"


# steps between the smallest and the largest number that a block of 32 can hold
@pytest.mark.parametrize(
    ("method", "steps"), [("q8_0", 254), ("q5_1", 31), ("q5_0", 31), ("q4_1", 15), ("q4_0", 15)]
)
def test_blocks_are_within_a_step(folder, saved, method, steps):
    model, files = saved
    _, tensors = read_gguf(files[method])
    for name, weight in exact_tensors(folder, model).items():
        kind, ours = tensors[name]
        assert kind == method.upper()
        blocks, theirs = weight.reshape(-1, 32), ours.reshape(-1, 32)
        if method.endswith("_1"):
            spread = blocks.max(1) - blocks.min(1)
        else:
            spread = 2 * np.abs(blocks).max(1)
        # a step is float16, and the symmetric forms lack one step on one side
        reach = 0.5 if method.endswith("_1") or method == "q8_0" else 1.0
        allowed = spread / steps * reach * 1.02 + 2e-3 * spread
        assert (np.abs(blocks - theirs).max(1) <= allowed).all(), name
    # what costs most in few bits has 8
    for name in ("token_embd.weight", "output.weight"):
        assert tensors[name][0] == "Q8_0"


def test_rows_that_do_not_divide_are_f16(tokenizer, tmp_path):
    place = write_model(
        tmp_path / "odd", "llama", tokenizer, hidden_size=72, head_dim=18, intermediate_size=96
    )
    [file] = save_pretrained_gguf(adapted(load_nf4(place)), tmp_path / "out", tokenizer, "q4_0")
    _, tensors = read_gguf(file)
    assert tensors["blk.0.attn_q.weight"][0] == "F16"
    assert tensors["blk.0.attn_output.weight"][0] == "F16"
    assert tensors["blk.0.ffn_down.weight"][0] == "Q4_0"


@pytest.mark.parametrize("name", KINDS)
def test_metadata(tokenizer, tmp_path, name):
    kind, options = KINDS[name]
    place = write_model(tmp_path / "m", kind, tokenizer, **options)
    [file] = save_pretrained_gguf(load_nf4(place), tmp_path / "out", tokenizer, "f16")
    fields, tensors = read_gguf(file)
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    head_dim = options.get("head_dim", 16)
    expected = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": "m",
        "general.file_type": 1,
        "general.quantization_version": 2,
        f"{arch}.vocab_size": len(tokenizer) + 5,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": options.get("max_position_embeddings", 256),
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": 12 if name == "phi 4 mini" else head_dim,
    }
    assert {key: fields[key] for key in expected} == expected
    rope = options.get("rope_parameters", {})
    rope = rope.get("full_attention", rope)
    assert fields[f"{arch}.rope.freq_base"] == rope.get("rope_theta", 10000.0)
    epsilon = 1e-5 if kind == "phi3" else 1e-6
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(epsilon)
    kinds = {"linear": "linear", "yarn": "yarn"}
    assert fields.get(f"{arch}.rope.scaling.type") == kinds.get(rope.get("rope_type"))
    if kinds.get(rope.get("rope_type")):
        assert fields[f"{arch}.rope.scaling.factor"] == 4.0
    assert ("rope_freqs.weight" in tensors) == (name == "llama 3")
    assert ("output.weight" in tensors) == (not options.get("tie_word_embeddings", False))
    assert ("blk.0.attn_q.bias" in tensors) == (kind == "qwen2" or name == "llama")
    assert ("blk.1.attn_k_norm.weight" in tensors) == (kind in ("qwen3", "gemma3_text"))


def test_llama_3_factors_are_transformers_own(tokenizer, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    place = write_model(tmp_path / "m", "llama", tokenizer, rope_parameters=LLAMA_3_ROPE)
    model = load_plain(place)
    [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f32")
    factors = read_gguf(file)[1]["rope_freqs.weight"][1]
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2).float() / 16)
    assert factors.shape == (8,)
    assert np.allclose(factors, (plain / stretched).numpy(), rtol=1e-5)
    # waves on both sides of the two limits
    assert factors.min() == 1 and factors.max() == pytest.approx(8) and len(set(factors)) > 2


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_merged_model_out_of_the_file(tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    kind, options = KINDS[name]
    # its reader has no biases of a Llama
    options = {**options, "attention_bias": False} if kind == "llama" else options
    # nor heads of Qwen3 of another width
    options = {**options, "head_dim": 128} if kind == "qwen3" else options
    place = write_model(tmp_path / "m", kind, tokenizer, **options)
    model = adapted(load_nf4(place, torch.float32))
    dense = load_plain(save_pretrained_merged(model, tmp_path / "dense"))
    [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f32")
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    ids = torch.tensor([tokenizer("The river rises in 1969.").input_ids])
    with torch.no_grad():
        assert (read(ids).logits - dense(ids).logits).abs().max() <= 1e-4


def test_the_adapter_is_in_the_file(folder, saved, tokenizer, tmp_path):
    _, files = saved
    [base] = save_pretrained_gguf(load_nf4(folder), tmp_path, tokenizer, "f32")
    plain, merged = read_gguf(base)[1], read_gguf(files["f32"])[1]
    changed = {name for name in plain if not np.array_equal(plain[name][1], merged[name][1])}
    assert len(changed) == 14 and all(name.startswith("blk.") for name in changed)


def test_several_files_of_one_merge(folder, tokenizer, tmp_path, monkeypatch):
    made = []
    weight = gguf_tensors.MergedWeights.weight

    def counted(self, matrix):
        made.append(matrix.name)
        return weight(self, matrix)

    monkeypatch.setattr(gguf_tensors.MergedWeights, "weight", counted)
    files = save_pretrained_gguf(
        adapted(load_nf4(folder)), tmp_path, tokenizer, ["not_quantized", "Q8_0", "f16"]
    )
    assert [file.name for file in files] == ["tiny-llama.F16.gguf", "tiny-llama.Q8_0.gguf"]
    assert len(made) == len(set(made)) == 16
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Modelfile", *sorted(
        file.name for file in files
    )]  # fmt: skip


def test_rows_in_chunks_change_nothing(folder, saved, tokenizer, tmp_path, monkeypatch):
    model, files = saved
    monkeypatch.setattr(gguf_tensors, "_CHUNK_NUMBERS", 5 * 64)
    again = save_pretrained_gguf(model, tmp_path, tokenizer, list(OURS))
    for method, file in zip(OURS, again, strict=True):
        assert file.read_bytes() == files[method].read_bytes(), method


def test_a_number_beyond_float16(folder, tokenizer, tmp_path):
    model = load_nf4(folder, torch.float32)
    model.lm_head.weight.data[3, 4] = 1e5
    with pytest.raises(
        UserError, match=r'output.weight.*float16 cannot hold: got 1e\+05.*Take "bf16"'
    ):
        save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f16")
    assert list(tmp_path.iterdir()) == []
    [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "bf16")
    assert read_gguf(file)[1]["output.weight"][1].max() == pytest.approx(1e5, rel=1e-2)


@pytest.mark.parametrize("method", ["q9_0", "", "iq2_xxs", 4, [], ["q8_0", "best"]])
def test_an_unknown_method_is_refused_with_the_list(folder, tokenizer, tmp_path, method):
    with pytest.raises(UserError, match=r"unknown: got .*f32, f16, bf16, q8_0.*q4_k_m"):
        save_pretrained_gguf(load_nf4(folder), tmp_path / "out", tokenizer, method)
    assert list(tmp_path.iterdir()) == []


def test_names_of_tutorials():
    names = ["not_quantized", "fast_quantized", "quantized", "Q4_K_M", "q5-k-m", "q8_0"]
    found = [method.name for method in find_methods(names)]
    assert found == ["f16", "q8_0", "q4_k_m", "q5_k_m"]
    assert find_methods(None) == find_methods("q8_0")


def test_quantization_type_is_another_name_of_the_method(folder, tokenizer, tmp_path):
    model = load_nf4(folder)
    for given in ("Q4_0", ["q4_0"]):
        [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, quantization_type=given)
        assert file.name.endswith(".Q4_0.gguf")
    both = {"quantization_method": "q8_0", "quantization_type": "q8_0"}
    [file] = save_pretrained_gguf(model, tmp_path / "both", tokenizer, **both)
    assert file.name.endswith(".Q8_0.gguf")
    with pytest.raises(UserError, match="are both set: got 'f16' and 'Q8_0'; allowed: one of them"):
        save_pretrained_gguf(model, tmp_path / "no", tokenizer, "f16", quantization_type="Q8_0")
    assert not (tmp_path / "no").exists()


def test_without_llama_cpp_one_sentence_says_what_to_install(
    folder, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        UserError, match=r"q4_k_m, q6_k are made by.*f32.*q4_0 without it.*pip inst"
    ):
        save_pretrained_gguf(
            load_nf4(folder), tmp_path / "out", tokenizer, ["q8_0", "q4_k_m", "q6_k"]
        )
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_named(tokenizer, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"gpt_neox.*llama, mistral, .* gemma2.*convert_hf"):
        save_pretrained_gguf(load_plain(tmp_path / "m"), tmp_path / "out", tokenizer, "f16")
    assert not (tmp_path / "out").exists()


def test_positions_that_have_no_place(tokenizer, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    place = write_model(tmp_path / "m", "llama", tokenizer, rope_parameters=rope)
    with pytest.raises(UserError, match="'dynamic'; allowed: default, linear, yarn, llama3"):
        save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f16")


def test_a_window_that_is_lost_is_said(tokenizer, tmp_path, capsys):
    place = write_model(tmp_path / "m", "mistral", tokenizer, sliding_window=32)
    save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f16")
    assert "beyond 32 tokens" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    folder, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=50_000))
    monkeypatch.setattr(gguf_file, "write_gguf_files", None)
    with pytest.raises(UserError, match=r"too small.*0.05 MiB free.*nothing was written"):
        save_pretrained_gguf(load_nf4(folder), tmp_path / "a" / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(folder, tokenizer, tmp_path, monkeypatch):
    model = adapted(load_nf4(folder))
    save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method="lora")
    save_pretrained_gguf(model, tmp_path / "out", tokenizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "tiny-llama.Q8_0.gguf"} <= set(before)

    def full(*args):
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_file, "encoded", full)
    with pytest.raises(UserError, match="disk became full.*removed"):
        save_pretrained_gguf(model, tmp_path / "out", tokenizer)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_written_again_it_is_replaced(folder, tokenizer, tmp_path):
    model = adapted(load_nf4(folder))
    [file] = save_pretrained_gguf(model, tmp_path, tokenizer)
    before = file.read_bytes()
    model = adapted(load_nf4(folder), seed=2)
    assert save_pretrained_gguf(model, tmp_path, tokenizer) == [file]
    assert file.read_bytes() != before and len(file.read_bytes()) == len(before)


def test_the_tokenizer_of_the_base_where_none_is_given(folder, tmp_path):
    [file] = save_pretrained_gguf(load_nf4(folder), tmp_path)
    found = read_gguf(file)[0]["tokenizer.ggml.tokens"]
    assert found[:3] == ["<|pad|>", "<|im_start|>", "<|im_end|>"] and len(found) > 400


def test_precisions_that_are_mixed(folder, tokenizer, tmp_path):
    model = adapted(load_mixed(folder))
    [file] = save_pretrained_gguf(model, tmp_path, tokenizer, "f32")
    _, tensors = read_gguf(file)
    for name, weight in exact_tensors(folder, model).items():
        assert np.abs(tensors[name][1] - weight).max() <= 1e-6, name
    # tables of 8 bits come from the checkpoint as well
    checkpoint = load_plain(folder).model.embed_tokens.weight.detach().float().numpy()
    assert (tensors["token_embd.weight"][1] == checkpoint).all()


def test_one_matrix_is_in_memory_at_a_time(folder, tokenizer, tmp_path, monkeypatch):
    made, alive = [], []
    weight = gguf_tensors.MergedWeights.weight

    def counted(self, matrix):
        # what was given before, unless someone keeps it
        alive.append(sum(ref() is not None for ref in made))
        found = weight(self, matrix)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(gguf_tensors.MergedWeights, "weight", counted)
    save_pretrained_gguf(adapted(load_nf4(folder)), tmp_path, tokenizer, ["f32", "q4_0"])
    assert len(made) == 16 and max(alive) <= 1


def test_what_is_special_about_gemma(tokenizer, tmp_path):
    kind, options = KINDS["gemma 3"]
    place = write_model(tmp_path / "m", kind, tokenizer, **options)
    model = load_plain(place)
    [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f32")
    fields, tensors = read_gguf(file)
    assert fields["gemma3.attention.sliding_window"] == 24
    assert fields["gemma3.rope.freq_base_swa"] == 1e4 and fields["gemma3.rope.freq_base"] == 1e6
    norms = {
        "output_norm": model.model.norm,
        "blk.1.attn_k_norm": model.model.layers[1].self_attn.k_norm,
        "blk.0.post_ffw_norm": model.model.layers[0].post_feedforward_layernorm,
    }
    for name, norm in norms.items():
        # transformers multiplies by one more than the weight
        assert np.allclose(tensors[f"{name}.weight"][1], norm.weight.detach().float() + 1), name
    kind, options = KINDS["gemma 2"]
    place = write_model(tmp_path / "n", kind, tokenizer, **options)
    [file] = save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f32")
    fields, _ = read_gguf(file)
    assert fields["gemma2.attn_logit_softcapping"] == 50.0
    assert fields["gemma2.final_logit_softcapping"] == 30.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query_pre_attn_scalar": 20}, "query_pre_attn_scalar: got 20; allowed: 16"),
        ({"hidden_activation": "gelu"}, "activation: got gelu; allowed: gelu_pytorch_tanh"),
        ({"tie_word_embeddings": False}, "output head: got one of its own"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: got .*each 2th layer full"),
    ],
)
def test_a_gemma_that_llama_cpp_computes_otherwise(tokenizer, tmp_path, changed, message):
    kind, options = KINDS["gemma 2"]
    place = write_model(tmp_path / "m", kind, tokenizer, **{**options, **changed})
    with pytest.raises(UserError, match=message):
        save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f32")
    assert not (tmp_path / "out").exists()
