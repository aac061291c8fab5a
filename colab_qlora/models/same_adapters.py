"""Whether a model has the adapters already that it is to be given: a cell was run again."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.models.target_names import linear_names, targets_of_model
from colab_qlora.quantization.adapter_starts import LOFTQ, belongs_to_quantised

# what PEFT fills in by itself, and what is compared in another way
_NOT_ASKED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


def has_these_adapters(model: Any, targets: Sequence[str] | str, options: dict[str, Any]) -> bool:
    """Whether a model's only adapters are those that are asked for.

    Args:
        model: a PeftModel, or one without adapters.
        targets: as `get_peft_model` takes them.
        options: everything else that its adapters are made of, for PEFT's LoraConfig.

    Raises:
        UserError: it has others; the message says what differs.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return False
    difference = _difference(model, targets, options)
    if not difference:
        return True
    raise UserError(
        "the model has adapters already",
        got=difference,
        do="Load the base model again, or go on training with this one",
    )


def _difference(model: Any, targets: Sequence[str] | str, options: dict[str, Any]) -> str:
    """Each setting that differs, as it is and as it is asked for; "" if none does."""
    from peft import LoraConfig

    configs = list(model.peft_config.values())
    if len(configs) != 1 or type(configs[0]) is not LoraConfig:
        return ", ".join(model.peft_config)
    start = options.get("init_lora_weights", True)
    # over a quantised base the kit itself starts what is called so, and PEFT is told otherwise
    starts = {"init_lora_weights": True, "loftq_config": {}} if start == LOFTQ else {}
    asked = LoraConfig(**{**options, **starts}).to_dict() | {"init_lora_weights": start}
    has = configs[0].to_dict()
    if belongs_to_quantised(configs[0]):
        has["init_lora_weights"] = LOFTQ
    found = [
        f"{name} {has.get(name)!r}, asked {value!r}"
        for name, value in asked.items()
        if name not in _NOT_ASKED and _plain(has.get(name)) != _plain(value)
    ]
    if not _are_the_same(model, targets, configs[0]):
        is_, wanted = _listed(configs[0].target_modules), _listed(targets)
        found.append(f"target_modules {is_}, asked {wanted}")
    return "; ".join(found)


def _plain(value: Any) -> Any:
    """A setting with lists in one order, and all that means "none" as None."""
    return (sorted(value, key=str) if isinstance(value, list | set | tuple) else value) or None


def _are_the_same(model: Any, targets: Sequence[str] | str, config: Any) -> bool:
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    if targets == "all-linear":
        missing = _adaptable(model) - adapted
        return all(_is_excluded(name, config.exclude_modules or ()) for name in missing)
    if isinstance(targets, str):
        return {targets} == _as_set(config.target_modules)
    return set(targets_of_model(targets, adapted)[0]) == _as_set(config.target_modules)


def _is_excluded(name: str, excluded: Collection[str] | str) -> bool:
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == short or name.endswith("." + short) for short in excluded)


def _adaptable(model: Any) -> set[str]:
    """Names of the base's linears, adapted or not, but for the head and what is trained whole."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    # PEFT wraps what is trained whole, and keeps the original inside
    apart = tuple(
        f"{name}."
        for name, module in base.named_modules()
        if module is head or hasattr(module, "modules_to_save")
    )
    return {
        name.removesuffix(".base_layer")
        for name in linear_names(base)
        if not name.startswith(apart) and ".lora_" not in name
    }


def _as_set(names: Collection[str] | str | None) -> set[str]:
    return {names} if isinstance(names, str) else set(names or ())


def _listed(names: Collection[str] | str | None) -> str:
    return ", ".join(sorted(_as_set(names)))
