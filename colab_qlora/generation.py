"""Ask the model: one question or a conversation, one or many at a time, whole or as it is written.

Greedy decoding unless a temperature is given, so that the same model gives the same answers. Many
prompts are padded on the left, where padding changes no answer but for rounding. A model is put
into evaluation mode for the call and back into the mode that it was in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from colab_qlora.errors import UserError

# a question, or a conversation as [{"role": "user", "content": "..."}, ...]
Prompt = str | Sequence[Mapping[str, Any]]


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
        output = model.generate(
            **inputs, **generate_options(model, tokenizer, max_new_tokens, sampling)
        )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
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
        stop: once it is set, or once the iterator is closed, no further token is computed.

    Example:
        >>> for piece in stream(model, tokenizer, "What is QLoRA?"):
        ...     print(piece, end="", flush=True)
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    halt = stop or threading.Event()

    class Halt(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            import torch

            rows = input_ids.shape[0]
            return torch.full((rows,), halt.is_set(), dtype=torch.bool, device=input_ids.device)

    inputs = prompt_tokens(model, tokenizer, [question], prompt_template)
    options = generate_options(model, tokenizer, max_new_tokens, sampling)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            model.generate(
                **inputs,
                **options,
                streamer=pieces,
                stopping_criteria=StoppingCriteriaList([Halt()]),
            )
        except BaseException as error:  # handed to the thread that reads
            failures.append(error)
            pieces.end()

    with answering(model):
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            halt.set()
            writer.join()
    if failures:
        raise failures[0]


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
    is_chat = prompt_template is None and bool(tokenizer.chat_template)
    rows = [tokenizer(text, add_special_tokens=not is_chat)["input_ids"] for text in texts]
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
    options.setdefault("do_sample", bool(temperature))
    if options["do_sample"]:
        options["temperature"] = temperature or 1.0
    else:
        # the model's own generation config may have them, and transformers warns that they idle
        options |= {name: None for name in ("temperature", "top_p", "top_k") if name not in options}
    return options | {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_tokens(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids of all tokens that end an answer, the model's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode with a key-value cache and without gradients, for the block."""
    import torch

    was_training, had_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.inference_mode():
            yield
    finally:
        model.config.use_cache = had_cache
        model.train(was_training)


def _prompt_text(tokenizer: Any, question: Prompt, prompt_template: str | None) -> str:
    if isinstance(question, str):
        if prompt_template is not None or not tokenizer.chat_template:
            return (prompt_template or "{}").format(question)
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
    return str(text)
