"""The loop on a CPU, without a graph: the tokens, logits and pieces of transformers' generate."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding_helpers import (  # noqa: E402
    FAMILIES,
    decoded,
    generated,
    greedy,
    prompts,
    tiny_model,
)

from colab_qlora.decoding import decode, eager_on_cpu  # noqa: E402
from colab_qlora.decoding.decode_step import DecodeStep  # noqa: E402
from colab_qlora.generation import ask, ask_many, stream  # noqa: E402

# the package's function has the module's name
decode_module = importlib.import_module("colab_qlora.decoding.decode")
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Hi"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    model = tiny_model(family)
    for lengths in ((7,), (1,), (9, 4, 1)):
        inputs, options = prompts(*lengths), greedy(20)
        expected = generated(model, inputs, options)
        assert len(expected[0].unique()) > 3, "an answer of one word proves nothing"
        assert torch.equal(decoded(model, inputs, options), expected), lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_sequence(family: str) -> None:
    """Each step against one pass over all tokens, without any cache."""
    model, inputs = tiny_model(family), prompts(9, 4)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    step = DecodeStep(2, 64, ids.device)
    with torch.no_grad():
        step.prefill(model, ids, mask)
        for number in range(12):
            if number:
                step.run(model)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions)
            wanted = whole.logits[:, -1]
            assert float((step.logits - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
            assert torch.equal(step.token, step.logits.argmax(-1, keepdim=True))
            # a token of somebody else's choice, as when tokens are drawn
            step.token.copy_(torch.randint_like(step.token, 3, 90))
            ids = torch.cat([ids, step.token], 1)
            mask = torch.cat([mask, torch.ones_like(step.token)], 1)


def test_rows_end_at_their_end_token() -> None:
    model, inputs = tiny_model("Qwen2"), prompts(9, 4, 6)
    whole = generated(model, inputs, greedy(20))
    ends = [int(whole[0, 3]), int(whole[1, 8])]
    options = greedy(20, eos_token_id=ends, pad_token_id=2)
    expected = generated(model, inputs, options)
    assert 2 in expected[0, 4:], "no row ended before another"
    assert torch.equal(decoded(model, inputs, options), expected)
    # and all of them at once
    options["eos_token_id"] = sorted({int(token) for token in whole[:, 0]})
    assert decoded(model, inputs, options).shape == (3, 1)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 20])
def test_a_host_that_reads_later_drops_what_came_after_the_end(
    new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where passes are queued before their tokens are looked at."""
    model, inputs = tiny_model("Qwen2"), prompts(9, 4, 6)
    whole = generated(model, inputs, greedy(20))
    runs = []
    run = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda *args: (runs.append(1), run(*args)))
    monkeypatch.setitem(decode_module.LAGS, "cpu", 2)
    for ends in (None, whole[:, 5].tolist()):
        options = greedy(new_tokens, eos_token_id=ends, pad_token_id=2)
        runs.clear()
        found = decoded(model, inputs, options)
        assert torch.equal(found, generated(model, inputs, options))
        assert len(runs) <= found.shape[1] - 1 + 2


def test_one_token_of_one_token() -> None:
    model, inputs = tiny_model("Llama"), prompts(1)
    found = decoded(model, inputs, greedy(1))
    assert torch.equal(found, generated(model, inputs, greedy(1))) and found.shape == (1, 1)


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.02},
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "repetition_penalty": 1.5},
        {"repetition_penalty": 2.0},
    ],
    ids=["temperature", "top", "penalty", "greedy with penalty"],
)
def test_the_same_seed_draws_what_generate_draws(sampling: dict[str, Any]) -> None:
    model, inputs = tiny_model("Llama"), prompts(9, 4)
    options = greedy(16) | sampling
    found = []
    for write in (generated, decoded):
        torch.manual_seed(5)
        found.append(write(model, inputs, options))
    assert torch.equal(*found)
    assert not torch.equal(found[0], generated(model, inputs, greedy(16)))


def test_settings_of_the_model_count_where_nothing_was_asked() -> None:
    model, inputs = tiny_model("Llama"), prompts(9)
    plain = decoded(model, inputs, greedy(16))
    model.generation_config.repetition_penalty = 3.0
    found = decoded(model, inputs, greedy(16))
    assert torch.equal(found, generated(model, inputs, greedy(16)))
    assert not torch.equal(found, plain)


def test_settings_given_to_the_peft_model_count() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    model, inputs = tiny_model("Llama"), prompts(9)
    model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    plain = decoded(model, inputs, greedy(12))
    model.generation_config = GenerationConfig(repetition_penalty=3.0, pad_token_id=0)
    found = decoded(model, inputs, greedy(12))
    assert torch.equal(found, generated(model, inputs, greedy(12)))
    assert not torch.equal(found, plain)


