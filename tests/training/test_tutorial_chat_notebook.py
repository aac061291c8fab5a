"""The cells of a chat tutorial, with its names and arguments; only the package is another."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.model

SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": f"What comes after {i}?"},
            {"from": "gpt", "value": f"{i + 1} comes after {i}."},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": f"{i + 2}."},
        ]
    }
    for i in range(16)
]


def _cells(folder: Path) -> dict[str, Any]:
    """What a reader runs from top to bottom."""
    from datasets import Dataset

    from colab_qlora import (
        FastLanguageModel,
        SFTConfig,
        SFTTrainer,
        is_bfloat16_supported,
        unsloth_train,
    )
    from colab_qlora.chat_templates import (
        get_chat_template,
        standardize_sharegpt,
        train_on_responses_only,
    )

    max_seq_length = 256
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max_seq_length,
        dtype=None,
        load_in_4bit=True,
        load_in_8bit=False,
        full_finetuning=False,
        fast_inference=False,
        use_exact_model_name=True,
        token=None,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        max_seq_length=max_seq_length,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")

    def formatting_prompts_func(examples: Any) -> dict[str, list[str]]:
        texts = [
            tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False)
            for c in examples["conversations"]
        ]
        return {"text": texts}

    dataset = standardize_sharegpt(Dataset.from_list(SHAREGPT))
    dataset = dataset.map(formatting_prompts_func, batched=True)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        dataset_num_proc=1,
        packing=False,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_ratio=0.1,
            max_steps=3,
            learning_rate=2e-2,
            fp16=not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir="outputs",
            overwrite_output_dir=True,
            save_safetensors=True,
            evaluation_strategy="no",
            report_to="none",
        ),
    )
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    labels = trainer.train_dataset[0]["labels"]
    stats = unsloth_train(trainer)
    FastLanguageModel.for_inference(model)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What comes after 3?"}],
        tokenize=True,
        add_generation_prompt=True,
        return_tensors="pt",
    ).to(model.device)
    outputs = model.generate(input_ids=inputs, max_new_tokens=4, use_cache=True)
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    return {
        "trainer": trainer,
        "tokenizer": tokenizer,
        "stats": stats,
        "labels": labels,
        "generated": outputs[0, inputs["input_ids"].shape[1] :],
    }


def test_cells_run_from_top_to_bottom(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colab_qlora import FastLanguageModel

    monkeypatch.chdir(tmp_path)
    found = _cells(tiny_model_folder)
    trainer = found["trainer"]
    assert (trainer.args.max_length, trainer.args.warmup_steps) == (256, 0.1)
    assert found["stats"].global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    learnt = found["tokenizer"].decode([label for label in found["labels"] if label != -100])
    assert "1 comes after 0." in learnt and "What comes after" not in learnt
    assert 1 <= len(found["generated"]) <= 4
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir("lora_model"))
    again, _ = FastLanguageModel.from_pretrained("lora_model", 256)
    ours = dict(trainer.model.named_parameters())
    for name, weight in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, ours[name].to(weight)), name
