"""A tiny Llama in dynamic quantisation with adapters, its 16-bit source, and micro-batches."""

from __future__ import annotations

import torch

from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import NF4_64, Budget
from colab_qlora.quantization.dynamic import dynamic_state, quantize_dynamically
from colab_qlora.quantization.placing import place
from colab_qlora.quantization.plain_rungs import rungs_of


class DictSource(dict):
    """16-bit matrices by name; those in `gone` cannot be read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gone = set()

    def __call__(self, name):
        if name in self.gone:
            raise FileNotFoundError(name)
        return self[name]


def batch_of(seed, rows=4, length=24):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


BATCHES = [batch_of(seed) for seed in range(4)]


def plain_llama(*, tied=False, dropout=0.0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.1,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def nf4_llama(**options):
    """The model as plain NF4, and the source of its 16-bit weights."""
    model = plain_llama(**options)
    items = weight_items(model)
    source = DictSource((item.name, item.weight.detach().clone()) for item in items)
    for item in items:
        if rungs_of(model, item)[0] == NF4_64:
            weight = source(item.name)
            place(model, item, NF4_64, weight, compute_dtype=torch.float32, search=False)
    return model.requires_grad_(False), source


def dynamic_llama(share=0.10, batches=BATCHES[:2], lora=None, **options):
    """A PEFT model with a dynamic state, in training mode."""
    from peft import LoraConfig, get_peft_model

    model, source = nf4_llama(**options)
    quantize_dynamically(
        model, source, batches, Budget(share=share), torch.float32, say=lambda line: None
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **(lora or {})))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    assert dynamic_state(adapted) is not None
    return adapted.train()


def decoded(item):
    """The weight that a forward pass uses, (rows, columns)."""
    module = item.modules[0]
    if hasattr(module, "decoded"):
        return module.decoded()
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight, state)
