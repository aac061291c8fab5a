"""A trainer over the tiny model, with few rows and few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_helpers import ROWS


@pytest.fixture
def make_trainer(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Build a trainer; keyword arguments go to SFTConfig, `lora` to get_peft_model."""
    pytest.importorskip("trl")
    from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer

    def build(
        out: Path | None = None,
        *,
        rows: Any = ROWS,
        eval_rows: Any = None,
        lora: dict | None = None,
        dtype: str = "float32",
        trainer: dict | None = None,
        **config: Any,
    ) -> SFTTrainer:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny_model_folder), 64, dtype=dtype
        )
        options = {"r": 4, "random_state": 1, "use_gradient_checkpointing": False, **(lora or {})}
        model = FastLanguageModel.get_peft_model(model, **options)
        defaults = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "optim": "adamw_8bit",
            "save_strategy": "no",
            "seed": 3,
        }
        return SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=SFTConfig(str(out or tmp_path / "out"), **{**defaults, **config}),
            train_dataset=rows,
            eval_dataset=eval_rows,
            **(trainer or {}),
        )

    return build
