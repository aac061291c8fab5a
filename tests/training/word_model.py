"""A random 2-layer Llama whose tokens are the words of a few texts: a head of some dozen rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def write_word_model(folder: Path, texts: Iterable[str], *, adds_start: bool = False) -> Path:
    """Write model and tokenizer into a folder, and return it.

    Args:
        folder: a folder to make.
        texts: words between spaces become tokens; the special ones are taken as they stand.
        adds_start: put <s> before every text, as the tokenizers of Llama and Mistral do.
    """
    words = sorted({word for text in texts for word in text.split()} - set(SPECIAL))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_start:
        words_only.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_only, **names)
    tokenizer.save_pretrained(folder)
    return folder
