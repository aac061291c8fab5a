"""Ask the model: one question or a conversation, one or many at a time, whole or as it is written.

Greedy decoding unless a temperature is given, so that the same model gives the same answers. Many
prompts are padded on the left, where padding changes no answer but for rounding. A model is put
into evaluation mode for the call and back into the mode that it was in.

On a GPU tokens are decoded by a CUDA graph where the model and what is asked allow it
(`colab_qlora/decoding/`), else by transformers' `generate`; the answers are the same but for
rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from colab_qlora.errors import UserError

# a question, or a conversation as [{"role": "user", "content": "..."}, ...]
Prompt = str | Sequence[Mapping[str, Any]]
# model -> answers that are under way, and (training mode, key-value cache) before the first
_ANSWERING: WeakKeyDictionary[Any, tuple[int, tuple[bool, bool]]] = WeakKeyDictionary()
_ANSWERING_LOCK = threading.Lock()


def ask(
    model: Any,
    tokenizer: Any,
    question: Prompt,
    *,
    max_new_tokens: int = 64,
    prompt_template: str | None = None,
    **sampling: Any,
) -> str:
    """Return the model's answer to one question, without special tokens.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer; the chat template is used unless `prompt_template` is given.
        question: the user's words, or a conversation that ends with them.
        max_new_tokens: longest answer, in tokens.
        prompt_template: a text with one {} for the question, for models trained without a chat
            template.
        **sampling: temperature, top_p, top_k, repetition_penalty, ... of transformers' generate;
            greedy without a temperature.

    Raises:
        UserError: a conversation where there is no chat template, or nothing to answer.
    """
    return ask_many(
        model,
        tokenizer,
        [question],
        max_new_tokens=max_new_tokens,
        prompt_template=prompt_template,
        **sampling,
    )[0]


def ask_many(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    prompt_template: str | None = None,
    **sampling: Any,
) -> list[str]:
    """Return the answers to several questions, computed together; arguments as for `ask`.

    Twice as many together take nearly as long as half of them, as long as memory lasts: each token
    reads all weights once, for one row or for many.
    """
    if not questions:
        return []
    inputs = prompt_tokens(model, tokenizer, questions, prompt_template)
    with answering(model):
        options = generate_options(model, tokenizer, max_new_tokens, sampling)
        new_tokens = _write(model, inputs, options)
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def stream(
    model: Any,
    tokenizer: Any,
    question: Prompt,
    *,
    max_new_tokens: int = 256,
    prompt_template: str | None = None,
    stop: threading.Event | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the answer in pieces, word by word, as it is computed; arguments as for `ask`.

    Args:
        stop: once it is set, or once the iterator is closed, no further token is computed. It is
            read only, so that the caller clears it before the next answer.

    Example:
        >>> for piece in stream(model, tokenizer, "What is QLoRA?"):
        ...     print(piece, end="", flush=True)
    """
    from transformers import TextIteratorStreamer

    inputs = prompt_tokens(model, tokenizer, [question], prompt_template)
    options = generate_options(model, tokenizer, max_new_tokens, sampling)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = threading.Event()
    stops = (closed,) if stop is None else (closed, stop)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            _write(model, inputs, options, pieces, stops)
        except BaseException as error:  # handed to the thread that reads
            failures.append(error)
            pieces.end()

    with answering(model):
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            closed.set()
            writer.join()
    if failures:
        raise failures[0]


def _write(
    model: Any,
    inputs: Any,
    options: dict[str, Any],
    streamer: Any = None,
    stops: Sequence[threading.Event] = (),
) -> Any:
    """The new tokens of the answers, (prompts, longest), by the fastest way that is open."""
    import torch

    from colab_qlora.decoding import decode

    decoded = decode(model, inputs, options, streamer, stops)
    if decoded is not None:
        return decoded
    if stops:
        _halt_when(options, stops)
    # of this thread alone: the reader of a stream may compute gradients between two pieces
    with torch.inference_mode():
        output = model.generate(**inputs, **options, streamer=streamer)
    return output[:, inputs["input_ids"].shape[1] :]