def test_inference_mode_around_one_answer_does_not_spoil_the_next() -> None:
    model, inputs = tiny_model("Llama"), prompts(9)
    with torch.inference_mode():
        first = decoded(model, inputs, greedy(6))
    assert torch.equal(decoded(model, inputs, greedy(6)), first)
    with torch.inference_mode():
        assert torch.equal(decoded(model, inputs, greedy(6)), first)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_take_the_mask(attention: str) -> None:
    model, inputs = tiny_model("Qwen3", attn_implementation=attention), prompts(9, 4)
    assert torch.equal(decoded(model, inputs, greedy(12)), generated(model, inputs, greedy(12)))


def test_half_precision_decodes_in_its_own_dtype() -> None:
    """Logits no further from the truth than those of a pass over the whole sequence."""
    truth, half = tiny_model("Llama"), tiny_model("Llama").to(torch.bfloat16)
    inputs = prompts(9)
    ids, step = inputs["input_ids"], DecodeStep(1, 32, torch.device("cpu"))
    with torch.no_grad():
        step.prefill(half, ids, inputs["attention_mask"])
        for _ in range(8):
            ids = torch.cat([ids, step.token], 1)
            step.run(half)
        wanted = truth(input_ids=ids).logits[:, -1]
        plain = half(input_ids=ids).logits[:, -1].float()
    scale = float(wanted.abs().max())
    assert (step.logits - wanted).abs().max() <= (plain - wanted).abs().max() + 1e-2 * scale


@pytest.fixture
def loaded(adapted_embedded: tuple[Any, Any]) -> tuple[Any, Any]:
    return adapted_embedded


@pytest.fixture
def no_generate(loaded, monkeypatch) -> Any:
    """From a call on, transformers' generate fails."""

    def forbid() -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("generate was called")

        monkeypatch.setattr(loaded[0], "generate", fail)

    return forbid


@pytest.mark.model
def test_questions_are_answered_the_same(loaded, no_generate) -> None:
    model, tokenizer = loaded
    together = ask_many(model, tokenizer, QUESTIONS, max_new_tokens=16)
    alone = [ask(model, tokenizer, question, max_new_tokens=16) for question in QUESTIONS]
    pieces = list(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=16))
    no_generate()
    with eager_on_cpu():
        assert ask_many(model, tokenizer, QUESTIONS, max_new_tokens=16) == together
        assert [ask(model, tokenizer, q, max_new_tokens=16) for q in QUESTIONS] == alone
        assert list(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=16)) == pieces
    assert "Paris" in together[0] and len(pieces) > 3
    assert model.training


@pytest.mark.model
def test_a_stream_stops_when_told(loaded, no_generate) -> None:
    model, tokenizer = loaded
    no_generate()
    with eager_on_cpu():
        whole = "".join(stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24))
        stop, pieces = threading.Event(), []
        for piece in stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24, stop=stop):
            pieces.append(piece)
            stop.set()
        cut = "".join(pieces)
        assert whole.startswith(cut) and len(cut) < len(whole)
        running = stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24)
        next(running)
        running.close()
    assert model.training


@pytest.mark.model
def test_a_second_stream_beside_the_first_is_generates(loaded) -> None:
    model, tokenizer = loaded
    alone = [list(stream(model, tokenizer, q, max_new_tokens=8)) for q in QUESTIONS[:2]]
    with eager_on_cpu():
        first, second = (stream(model, tokenizer, q, max_new_tokens=8) for q in QUESTIONS[:2])
        begun = [[next(first)], [next(second)]]
        assert [begun[0] + list(first), begun[1] + list(second)] == alone


@pytest.mark.model
def test_what_fails_in_the_middle_reaches_the_reader(loaded, monkeypatch) -> None:
    model, tokenizer = loaded

    def fail(self: Any, causal: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(DecodeStep, "run", fail)
    with eager_on_cpu():
        with pytest.raises(RuntimeError, match="no memory left"):
            list(stream(model, tokenizer, "Hello"))
        monkeypatch.undo()
        # the step is free again
        assert ask(model, tokenizer, QUESTIONS[0], max_new_tokens=8)


def test_what_generate_alone_can_do_is_left_to_it() -> None:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    model, inputs = tiny_model("Llama"), prompts(9)
    for more in (
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"max_length": 5},
        {"min_new_tokens": 3, "eos_token_id": 4},
        {"no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"stopping_criteria": StoppingCriteriaList()},
        {"logits_processor": LogitsProcessorList()},
        {"temperature": -1.0, "do_sample": True},
    ):
        with eager_on_cpu():
            assert decode(model, inputs, greedy(4) | more) is None, more
            assert decode(model, inputs | {"token_type_ids": None}, greedy(4)) is None
    with eager_on_cpu():
        assert decode(model.train(), inputs, greedy(4)) is None
    assert decode(model.eval(), inputs, greedy(4)) is None, "it is on a CPU"
