"""What the notebooks show: NF4, LoRA's parameters, where the memory goes, what to change first.

Every picture is a matplotlib Figure made without pyplot, and has a `describe_...` function that
says the same in one to three sentences; `show(figure, text)` displays both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

# public name -> the module that defines it; no module has the name of what it defines, or its
# import would put the module where the function is expected
_EXPORTS = {
    "GUESSES": "guessing",
    "HyperparameterTable": "hyperparameters",
    "LayerShape": "activations",
    "LoraRow": "lora",
    "MemoryPart": "memory",
    "STARTING_VALUES": "hyperparameters",
    "StartingValue": "hyperparameters",
    "T4_LIMIT_GIB": "memory",
    "WeightPair": "nf4",
    "answer_loss": "losses",
    "check_guess": "guessing",
    "describe_lora_shapes": "lora_picture",
    "describe_memory": "memory_picture",
    "describe_nf4_levels": "nf4_pictures",
    "describe_plan": "plan_picture",
    "describe_weight_histogram": "nf4_pictures",
    "draw_lora_shapes": "lora_picture",
    "draw_memory": "memory_picture",
    "draw_nf4_levels": "nf4_pictures",
    "draw_plan": "plan_picture",
    "draw_weight_histogram": "nf4_pictures",
    "exercise_runs": "guessing",
    "format_lora_table": "lora",
    "hyperparameter_table": "hyperparameters",
    "layer_bytes_per_token": "activations",
    "layer_shape": "activations",
    "list_files": "folder_listing",
    "lora_table": "lora",
    "memory_parts": "memory",
    "nf4_levels": "nf4",
    "nf4_round_trip": "nf4",
    "panel_hints": "plan_for_panel",
    "show": "display",
    "weight_before_and_after": "nf4",
    "weight_parts": "memory",
}

__all__ = [
    "GUESSES",
    "STARTING_VALUES",
    "T4_LIMIT_GIB",
    "HyperparameterTable",
    "LayerShape",
    "LoraRow",
    "MemoryPart",
    "StartingValue",
    "WeightPair",
    "answer_loss",
    "check_guess",
    "describe_lora_shapes",
    "describe_memory",
    "describe_nf4_levels",
    "describe_plan",
    "describe_weight_histogram",
    "draw_lora_shapes",
    "draw_memory",
    "draw_nf4_levels",
    "draw_plan",
    "draw_weight_histogram",
    "exercise_runs",
    "format_lora_table",
    "hyperparameter_table",
    "layer_bytes_per_token",
    "layer_shape",
    "list_files",
    "lora_table",
    "memory_parts",
    "nf4_levels",
    "nf4_round_trip",
    "panel_hints",
    "show",
    "weight_before_and_after",
    "weight_parts",
]

if TYPE_CHECKING:
    from colab_qlora.teaching.activations import LayerShape, layer_bytes_per_token, layer_shape
    from colab_qlora.teaching.display import show
    from colab_qlora.teaching.folder_listing import list_files
    from colab_qlora.teaching.guessing import GUESSES, check_guess, exercise_runs
    from colab_qlora.teaching.hyperparameters import (
        STARTING_VALUES,
        HyperparameterTable,
        StartingValue,
        hyperparameter_table,
    )
    from colab_qlora.teaching.lora import LoraRow, format_lora_table, lora_table
    from colab_qlora.teaching.lora_picture import describe_lora_shapes, draw_lora_shapes
    from colab_qlora.teaching.losses import answer_loss
    from colab_qlora.teaching.memory import T4_LIMIT_GIB, MemoryPart, memory_parts, weight_parts
    from colab_qlora.teaching.memory_picture import describe_memory, draw_memory
    from colab_qlora.teaching.nf4 import (
        WeightPair,
        nf4_levels,
        nf4_round_trip,
        weight_before_and_after,
    )
    from colab_qlora.teaching.nf4_pictures import (
        describe_nf4_levels,
        describe_weight_histogram,
        draw_nf4_levels,
        draw_weight_histogram,
    )
    from colab_qlora.teaching.plan_for_panel import panel_hints
    from colab_qlora.teaching.plan_picture import describe_plan, draw_plan

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
