"""colab_qlora: fine-tune language models with QLoRA on one small GPU, in notebooks that show how.

Importing this package loads nothing heavy, touches no GPU and no network, prints nothing and
changes no attribute of any other library: every public name is fetched from its module on first
use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "EarlyStopping": "training.early_stopping",
    "FastLanguageModel": "fast_language_model",
    "FastModel": "fast_language_model",
    "FastVisionModel": "peer_names",
    "PatchDPOTrainer": "peer_names",
    "PatchFastRL": "peer_names",
    "SFTConfig": "training.arguments",
    "SFTTrainer": "training.trainer",
    "UnslothTrainer": "training.trainer",
    "UnslothTrainingArguments": "training.arguments",
    "UserError": "errors",
    "advise": "curves.advise",
    "describe": "models.describe",
    "diagnose": "curves.diagnose",
    "explore_curves": "curves.widgets",
    "learning_rate_sweep": "training.learning_rate_sweep",
    "inspect_environment": "environment",
    "install_missing": "install",
    "is_bf16_supported": "peer_names",
    "is_bfloat16_supported": "peer_names",
    "plan_memory": "models.memory_planning",
    "quantization_report": "quantization.report",
    "read_log": "curves.log",
    "restore": "models.fuse",
    "draw_curves": "curves.draw",
    "apply_chat_template": "data.chat_texts",
    "get_chat_template": "data.chat_templates",
    "standardize_sharegpt": "data.conversations",
    "to_sharegpt": "data.merge_columns",
    "train_on_responses_only": "training.responses_only",
    "unsloth_train": "peer_names",
}

__all__ = [
    "EarlyStopping",
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "SFTConfig",
    "SFTTrainer",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UserError",
    "__version__",
    "advise",
    "apply_chat_template",
    "describe",
    "diagnose",
    "draw_curves",
    "explore_curves",
    "get_chat_template",
    "inspect_environment",
    "install_missing",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "learning_rate_sweep",
    "plan_memory",
    "quantization_report",
    "read_log",
    "restore",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]

if TYPE_CHECKING:
    from colab_qlora.curves.advise import advise
    from colab_qlora.curves.diagnose import diagnose
    from colab_qlora.curves.draw import draw_curves
    from colab_qlora.curves.log import read_log
    from colab_qlora.curves.widgets import explore_curves
    from colab_qlora.data.chat_templates import get_chat_template
    from colab_qlora.data.chat_texts import apply_chat_template
    from colab_qlora.data.conversations import standardize_sharegpt
    from colab_qlora.data.merge_columns import to_sharegpt
    from colab_qlora.environment import inspect_environment
    from colab_qlora.errors import UserError
    from colab_qlora.fast_language_model import FastLanguageModel, FastModel
    from colab_qlora.install import install_missing
    from colab_qlora.models.describe import describe
    from colab_qlora.models.fuse import restore
    from colab_qlora.models.memory_planning import plan_memory
    from colab_qlora.peer_names import (
        FastVisionModel,
        PatchDPOTrainer,
        PatchFastRL,
        is_bf16_supported,
        is_bfloat16_supported,
        unsloth_train,
    )
    from colab_qlora.quantization.report import quantization_report
    from colab_qlora.training.arguments import SFTConfig, UnslothTrainingArguments
    from colab_qlora.training.early_stopping import EarlyStopping
    from colab_qlora.training.learning_rate_sweep import learning_rate_sweep
    from colab_qlora.training.responses_only import train_on_responses_only
    from colab_qlora.training.trainer import SFTTrainer, UnslothTrainer

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
