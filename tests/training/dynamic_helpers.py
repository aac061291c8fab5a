"""A tiny 16-bit checkpoint of few words, and a trainer over it in dynamic quantisation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

_WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]
_WORDS += ["sea", "tree", "say", "and", "or", "the", "a", "is", "not"]
_RANDOM = random.Random(0)
ROWS = [{"text": " ".join(_RANDOM.choice(_WORDS) for _ in range(24))} for _ in range(40)]
# a run of as many steps measures after steps 2, 4 and 6
STEPS, POINTS = 10, (0.2, 0.4, 0.6)


def write_checkpoint(folder: Path) -> Path:
    """Two layers, untied head, a vocabulary of the words above."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *_WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(names),
        initializer_range=0.1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dear_points(monkeypatch: Any) -> list[int]:
    """Prices are measured, and those of a weight that has few bits are made high at each point.

    Returns:
        A list that gets the number of micro-batches of each point.
    """
    from colab_qlora.quantization.budget import NF4_64
    from colab_qlora.quantization.dynamic import dynamic_state
    from colab_qlora.quantization.live_prices import LivePrices, measure_live
    from colab_qlora.quantization.rung_prices import RungPrice
    from colab_qlora.training import quantization_schedule

    found: list[int] = []

    def measured(model: Any, source: Any, batches: Any, **options: Any) -> LivePrices:
        live = measure_live(model, source, batches, **options)
        rungs = dynamic_state(model).map.rungs  # type: ignore[union-attr]
        few = [name for name, rung in rungs.items() if rung == NF4_64]
        name = few[len(found) % len(few)]
        dear = {r: RungPrice((), p.price * 1e4, 0.0) for r, p in live.prices[name].items()}
        found.append(len(batches))
        return LivePrices({**live.prices, name: dear}, live.mean_square)

    monkeypatch.setattr(quantization_schedule, "measure_live", measured)
    return found


def dynamic_trainer(
    checkpoint: Path,
    out: Path,
    *,
    quantization: str = "dynamic",
    budget: str = "+15%",
    lora: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer whose keyword arguments go to SFTConfig, to get_peft_model and to SFTTrainer."""
    from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer

    options: dict[str, Any] = {"quantization": quantization}
    if quantization == "dynamic":
        options |= {"quantization_budget": budget, "calibration_data": ROWS[:16]}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), 64, dtype="float32", **options
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **{"r": 4, "random_state": 1, "use_gradient_checkpointing": False, **(lora or {})},
    )
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(str(out), **{**defaults, **config}),
        train_dataset=ROWS,
        **{"live_plot": False, **(trainer or {})},
    )
