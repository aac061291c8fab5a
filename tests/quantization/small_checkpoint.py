"""A small Llama checkpoint on disk, loaded as the kit loads one: in NF4, or on many rungs."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from colab_qlora.models.adapters import attach_lora
from colab_qlora.models.loading import keep_weights_in_place
from colab_qlora.models.settings import ATTRIBUTE as SETTINGS
from colab_qlora.models.settings import ModelSettings
from colab_qlora.quantization import dynamic
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.dynamic import DynamicQuantization
from colab_qlora.quantization.placing import place
from colab_qlora.quantization.weight_source import WeightSource

VOCABULARY = 131
# one of each kind in each layer, and shapes that are no power of two
RUNGS = {
    "model.layers.0.self_attn.q_proj": "nf4_32",
    "model.layers.0.self_attn.o_proj": "int8",
    "model.layers.0.mlp.up_proj": "16bit",
    "model.layers.1.self_attn.v_proj": "int8",
    "model.layers.1.mlp.down_proj": "nf4_32",
}
TOKENS = torch.arange(3, 3 + 2 * 17).reshape(2, 17)


def write_llama(folder, *, tied=True, biased=False, dtype=torch.bfloat16):
    """Two layers, saved by transformers; gives the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=72,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=biased,
        initializer_range=0.12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_nf4(folder, dtype=torch.bfloat16, **options):
    """What FastLanguageModel.from_pretrained gives, without a tokenizer."""
    from transformers import BitsAndBytesConfig

    options.setdefault(
        "quantization_config",
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    # None is for a checkpoint that brings its own
    options = {name: value for name, value in options.items() if value is not None}
    model = load_plain(folder, dtype=dtype, **options)
    setattr(model, SETTINGS, ModelSettings(str(folder), 64, str(dtype).removeprefix("torch.")))
    return model


def load_plain(folder, **options):
    """By plain transformers; 4-bit layers keep their weights in place, as the kit has it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)
    keep_weights_in_place(model)
    return model.eval()


def load_mixed(folder, dtype=torch.bfloat16, rungs=None, table="int8"):
    """Rungs of every kind, with the state that dynamic quantisation leaves on the model."""
    model, source = load_nf4(folder, dtype), WeightSource.of_checkpoint(str(folder))
    rungs = {**RUNGS, "model.embed_tokens": table, "lm_head": table} if rungs is None else rungs
    for item in weight_items(model):
        if item.name in rungs:
            place(model, item, rungs[item.name], source(item.name), compute_dtype=dtype)
    state = DynamicQuantization(SimpleNamespace(), {}, 0, {}, source, dtype, "+5%", False)
    setattr(model, dynamic.ATTRIBUTE, state)
    return model.eval()


def adapt(model, seed=1, **options):
    """Adapters that change the model: B is not 0."""
    options = {"lora_alpha": 12, "use_gradient_checkpointing": False, **options}
    adapted = attach_lora(model, r=4, **options)
    randomise(adapted, seed)
    return adapted.eval()


def randomise(adapted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model.eval()(input_ids=tokens).logits


def layers_of(adapted):
    """PEFT's LoRA layers by the name of their module in the plain model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def exact_weights(folder, adapted, adapters=("default",)):
    """W + scaling B A in float64, by module."""
    source, found = WeightSource.of_checkpoint(str(folder)), {}
    for name, layer in layers_of(adapted).items():
        found[name] = source(name).double()
        for adapter in adapters:
            b, a = layer.lora_B[adapter].weight.double(), layer.lora_A[adapter].weight.double()
            found[name] += (layer.scaling[adapter] * (b @ a)).detach()
    return found


def exact_model(folder, weights):
    """The checkpoint in float64 with these weights in it."""
    model = load_plain(folder, dtype=torch.float64)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model


def assert_same_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight
