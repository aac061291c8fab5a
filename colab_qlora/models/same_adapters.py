"""Whether a model has the adapters already that it is to be given: a cell was run again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from colab_qlora.models.target_names import targets_of_model


def difference_of_adapters(
    model: Any, targets: Sequence[str] | str, asked: dict[str, Any]
) -> str | None:
    """What tells a `PeftModel`'s adapters from those that are asked for.

    Args:
        model: a PeftModel.
        targets: as `get_peft_model` takes them.
        asked: the other settings by their names in PEFT's LoraConfig.

    Returns:
        Each setting with its present and its asked value; "" if there is no difference; None if
        the adapters cannot be compared: several of them, or none of LoRA's.
    """
    configs = list(model.peft_config.values())
    if len(configs) != 1 or any(not hasattr(configs[0], name) for name in ("r", *asked)):
        return None
    has = configs[0]
    # PEFT puts other values in the place of some that mean the same
    unlike = [
        name for name, value in asked.items() if (getattr(has, name) or None) != (value or None)
    ]
    found = [f"{name} {getattr(has, name)!r}, asked {asked[name]!r}" for name in unlike]
    wanted = _names(targets, model)
    if wanted != _as_set(has.target_modules):
        found.append(f"target_modules {_listed(has.target_modules)}, asked {_listed(targets)}")
    return "; ".join(found)


def _names(targets: Sequence[str] | str, model: Any) -> set[str]:
    if isinstance(targets, str):
        return {targets}
    present = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return set(targets_of_model(targets, present)[0])


def _as_set(names: Collection[str] | str) -> set[str]:
    return {names} if isinstance(names, str) else set(names)


def _listed(names: Collection[str] | str) -> str:
    return ", ".join(sorted(_as_set(names)))
