"""Turn a model that was just loaded as plain NF4 into a dynamically quantised one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import Budget, parse_budget
from colab_qlora.quantization.calibration import calibration_batches
from colab_qlora.quantization.dynamic import (
    ATTRIBUTE,
    DynamicQuantization,
    apply_rungs,
    needs_16_bit,
    quantize_dynamically,
)
from colab_qlora.quantization.map_file import RecordedMap
from colab_qlora.quantization.placing import rung_of
from colab_qlora.quantization.weight_source import WeightSource

NAMES = ("nf4", "dynamic")
DEFAULT_BUDGET = "+5%"
# what "auto" plans for, as `per_device_train_batch_size` is in most notebooks
AUTO_BATCH_SIZE = 2


@dataclass(frozen=True)
class DynamicRequest:
    """What `from_pretrained` was asked for; `recorded` comes from an adapter's folder."""

    budget: Budget
    words: str
    calibration_data: Any = None
    recorded: RecordedMap | None = None


def dynamic_request(
    quantization: Any,
    quantization_budget: Any,
    calibration_data: Any,
    *,
    load_in_4bit: bool,
    recorded: RecordedMap | None = None,
) -> DynamicRequest | None:
    """Understand the arguments of `from_pretrained`; None for plain NF4.

    Raises:
        UserError: an unknown name or budget, or arguments that contradict each other.
    """
    if quantization is None and recorded is None:
        quantization = "nf4"
    if recorded is not None and quantization in (None, "dynamic"):
        return DynamicRequest(Budget(share=0.0), recorded.budget, None, recorded)
    if quantization not in NAMES:
        raise UserError(
            "quantization is not understood",
            got=repr(quantization),
            allowed=" or ".join(map(repr, NAMES)),
        )
    if quantization == "nf4":
        if calibration_data is not None:
            raise UserError(
                "calibration_data are for dynamic quantisation",
                got='quantization="nf4"',
                do='Pass quantization="dynamic" with them, or leave them out',
            )
        return None
    if not load_in_4bit:
        raise UserError(
            "dynamic quantisation starts from 4 bit",
            got="load_in_4bit=False",
            do='Leave load_in_4bit=True, or leave quantization="dynamic" out',
        )
    budget = parse_budget(quantization_budget)
    words = quantization_budget if isinstance(quantization_budget, str) else f"{budget.gib:g} GiB"
    return DynamicRequest(budget, words, calibration_data)


def refuse_quantised(config: Any) -> None:
    """Raise UserError if a checkpoint is quantised already, and say what cannot be done then."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = fields.get("quant_method") or "an unknown method"
    bits = 4 if fields.get("load_in_4bit") else fields.get("bits", "")
    raise needs_16_bit(f"{method} {bits}".strip())


def make_dynamic(
    model: Any,
    tokenizer: Any,
    request: DynamicRequest,
    place: str,
    name: str,
    max_seq_length: int,
    compute_dtype: torch.dtype,
    **hub: Any,
) -> DynamicQuantization:
    """Measure, choose and place; or do again what a map file says.

    Args:
        model, tokenizer: as loaded; plain NF4.
        request: from `dynamic_request`.
        place: the checkpoint's folder or hub id; `name` is what the user calls it.
        max_seq_length, compute_dtype: of the model.
        **hub: token, revision.
    """
    source = WeightSource.of_checkpoint(place, **hub)
    if request.recorded is not None:
        return _made_again(model, source, request.recorded, name, compute_dtype)
    batches = []
    if request.calibration_data is not None:
        device = next(model.parameters()).device
        batches = calibration_batches(request.calibration_data, tokenizer, max_seq_length, device)
    else:
        _say(
            "dynamic quantisation without calibration_data: scales are searched for unweighted, "
            "and precision goes by the error of the numbers; pass the training rows for more"
        )
    spare = _spare_bytes(model, max_seq_length) if request.budget.is_auto else 0
    state = quantize_dynamically(
        model,
        source,
        batches,
        request.budget,
        compute_dtype,
        spare_bytes=spare,
        words=request.words,
        say=_say,
    )
    state.source_name = name
    return state


def _made_again(
    model: Any,
    source: WeightSource,
    recorded: RecordedMap,
    name: str,
    compute_dtype: torch.dtype,
) -> DynamicQuantization:
    items = weight_items(model)
    names = {item.name for item in items}
    missing = recorded.map.placements.keys() - names
    if missing:
        raise UserError(
            "the quantisation map beside the adapter is of another model",
            got=f"{', '.join(sorted(missing)[:3])} and {max(0, len(missing) - 3)} more",
            allowed=f"weights of {name}",
            do=f"Load the adapter over {recorded.base}",
        )
    for item in items:
        rung_of(item)
    state = DynamicQuantization(
        recorded.map,
        {},
        recorded.map.cap_bytes,
        recorded.column_weights,
        source,
        compute_dtype,
        recorded.budget,
        recorded.has_data,
        list(recorded.history),
        name,
    )
    apply_rungs(model, items, recorded.map.rungs, state, _say)
    setattr(model, ATTRIBUTE, state)
    return state


def _spare_bytes(model: Any, max_seq_length: int) -> int:
    """What the activation planner leaves of the GPU's memory when it need not save any."""
    if next(model.parameters()).device.type != "cuda":
        _say('quantization_budget="auto" fills a GPU\'s memory, and there is none: +0%')
        return 0
    from colab_qlora.models.memory_planning import plan_memory

    plan = plan_memory(model, AUTO_BATCH_SIZE, max_seq_length)
    if plan.error is not None or plan.step is None:
        return 0
    if any(plan.step.offload) or plan.step.plan.recompute:
        return 0
    return max(0, plan.machine.budget_bytes - plan.step.peak_bytes)


def _say(line: str) -> None:
    print(f"colab_qlora: {line}")
