"""The captured pass on a GPU: bit for bit the eager one; harmless where it cannot be captured."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding_helpers import FAMILIES, generated, greedy, prompts, tiny_model  # noqa: E402

from colab_qlora import FastLanguageModel  # noqa: E402
from colab_qlora.decoding import decode, free_decoding, why_not_graphed  # noqa: E402
from colab_qlora.decoding.decode_step import DecodeStep  # noqa: E402
from colab_qlora.generation import ask, ask_many, stream  # noqa: E402
from colab_qlora.models.fuse import causal_model  # noqa: E402

pytestmark = pytest.mark.gpu
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Hi"]


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def loaded(embedded_folder: Path, **options: Any) -> tuple[Any, Any]:
    """The embedded model with an adapter that says something, ready to answer."""
    model, tokenizer = FastLanguageModel.from_pretrained("embedded", 256, **options)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.003)
    return FastLanguageModel.for_inference(model), tokenizer


def check_bits(model: Any, inputs: dict[str, Any]) -> None:
    """Replays give the very logits of the same passes run one kernel after the other."""
    causal, rows = causal_model(model), inputs["input_ids"].shape[0]
    eager, graph = (DecodeStep(rows, 256, torch.device("cuda", 0)) for _ in range(2))
    with torch.no_grad():
        graph.prepare(causal)
        for step in (eager, graph):
            step.prefill(causal, inputs["input_ids"], inputs["attention_mask"])
        for _ in range(20):
            assert torch.equal(graph.logits, eager.logits)
            assert torch.equal(graph.token, eager.token)
            for step in (eager, graph):
                step.run(causal)
    assert bool(graph.logits.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_is_the_eager_pass(family: str) -> None:
    for dtype in (torch.float32, torch.float16):
        model = tiny_model(family).to("cuda", dtype)
        check_bits(model, on_gpu(prompts(9)))
        check_bits(model, on_gpu(prompts(9, 4, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    model = tiny_model(family).to("cuda", torch.float64)
    for lengths in ((9,), (9, 4, 1)):
        inputs, options = on_gpu(prompts(*lengths)), greedy(40)
        found = decode(model, inputs, options)
        assert found is not None, why_not_graphed(model)
        assert torch.equal(found, generated(model, inputs, options))


def test_an_eager_pass_never_waits_for_the_gpu() -> None:
    """What waits cannot be captured, and a failed capture is harmless, but slow."""
    model, inputs = tiny_model("Llama").cuda(), on_gpu(prompts(9, 4))
    step = DecodeStep(2, 256, torch.device("cuda", 0))
    with torch.no_grad():
        step.prefill(model, inputs["input_ids"], inputs["attention_mask"])
        step.run(model)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.model
@pytest.mark.parametrize("load_in_4bit", [True, False], ids=["NF4", "16 bit"])
def test_adapters_over_the_embedded_model(embedded_folder: Path, load_in_4bit: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model, tokenizer = loaded(embedded_folder, load_in_4bit=load_in_4bit)
    assert why_not_graphed(model) == ""
    inputs = dict(tokenizer(["The capital of France is"], return_tensors="pt").to("cuda"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    check_bits(model, inputs)
    with model.disable_adapter():
        plain = decode(model, inputs, greedy(24))
        assert plain is not None
    found = decode(model, inputs, greedy(24))
    assert found is not None
    # 16 bits have ties; a graph of other adapters would part at the first token or so
    expected = generated(model, inputs, greedy(24))
    same = int((found == expected).long().cumprod(1).sum())
    assert same >= 8, (same, tokenizer.decode(found[0]), tokenizer.decode(expected[0]))


@pytest.mark.model
def test_questions_are_answered_as_by_generate(embedded_folder: Path, monkeypatch: Any) -> None:
    model, tokenizer = loaded(embedded_folder, dtype="float32", load_in_4bit=False)
    answers = {}
    for way in ("generate", "graph"):
        if way == "graph":
            monkeypatch.undo()
            monkeypatch.setattr(model, "generate", None)
        else:
            monkeypatch.setattr("colab_qlora.decoding.decode", lambda *args: None)
        together = ask_many(model, tokenizer, QUESTIONS, max_new_tokens=16)
        pieces = list(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=16))
        answers[way] = together, pieces
        torch.manual_seed(0)
        assert ask(model, tokenizer, QUESTIONS[2], temperature=0.8, top_p=0.9, top_k=40)
    assert answers["graph"] == answers["generate"]


def test_training_gets_the_memory_back() -> None:
    model, inputs = tiny_model("Llama").cuda(), on_gpu(prompts(9))
    model.generate(**inputs, **greedy(2))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert decode(model, inputs, greedy(20)) is not None
    assert torch.cuda.memory_reserved() > before
    free_decoding(model)
    gc.collect()
    torch.cuda.empty_cache()
    # cuBLAS keeps a workspace for the stream of the capture
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20


def test_a_capture_that_fails_leaves_everything_working(capsys: Any) -> None:
    model, inputs = tiny_model("Llama").cuda(), on_gpu(prompts(9))
    expected = generated(model, inputs, greedy(20))
    torch.manual_seed(3)
    numbers = torch.rand(4, device="cuda")
    forward = type(model.model.norm).forward

    class Waiting(type(model.model.norm)):
        """A norm that looks at its input on the host."""

        def forward(self, hidden: Any) -> Any:
            assert float(hidden.abs().max()) >= 0
            return forward(self, hidden)

    model.model.norm.__class__ = Waiting
    torch.manual_seed(3)
    stream_before = torch.cuda.current_stream()
    for _ in range(2):
        assert decode(model, inputs, greedy(20)) is None
    assert torch.cuda.current_stream() == stream_before
    assert "could not be captured" in why_not_graphed(model)
    assert capsys.readouterr().out.count("colab_qlora: ") == 1
    assert torch.equal(torch.rand(4, device="cuda"), numbers)
    assert torch.equal(generated(model, inputs, greedy(20)), expected)
    # and another model's capture still works
    other = tiny_model("Llama").to("cuda", torch.float64)
    assert decode(other, inputs, greedy(20)) is not None
    gc.collect()
    torch.cuda.empty_cache()
