"""Turn a model that was just loaded as plain NF4 into a dynamically quantised one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import Budget, parse_budget
from colab_qlora.quantization.calibration import Batch, calibration_batches
from colab_qlora.quantization.dynamic import (
    ATTRIBUTE,
    DynamicQuantization,
    apply_rungs,
    needs_16_bit,
    quantize_dynamically,
)
from colab_qlora.quantization.instance_methods import set_base_methods
from colab_qlora.quantization.map_file import RecordedMap
from colab_qlora.quantization.placing import rung_of
from colab_qlora.quantization.weight_source import WeightSource

NAMES = ("nf4", "dynamic")
DEFAULT_BUDGET = "+5%"
# what "auto" plans for, as `per_device_train_batch_size` is in most notebooks
AUTO_BATCH_SIZE = 2


@dataclass(frozen=True)
class DynamicRequest:
    """What `from_pretrained` was asked for; `recorded` comes from an adapter's folder.

    `batches` are made of the data before a weight is fetched: rows that cannot be used should not
    cost a download.
    """

    budget: Budget
    words: str
    calibration_data: Any = None
    recorded: RecordedMap | None = None
    batches: Sequence[Batch] = ()

    def with_batches(self, tokenizer: Any, max_seq_length: int) -> DynamicRequest:
        """The same with micro-batches on the CPU.

        Raises:
            UserError: data of another kind, or too short.
        """
        if self.calibration_data is None:
            return self
        batches = calibration_batches(self.calibration_data, tokenizer, max_seq_length)
        return replace(self, calibration_data=None, batches=batches)


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
    if recorded is not None:
        return _recorded_request(
            recorded, quantization, quantization_budget, calibration_data, load_in_4bit
        )
    if quantization is None:
        quantization = "nf4"
    if quantization not in NAMES:
        raise _unknown(quantization)
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


def _recorded_request(
    recorded: RecordedMap, quantization: Any, budget: Any, data: Any, load_in_4bit: bool
) -> DynamicRequest | None:
    """An adapter's own base, unless another one is asked for."""
    if not load_in_4bit or quantization == "nf4":
        asked = "16 bit" if not load_in_4bit else "plain NF4"
        _say(f"the adapter was trained over a base of mixed precision; loaded over {asked}")
        return None
    if quantization not in (None, "dynamic"):
        raise _unknown(quantization)
    parse_budget(budget)
    if data is not None or budget != DEFAULT_BUDGET:
        _say(
            "the precision map beside the adapter is used; quantization_budget and "
            "calibration_data are for a new one"
        )
    return DynamicRequest(Budget(share=0.0), recorded.budget, None, recorded)


def _unknown(quantization: Any) -> UserError:
    return UserError(
        "quantization is not understood",
        got=repr(quantization),
        allowed=" or ".join(map(repr, NAMES)),
    )


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
    request: DynamicRequest,
    place: str,
    name: str,
    max_seq_length: int,
    compute_dtype: torch.dtype,
    **hub: Any,
) -> DynamicQuantization:
    """Measure, choose and place; or do again what a map file says.

    Args:
        model: as loaded; plain NF4.
        request: from `dynamic_request`, with its batches.
        place: the checkpoint's folder or hub id; `name` is what the user calls it.
        max_seq_length, compute_dtype: of the model.
        **hub: token, revision.
    """
    set_base_methods(model)
    source = WeightSource.of_checkpoint(place, **hub)
    if request.recorded is not None:
        return _made_again(model, source, request.recorded, name, compute_dtype)
    device = next(model.parameters()).device
    batches = [{name: x.to(device) for name, x in batch.items()} for batch in request.batches]
    if not batches:
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
    dtype = str(compute_dtype).removeprefix("torch.")
    if recorded.compute_dtype != dtype:
        _say(
            f"the adapter's base computed in {recorded.compute_dtype} and now in {dtype}: its "
            "rounded weights differ by as much as that"
        )
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
    if any(plan.step.offload) or any(plan.step.plan.recompute):
        return 0
    # precision is worth more than weights that need not be decoded
    needed = plan.step.peak_bytes - plan.step.held_bytes
    return max(0, plan.machine.budget_bytes - needed)


def _say(line: str) -> None:
    print(f"colab_qlora: {line}")
