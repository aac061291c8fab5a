"""A tiny Llama in float64 with unequal layers, padded batches, and a count of hooks."""

from __future__ import annotations

import torch

from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.plain_rungs import plain_quantize

_PARTS = [f"self_attn.{name}_proj" for name in "qkvo"]
_PARTS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [
    "model.embed_tokens",
    *(f"model.layers.{layer}.{name}" for layer in range(2) for name in _PARTS),
    "lm_head",
]
LINEARS = [name for name in NAMES if "layers" in name]


def tiny_llama(*, tied=False, seed=0, dtype=torch.float64):
    """14 linears, embedding and head; norms in `dtype`, where transformers' would round to float32.

    (Its loss does too.)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(32, 1e-6)
        layer.post_attention_layernorm = torch.nn.RMSNorm(32, 1e-6)
    model.model.norm = torch.nn.RMSNorm(32, 1e-6)
    return model.to(dtype).eval()


def batch_of(lengths, seed=0, unlabelled=2):
    """Rows of these lengths, padded on the right; the first tokens of each carry no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :unlabelled] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def hook_count(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def frozen(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def errors_of(model, rung, quantize=plain_quantize):
    """E by the weight's name."""
    weights = {item.name: item.weight.detach() for item in weight_items(model)}
    return {name: quantize(weight, rung, None) - weight for name, weight in weights.items()}


BATCHES = [batch_of((9, 5, 3)), batch_of((7, 8), seed=1), batch_of((11,), seed=2)]
