"""Answers: alone, together, in pieces; where they end, and what state the model is left in."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from colab_qlora import UserError  # noqa: E402
from colab_qlora.generation import (  # noqa: E402
    answering,
    ask,
    ask_many,
    end_tokens,
    generate_options,
    prompt_tokens,
    stream,
)

pytestmark = pytest.mark.model
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
]


@pytest.fixture
def loaded(adapted_embedded: tuple[Any, Any]) -> tuple[Any, Any]:
    return adapted_embedded


def test_many_are_answered_as_one_by_one(loaded):
    model, tokenizer = loaded
    together = ask_many(model, tokenizer, QUESTIONS, max_new_tokens=12)
    assert "Paris" in together[0]
    assert together == [ask(model, tokenizer, q, max_new_tokens=12) for q in QUESTIONS]


def test_padding_on_the_left_leaves_the_next_tokens_logits(loaded):
    model, tokenizer = loaded
    inputs = prompt_tokens(model, tokenizer, QUESTIONS)
    assert not bool(inputs["attention_mask"].all()), "prompts of one length prove nothing"
    assert bool(inputs["attention_mask"][:, -1].all())
    model.eval()
    with torch.no_grad():
        # as generate does: positions count tokens, not places
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = model(**inputs, position_ids=positions).logits[:, -1]
        for i, question in enumerate(QUESTIONS):
            alone = model(**prompt_tokens(model, tokenizer, [question])).logits[:, -1]
            assert float((together[i] - alone[0]).abs().max()) < 1e-3
    model.train()


def test_pieces_make_the_same_answer(loaded):
    model, tokenizer = loaded
    pieces = list(stream(model, tokenizer, QUESTIONS[0], max_new_tokens=12))
    assert len(pieces) > 2
    assert "".join(pieces).strip() == ask(model, tokenizer, QUESTIONS[0], max_new_tokens=12)


def test_a_stream_can_be_stopped(loaded):
    model, tokenizer = loaded
    whole = "".join(stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24))
    stop = threading.Event()
    pieces = []
    for piece in stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24, stop=stop):
        pieces.append(piece)
        stop.set()
    cut = "".join(pieces)
    assert whole.startswith(cut) and len(cut) < len(whole)
    # an answer that ends by itself leaves the caller's event alone
    stop.clear()
    assert "".join(stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24, stop=stop)) == whole
    assert not stop.is_set()
    # and closing it early is enough
    running = stream(model, tokenizer, QUESTIONS[1], max_new_tokens=24)
    next(running)
    running.close()
    assert model.training


def test_gradients_can_be_computed_between_two_pieces(loaded):
    model, tokenizer = loaded
    weight = torch.ones(2, requires_grad=True)
    first = stream(model, tokenizer, QUESTIONS[0], max_new_tokens=4)
    second = stream(model, tokenizer, QUESTIONS[1], max_new_tokens=4)
    for running in (first, second):
        next(running)
        assert not torch.is_inference_mode_enabled()
        (weight * 2).sum().backward()
    for running in (first, second):
        list(running)
    assert model.training, "the second one began while the first was under way"
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert weight.grad.tolist() == [4.0, 4.0]


def test_a_chat_beside_a_template_gets_one_start_token(loaded):
    model, tokenizer = loaded

    class Starting:
        """The same tokenizer, as those of Llama and Gemma that begin texts with a token."""

        chat_template = tokenizer.chat_template

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [start, *ids] if add_special_tokens else ids}

    start = len(tokenizer) - 1  # of no text
    prompts = [QUESTIONS[2], "plain"]
    found = prompt_tokens(model, Starting(), prompts, prompt_template="Q: {}\nA:")["input_ids"]
    assert (found == start).sum(dim=1).tolist() == [0, 1]


def test_what_the_user_asks_of_generate_is_followed(loaded):
    model, tokenizer = loaded
    asked = {"eos_token_id": 7, "pad_token_id": 8, "max_length": 5}
    found = generate_options(model, tokenizer, 8, asked)
    assert {name: found[name] for name in asked} == asked
    with pytest.raises(UserError, match="nothing can be drawn at temperature 0"):
        generate_options(model, tokenizer, 8, {"do_sample": True, "temperature": 0})
    text = ask(model, tokenizer, "x", prompt_template='{"a": {}}', max_new_tokens=1)
    assert isinstance(text, str)


def test_an_error_while_writing_reaches_the_reader(loaded, monkeypatch):
    model, tokenizer = loaded

    def fail(**kwargs: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(stream(model, tokenizer, "Hello"))
    assert model.training


def test_the_model_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    had_cache = model.config.use_cache
    for mode in (True, False):
        model.train(mode)
        ask(model, tokenizer, "Hello", max_new_tokens=1)
        assert (model.training, model.config.use_cache) == (mode, had_cache)
    model.train()


def test_an_answer_ends_at_the_tokenizers_end_too(loaded, monkeypatch):
    """As after a chat template with another end of turn than the model's own."""
    model, tokenizer = loaded
    usual = ask(model, tokenizer, QUESTIONS[0], max_new_tokens=24)
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    monkeypatch.setattr(model.generation_config, "eos_token_id", other)
    assert end_tokens(model, tokenizer) == sorted([other, tokenizer.eos_token_id])
    assert ask(model, tokenizer, QUESTIONS[0], max_new_tokens=24) == usual
    inputs = prompt_tokens(model, tokenizer, QUESTIONS[:1])
    options = generate_options(model, tokenizer, 24, {}) | {"eos_token_id": other}
    runs_on = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert len(runs_on) > len(tokenizer(usual)["input_ids"]) + 1, "it ended by itself"


def test_sampling_is_off_without_a_temperature(loaded):
    model, tokenizer = loaded
    greedy = generate_options(model, tokenizer, 8, {})
    assert (greedy["do_sample"], greedy["temperature"]) == (False, None)
    drawn = generate_options(model, tokenizer, 8, {"temperature": 0.7, "top_p": 0.9})
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"]) == (True, 0.7, 0.9)
    assert generate_options(model, tokenizer, 8, {"temperature": 0})["do_sample"] is False
    with pytest.raises(UserError, match="temperature is negative"):
        generate_options(model, tokenizer, 8, {"temperature": -1})


def test_what_cannot_be_answered_is_refused(loaded, monkeypatch):
    model, tokenizer = loaded
    assert ask_many(model, tokenizer, []) == []
    with pytest.raises(UserError, match="a prompt has no tokens"):
        ask(model, tokenizer, "", prompt_template="{}")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template for a conversation"):
        ask(model, tokenizer, QUESTIONS[2])


def test_answers_of_several_threads_leave_the_model_as_it_was(loaded):
    model, _ = loaded
    model.train()
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            for _ in range(200):
                with answering(model):
                    assert not model.training
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=enter) for _ in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert model.training
