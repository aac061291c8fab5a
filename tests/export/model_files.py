"""Small checkpoints of several architectures, tokenizers of several kinds, and GGUF files read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))

from small_checkpoint import exact_weights, randomise  # noqa: E402

from colab_qlora.export.pre_tokenizers import GPT_4O, LLAMA_3, QWEN_2, TEKKEN  # noqa: E402
from colab_qlora.models.adapters import attach_lora  # noqa: E402

LINES = [
    "The river rises in the hills, turns the wheels of two old mills, and runs down to the sea.",
    "In 1969, 3 people flew 384400 km to the Moon; it's 2,000,000 steps that we'll never walk.",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n\n\n# don't\n\t\tHELLO WORLD",
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u00e7a va? \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u041f\u0440\u0438\u0432\u0435\u0442! \U0001f600 ... ??!",
]
# what is easily cut otherwise: digits, contractions, blanks, line breaks, letters of other scripts
TEXTS = [
    *LINES,
    "",
    " ",
    "  two  blanks  ",
    "a\n\n b \r\n\r\n c\t\td   ",
    "I'll they'RE we've IT'S 'tis",
    "12 123 1234 12345678 3.14159 1,000",
    "don't-stop(x)[y]{z}<w>/path/to//file\\n",
    "CamelCaseWordsHTTPServer snake_case_words",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3_ROPE}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi 3": ("phi3", {"sliding_window": None}),
    "phi 4 mini": (
        "phi3",
        {
            "sliding_window": None,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.5, 2.0],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0],
            },
        },
    ),
    "gemma 2": (
        "gemma2",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 24},
    ),
    "gemma 3": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ),
}
# where a module of transformers stands in llama.cpp's files
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPLITS = {
    "llama-bpe": LLAMA_3,
    "dbrx": LLAMA_3,
    "qwen2": QWEN_2,
    "tekken": TEKKEN,
    "gpt-4o": GPT_4O,
}


def byte_level(kind, tokens=500):
    """A byte-level BPE tokenizer that splits as llama.cpp's `kind` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ignores = kind in ("llama-bpe", "tekken")
    bpe = Tokenizer(models.BPE(ignore_merges=ignores))
    own_regex = kind in ("gpt-2", "smollm")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex)]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if kind in SPLITS:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    bpe.decoder = decoders.ByteLevel()
    return _trained(bpe, tokens, ["<|pad|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|pad|>")


def sentencepiece_like(tokens=600, prefix=True, bos=True):
    """A BPE tokenizer as SentencePiece's: blanks are a letter, what is unknown becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Replace(" ", "\u2581")]
    if prefix:
        steps.insert(0, normalizers.Prepend("\u2581"))
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    made = _trained(bpe, tokens, special, "</s>", "<unk>", bos="<s>", unk="<unk>", bytes_too=True)
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return made


def _trained(bpe, tokens, special, eos, pad, bos=None, unk=None, bytes_too=False):
    import json

    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = [f"<0x{byte:02X}>" for byte in range(256)] if bytes_too else []
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[*special, *names],
        initial_alphabet=[] if bytes_too else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        # words of SentencePiece are not cut at blanks before
        max_token_length=12,
    )
    bpe.train_from_iterator(LINES * 3, trainer)
    if bytes_too:
        # bytes are pieces of the vocabulary, and no special tokens
        described = json.loads(bpe.to_str())
        described["added_tokens"] = described["added_tokens"][: len(special)]
        bpe = Tokenizer.from_str(json.dumps(described))
    options = {"bos_token": bos} if bos else {}
    options |= {"unk_token": unk} if unk else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, pad_token=pad, chat_template=CHATML, **options
    )


def write_model(folder, kind="llama", tokenizer=None, **options):
    """A random checkpoint of two layers in bfloat16; gives the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = len(tokenizer) if tokenizer is not None else 131
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": rows + 5,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def adapted(model, seed=1):
    """With LoRA adapters that change the model."""
    made = attach_lora(model, r=4, lora_alpha=12, use_gradient_checkpointing=False)
    randomise(made, seed)
    return made.eval()


def in_llama_order(weight, heads):
    """Rows as llama.cpp's Llama turns them: those of a pair side by side."""
    width = weight.shape[0] // heads
    order = [
        head * width + half * (width // 2) + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return weight[order]


def exact_tensors(folder, model):
    """float64, by name in the file, of the matrices that have an adapter."""
    found = {}
    for name, weight in exact_weights(folder, model).items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        weight = weight.numpy()
        if rest == "self_attn.q_proj":
            weight = in_llama_order(weight, 4)
        if rest == "self_attn.k_proj":
            weight = in_llama_order(weight, 2)
        found[f"blk.{layer}.{PLACES[rest]}.weight"] = weight
    return found


def read_gguf(file):
    """(fields, tensors): name -> value, and name -> (type's name, float32 array)."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        tensors[tensor.name] = tensor.tensor_type.name, values.reshape(shape)
    return fields, tensors
