"""What the notebooks show: NF4, LoRA's parameters, where the memory goes, what to change first.

Every picture is a matplotlib Figure made without pyplot, and has a `describe_...` function that
says the same in one to three sentences; `show(figure, text)` displays both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it; no module has the name of what it defines, or its
# import would put the module where the function is expected
_EXPORTS = {
    "HyperparameterTable": "hyperparameters",
    "LoraRow": "lora",
    "MemoryPart": "memory",
    "STARTING_VALUES": "hyperparameters",
    "StartingValue": "hyperparameters",
    "WeightPair": "nf4",
    "activation_bytes": "activation_bytes_per_token",
    "describe_lora_shapes": "lora_picture",
    "describe_memory": "memory_picture",
    "describe_nf4_levels": "nf4_pictures",
    "describe_weight_histogram": "nf4_pictures",
    "draw_lora_shapes": "lora_picture",
    "draw_memory": "memory_picture",
    "draw_nf4_levels": "nf4_pictures",
    "draw_weight_histogram": "nf4_pictures",
    "format_lora_table": "lora",
    "hyperparameter_table": "hyperparameters",
    "lora_table": "lora",
    "memory_parts": "memory",
    "nf4_levels": "nf4",
    "nf4_round_trip": "nf4",
    "show": "display",
    "weight_before_and_after": "nf4",
    "weight_parts": "memory",
}
