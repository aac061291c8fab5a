from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "Below is an instruction that describes a task, paired with an input.",
    "Write a response that appropriately completes the request.",
    "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\nParis",
    "The model reads the prompt and learns the answer.",
    "user assistant system",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with <|im_end|> as eos, a pad token and a ChatML template."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


@pytest.fixture
def sentencepiece_like() -> Callable[..., Any]:
    """Makes a tokenizer that prepends a space and falls back to bytes, as Llama 2's and Mistral's.

    Its decoder drops the first space of whatever is decoded.
    """
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    def make(texts: list[str], vocab_size: int, post_processor: Any = None) -> Any:
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        bpe.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        if post_processor is not None:
            bpe.post_processor = post_processor
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write text or bytes, or rows as JSON lines, into a file and return its path."""

    def _write(content: str | bytes | list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


@pytest.fixture
def refused() -> Callable[..., str]:
    """Call something that must raise UserError; return its message after checking its shape."""
    from colab_qlora.errors import UserError

    def _refused(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
        with pytest.raises(UserError) as caught:
            call(*args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        assert caught.value.got and f"got {caught.value.got}" in message
        assert caught.value.allowed and f"allowed: {caught.value.allowed}" in message
        assert caught.value.do and message.endswith(f". {caught.value.do}.")
        return message

    return _refused
