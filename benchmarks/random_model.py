"""Write a randomly initialised checkpoint of a named shape, with a small word tokenizer.

    python -m benchmarks.random_model FOLDER [--shape 8b]

Time and memory of a training step depend on shapes only, so random weights serve where no real
checkpoint can be had. The shapes are those of the models' published configs. Written layer by
layer: an 8B takes 3 GiB of the host with a GPU, and 6 GiB without one (an estimate).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
# 40,960 tokens are planned and trained in the benchmarks
_LONG = {"max_position_embeddings": 65536}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
    },
    # Llama 3 8B
    "8b": {
        **_LLAMA,
        **_LONG,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # Llama 3.2 1B
    "1b": {
        **_LONG,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
        "vocab_size": 262144,
    },
    # Phi 4 mini
    "phi-4-mini": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        },
    },
}
STANDARD_DEVIATION = 0.02
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def write_checkpoint(folder: Path, shape: str) -> None:
    """Write config, tokenizer and one safetensors file a layer (bfloat16) into `folder`."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(**SHAPES[shape], **special, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    for number, sizes in _by_layer(model).items():
        tensors = {
            name: _values(name, size, shape, generator).bfloat16().cpu()
            for name, size in sizes.items()
        }
        file = f"model-{number + 1:03d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _by_layer(model: Any) -> dict[int, dict[str, torch.Size]]:
    """Names and shapes of the parameters of each layer; -1 is what stands outside the layers."""
    found: dict[int, dict[str, torch.Size]] = {}
    # of tied tables the first
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        found.setdefault(int(layer[1]) if layer else -1, {})[name] = parameter.shape
    return found


def _values(name: str, size: torch.Size, shape: str, generator: torch.Generator) -> torch.Tensor:
    if len(size) > 1:
        return torch.randn(size, generator=generator, device=generator.device) * STANDARD_DEVIATION
    # Gemma's norms multiply by 1 + weight
    is_one = name.endswith("norm.weight") and not shape.startswith("gemma")
    return torch.ones(size) if is_one else torch.zeros(size)


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
