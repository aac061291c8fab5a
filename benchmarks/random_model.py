"""Write a randomly initialised Llama checkpoint of a named shape, with a small word tokenizer.

    python -m benchmarks.random_model FOLDER [--shape 8b]

Time and memory of a training step depend on shapes only, so random weights serve where no real
checkpoint can be had. Written layer by layer: memory stays below 3 GiB on the host.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    # Llama 3 8B
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
STANDARD_DEVIATION = 0.02


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write config, tokenizer and one safetensors file a layer (bfloat16) into `folder`."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number in range(-1, config.num_hidden_layers):
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else (torch.randn(size, generator=generator) * STANDARD_DEVIATION).bfloat16()
            for name, size in _sizes(config, number).items()
        }
        file = f"model-{number + 1:03d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _sizes(config, number: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one layer; -1 is what stands outside the layers."""
    hidden, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    if number < 0:
        return {
            "model.embed_tokens.weight": (words, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (words, hidden),
        }
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()}


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"t{i}" for i in range(4, 1000))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="8b", choices=sorted(SHAPES))
    options = parser.parse_args()
    write_checkpoint(options.folder, options.shape)
    print(f"wrote {options.shape} to {options.folder}")


if __name__ == "__main__":
    main()
