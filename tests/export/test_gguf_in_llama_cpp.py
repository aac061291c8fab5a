"""GGUF files in llama.cpp itself: the merged model's logits, its quantizer, and its blocks."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="needs llama-cpp-python, which is not installed"
)

from llama_runs import run_llama_cpp  # noqa: E402
from model_files import (  # noqa: E402
    KINDS,
    LINES,
    adapted,
    exact_tensors,
    read_gguf,
    sentencepiece_like,
    write_model,
)
from small_checkpoint import load_nf4, load_plain, randomise  # noqa: E402

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.export.gguf_methods import METHODS, find_methods  # noqa: E402
from colab_qlora.export.llama_cpp_quantizer import quantize_file  # noqa: E402
from colab_qlora.export.merged import save_pretrained_merged  # noqa: E402
from colab_qlora.export.save_gguf import save_pretrained_gguf  # noqa: E402


def logits_of(model, prompts):
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_computes_the_merged_model(tokenizer, tmp_path, name):
    kind, options = KINDS[name]
    place = write_model(tmp_path / "m", kind, tokenizer, **options)
    model = adapted(load_nf4(place, torch.float32))
    dense = load_plain(save_pretrained_merged(model, tmp_path / "dense"))
    [file] = save_pretrained_gguf(model, tmp_path / "out", tokenizer, "f32")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (1, 7, 150)]
    # LongRoPE: llama.cpp takes the long factors where its context is long, transformers where the
    # text is
    parts = {256: prompts}
    if name == "phi 4 mini":
        parts[512] = [torch.randint(3, 400, (300,), generator=generator).tolist()]
    prompts, ours = [], []
    for context, some in parts.items():
        prompts += some
        ours += run_llama_cpp([file], tmp_path / "l.npz", some, context=context)[0][0]
    base = load_plain(place, dtype=torch.float32)
    for theirs, mine, without in zip(
        logits_of(dense, prompts), ours, logits_of(base, prompts), strict=True
    ):
        assert np.abs(theirs - mine).max() <= 2e-3
        assert np.abs(theirs - without).max() > 0.1


@pytest.fixture(scope="module")
def wide_folder(tokenizer, tmp_path_factory):
    """Rows of 256 and 512, as the mixtures of llama.cpp want them."""
    return write_model(
        tmp_path_factory.mktemp("gguf") / "wide", "llama", tokenizer, hidden_size=256,
        intermediate_size=512, head_dim=64,
    )  # fmt: skip


def test_llama_cpp_quantizes(wide_folder, tokenizer, tmp_path, capfd):
    model = adapted(load_nf4(wide_folder))
    bits = {"q6_k": 6, "q5_k_s": 5, "q4_k_s": 4, "q3_k_s": 3, "q2_k": 2}
    files = save_pretrained_gguf(model, tmp_path / "out", tokenizer, ["q8_0", *bits])
    out, err = capfd.readouterr()
    assert "converting to" not in out + err
    # the file that it starts from was not asked for, and is gone
    assert len(list((tmp_path / "out").iterdir())) == 7
    assert [file.name for file in files[:2]] == ["wide.Q8_0.gguf", "wide.Q6_K.gguf"]
    numbers = [read_gguf(file)[0]["general.file_type"] for file in files]
    assert numbers == [7, 18, 16, 14, 11, 10]
    exact = exact_tensors(wide_folder, model)
    for file, width in zip(files[1:], bits.values(), strict=True):
        _, tensors = read_gguf(file)
        kind, ours = tensors["blk.1.ffn_up.weight"]
        assert kind == f"Q{width}_K"
        weight = exact["blk.1.ffn_up.weight"]
        error = np.sqrt(np.mean((ours - weight) ** 2) / np.mean(weight**2))
        # evenly spaced steps over what 32 normal numbers reach, 2.1 times their spread to each side
        step = 2 * 2.1 / (2**width - 1)
        assert step / np.sqrt(12) / 4 < error < step / np.sqrt(12) * 1.2, width


def test_our_blocks_are_llama_cpps_own(folder, tokenizer, tmp_path):
    names = ["f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
    written = save_pretrained_gguf(adapted(load_nf4(folder)), tmp_path / "out", tokenizer, names)
    files = dict(zip(names, written, strict=True))
    for method in find_methods(names[1:]):
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.pure = method.file_type, True
        parameters.output_tensor_type = parameters.token_embedding_type = 8  # Q8_0
        target = tmp_path / f"{method.name}.gguf"
        names = str(files["f32"]).encode(), str(target).encode()
        assert llama_cpp.llama_model_quantize(*names, parameters) == 0
        theirs, ours = read_gguf(target)[1], read_gguf(files[method.name])[1]
        assert theirs.keys() == ours.keys()
        for name, (kind, values) in theirs.items():
            assert ours[name][0] == kind, name
            # a number in the middle of two steps may go either way
            assert np.mean(ours[name][1] != values) < 1e-3, (method.name, name)


@pytest.mark.model
def test_the_embedded_model_in_llama_cpp(embedded_folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(str(embedded_folder), 256, "float32")
    model = FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=False)
    randomise(model)
    dense = load_plain(save_pretrained_merged(model, tmp_path / "dense"), dtype=torch.float32)
    methods = ["f16", "q8_0", "q4_k_m"]
    files = save_pretrained_gguf(model, tmp_path / "out", tokenizer, methods)
    prompts = [tokenizer(text).input_ids for text in LINES[:2]]
    found, _ = run_llama_cpp(files, tmp_path / "l.npz", prompts)
    truth = [torch.tensor(logits).double().log_softmax(-1) for logits in logits_of(dense, prompts)]
    divergences = []
    for logits in found:
        others = [torch.tensor(part).double().log_softmax(-1) for part in logits]
        pairs = zip(truth, others, strict=True)
        divergences.append(torch.cat([(t.exp() * (t - o)).sum(-1) for t, o in pairs]).mean())
    # nat a token: in 16 bits nothing is lost; eight keep more than four
    assert divergences[0] <= 1e-3
    assert divergences[1] < divergences[2] / 3 < 0.2


def test_a_quantizer_that_refuses(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "llama_model_quantize", lambda *args: 1)
    with pytest.raises(UserError, match="llama.cpp could not make q4_k_m: got code 1"):
        save_pretrained_gguf(load_nf4(folder), tmp_path / "out", tokenizer, ["q8_0", "q4_k_m"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_runs_a_sentencepiece_model(tmp_path, prefix):
    tokenizer = sentencepiece_like(prefix=prefix)
    place = write_model(tmp_path / "m", "mistral", tokenizer)
    [file] = save_pretrained_gguf(load_plain(place), tmp_path / "out", tokenizer, "f32")
    ids = tokenizer("The river rises in 1969.").input_ids
    [[ours]], [[cut]] = run_llama_cpp(
        [file], tmp_path / "l.npz", [ids], ["The river rises in 1969."]
    )
    assert cut == ids
    [theirs] = logits_of(load_plain(place, dtype=torch.float32), [ids])
    assert np.abs(theirs - ours).max() <= 2e-3


def test_a_quantizer_that_fails_says_why(tmp_path, capfd):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"could not make q4_k_m: got .*fail"):
        quantize_file(
            llama_cpp, tmp_path / "damaged.gguf", tmp_path / "made.gguf", METHODS["q4_k_m"]
        )
    assert "fail" not in capfd.readouterr().err


def test_its_logging_is_as_before(folder, tokenizer, tmp_path, capfd):
    [file] = save_pretrained_gguf(load_nf4(folder), tmp_path / "out", tokenizer, "q4_k_m")
    out, err = capfd.readouterr()
    # rows of 64 and 96
    assert out.count("do not divide by 256") == 1 and "blk.0" not in out + err
    parameters = llama_cpp.llama_model_quantize_default_params()
    missing = str(tmp_path / "missing.gguf").encode()
    assert llama_cpp.llama_model_quantize(missing, missing + b"2", parameters) != 0
    assert "missing.gguf" in capfd.readouterr().err
