"""Ask the model a question: one chat turn, or a bare prompt, decoded greedily."""

from __future__ import annotations

from typing import Any


def ask(
    model: Any,
    tokenizer: Any,
    question: str,
    *,
    max_new_tokens: int = 64,
    prompt_template: str | None = None,
) -> str:
    """Return the model's answer to one question, without special tokens.

    Greedy decoding, so that the same model gives the same answer. The model is put into evaluation
    mode for the call and back into the mode it was in.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer; the chat template is used unless `prompt_template` is given.
        question: the user's words.
        max_new_tokens: longest answer, in tokens.
        prompt_template: a text with one {} for the question, for models trained without a chat
            template.
    """
    import torch

    from colab_qlora.models.host_embedding import compute_device

    if prompt_template is None and tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer((prompt_template or "{}").format(question), return_tensors="pt")
    inputs = inputs.to(compute_device(model))
    was_training, had_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.config.use_cache = had_cache
        model.train(was_training)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