def _halt_when(options: dict[str, Any], events: Sequence[threading.Event]) -> None:
    """Add to what generate is told that it stops once one of the events is set."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Halt(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            import torch

            is_over = any(event.is_set() for event in events)
            return torch.full(
                (input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device
            )

    given = options.get("stopping_criteria") or ()
    options["stopping_criteria"] = StoppingCriteriaList([*given, Halt()])


def prompt_tokens(
    model: Any, tokenizer: Any, questions: Sequence[Prompt], prompt_template: str | None = None
) -> Any:
    """Token ids and mask of the prompts, padded on the left, on the model's device.

    Returns:
        "input_ids" and "attention_mask", (prompts, length of the longest).

    Raises:
        UserError: as `ask`.
    """
    from colab_qlora.models.host_embedding import compute_device

    texts = [_prompt_text(tokenizer, question, prompt_template) for question in questions]
    # a chat template writes the first token itself
    rows = [tokenizer(text, add_special_tokens=not is_chat)["input_ids"] for text, is_chat in texts]
    if empty := [i for i, ids in enumerate(rows) if not ids]:
        raise UserError(
            "a prompt has no tokens", got=repr(questions[empty[0]]), allowed="one token or more"
        )
    found = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    return found.to(compute_device(model))


def generate_options(
    model: Any, tokenizer: Any, max_new_tokens: int, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """What transformers' generate is told: when an answer ends, and how tokens are drawn.

    An answer ends at the model's own end tokens, and at the tokenizer's: a chat template given
    since may end turns with another one.
    """
    options = dict(sampling)
    temperature = options.pop("temperature", None)
    if temperature is not None and temperature < 0:
        raise UserError("temperature is negative", got=temperature, allowed="0 (greedy) or more")
    if options.get("do_sample") and temperature == 0:
        raise UserError(
            "nothing can be drawn at temperature 0", got="do_sample=True", allowed="more than 0"
        )
    options.setdefault("do_sample", bool(temperature))
    if options["do_sample"]:
        options["temperature"] = 1.0 if temperature is None else temperature
    else:
        # the model's own generation config may have them, and transformers warns that they idle
        options |= {name: None for name in ("temperature", "top_p", "top_k") if name not in options}
    usual = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_tokens(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return usual | options


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end an answer, the model's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode with a key-value cache, for the block; what decoding keeps outlasts it.

    A model in training mode keeps nothing. Blocks of several answers may overlap in any order: the
    last one to end brings back what the first one found.
    """
    with _ANSWERING_LOCK:
        count, found = _ANSWERING.get(model, (0, (model.training, model.config.use_cache)))
        _ANSWERING[model] = (count + 1, found)
        model.eval()
        model.config.use_cache = True
    try:
        yield
    finally:
        with _ANSWERING_LOCK:
            count, (was_training, had_cache) = _ANSWERING.pop(model)
            if count > 1:
                _ANSWERING[model] = (count - 1, found)
            else:
                model.config.use_cache = had_cache
                model.train(was_training)
                if was_training:
                    from colab_qlora.decoding import free_decoding

                    # the next step needs the memory
                    free_decoding(model)


def _prompt_text(tokenizer: Any, question: Prompt, prompt_template: str | None) -> tuple[str, bool]:
    """The prompt, and whether a chat template wrote it."""
    if isinstance(question, str):
        if prompt_template is not None or not tokenizer.chat_template:
            # no format(): a template may hold braces of its own
            return (prompt_template or "{}").replace("{}", question, 1), False
        question = [{"role": "user", "content": question}]
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template for a conversation",
            got=f"{len(question)} messages",
            do="Give it one: get_chat_template(tokenizer, ...), or ask with plain text",
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in question], tokenize=False, add_generation_prompt=True
    )
    return str(text), True
