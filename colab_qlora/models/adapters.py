"""Attach LoRA adapters (PEFT) to a loaded model and set its activation checkpointing.

LoRA: y = W x + (alpha / r) B A x with A (r, in) and B (out, r) trained, W frozen
(Hu et al. 2021, arXiv 2106.09685; over a 4-bit W: Dettmers et al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from colab_qlora.activations.memory_plan import check_budgets
from colab_qlora.errors import UserError
from colab_qlora.models.fuse import fuse, fused_layers
from colab_qlora.models.loftq import loftq_source, start_from_quantisation_error
from colab_qlora.models.quiet_import import without_rename_warnings
from colab_qlora.models.same_adapters import has_these_adapters
from colab_qlora.models.saved_tables import let_tables_meet
from colab_qlora.models.settings import ATTRIBUTE, CHECKPOINTING_MODES, ModelSettings, settings_of
from colab_qlora.models.smart import plan_batches, print_line, runtime_of, stop_planning
from colab_qlora.models.target_names import is_present, linear_names, targets_of_model
from colab_qlora.quantization.instance_methods import set_adapter_methods

DEFAULT_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def attach_lora(
    model: Any,
    r: int = 16,
    target_modules: Sequence[str] | str | None = DEFAULT_TARGETS,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_gradient_checkpointing: bool | str = "smart",
    random_state: int | None = 3407,
    *,
    use_fused_layers: bool = True,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
    **lora_options: Any,
) -> Any:
    """Wrap `model` in a plain `PeftModel`; arguments as `FastLanguageModel.get_peft_model`."""
    from peft import LoraConfig

    _check_numbers(r, lora_dropout, bias)
    _check_names(lora_options)
    checkpointing = (use_gradient_checkpointing, memory_budget_gib, host_budget_gib)
    asked = dict[str, Any](r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, bias=bias)
    if has_these_adapters(model, target_modules or DEFAULT_TARGETS, asked | lora_options):
        return _keep_adapters(model, checkpointing, use_fused_layers=use_fused_layers)
    targets = _check_targets(model, target_modules)
    _check_saved_modules(model, lora_options.get("modules_to_save"))
    source = loftq_source(model, lora_options)
    if source is not None:
        # PEFT would quantise the codes of the base
        lora_options = {**lora_options, "init_lora_weights": True, "loftq_config": {}}
    config = LoraConfig(**asked, target_modules=targets, task_type="CAUSAL_LM", **lora_options)
    _check_dora(model, config)
    adapted = _with_adapters(model, config, random_state)
    if source is not None:
        start_from_quantisation_error(adapted, source)
    let_tables_meet(adapted)
    set_adapter_methods(adapted)
    if use_fused_layers:
        fuse(adapted)
    set_gradient_checkpointing(adapted, *checkpointing)
    if settings := settings_of(adapted):
        settings.trained_steps = 0
    return adapted.train()


def _with_adapters(model: Any, config: Any, random_state: int | None) -> Any:
    """The `PeftModel` around `model`, of which only the adapters are trainable."""
    import torch
    from peft import get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # adapters start the same for the same random_state, and the caller's random stream stays where
    # it was
    with torch.random.fork_rng(), without_rename_warnings():
        if random_state is None:
            torch.seed()
        else:
            torch.manual_seed(random_state)
        return get_peft_model(model, config)


def _keep_adapters(model: Any, checkpointing: tuple[Any, ...], *, use_fused_layers: bool) -> Any:
    """A model that has what it is asked to be given: a cell was run again."""
    print_line("the model has these adapters already: they stay as they are, trained or not")
    if use_fused_layers and not fused_layers(model):
        fuse(model)
    elif fused_layers(model) and not use_fused_layers:
        print_line("its layers stay fused: restore(model) undoes it")
    set_gradient_checkpointing(model, *checkpointing)
    return model.train()


def _check_numbers(r: Any, lora_dropout: float, bias: str) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError("the rank r is not positive", got=repr(r), allowed="an integer from 1 up")
    if not 0 <= lora_dropout < 1:
        raise UserError(
            "lora_dropout is not a share", got=lora_dropout, allowed="0 or more, below 1"
        )
    if bias not in {"none", "all", "lora_only"}:
        raise UserError("bias is not understood", got=repr(bias), allowed="none, all, lora_only")


def _check_names(lora_options: Iterable[str]) -> None:
    from peft import LoraConfig

    known = set(inspect.signature(LoraConfig).parameters)
    unknown = set(lora_options) - known
    if unknown:
        raise UserError(
            "unknown LoRA option",
            got=", ".join(sorted(unknown)),
            allowed=", ".join(sorted(known)),
        )


def _check_targets(model: Any, wanted: Sequence[str] | str | None) -> list[str] | str:
    if wanted is None:
        wanted = DEFAULT_TARGETS
    present = linear_names(model)
    if isinstance(wanted, str):
        # PEFT takes its shorthand, or a regular expression over the full names
        if wanted == "all-linear" or any(re.fullmatch(wanted, name) for name in present):
            return wanted
        wanted = [wanted]
    wanted, beyond = targets_of_model(wanted, present)
    for own, names in beyond.items():
        asked = ", ".join(names)
        print_line(f"the adapter for {asked} is for more: this model has one linear, {own}")
    missing = [name for name in wanted if not is_present(name, present)]
    if missing or not wanted:
        short = sorted({name.rsplit(".", 1)[-1] for name in present})
        raise UserError(
            "unknown target module" if missing else "no target module",
            got=", ".join(missing) or "an empty list",
            allowed=", ".join(short),
            do="Choose from these, or pass target_modules='all-linear'",
        )
    return list(wanted)


def _check_saved_modules(model: Any, wanted: Sequence[str] | str | None) -> None:
    """Modules that PEFT is to train whole cannot be held in few bits."""
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    for full, module in model.named_modules():
        if any(full == name or full.endswith("." + name) for name in names) and hasattr(
            module, "SCB"
        ):
            raise UserError(
                "a module of modules_to_save is held in 8 bits, which cannot be trained",
                got=full,
                do='Load the model with quantization="nf4", which leaves embedding and head in 16',
            )


def _check_dora(model: Any, config: Any) -> None:
    """PEFT would take the norms of int8 codes for those of the weights, and say nothing."""
    if config.use_dora and any(hasattr(module, "SCB") for module in model.modules()):
        raise UserError(
            "DoRA needs the norms of weights, which PEFT cannot read from 8 bits",
            got="use_dora=True over a model with int8 weights",
            do='Load the model with quantization="nf4", or leave use_dora out',
        )


def set_gradient_checkpointing(
    model: Any,
    mode: bool | str,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
) -> None:
    """Switch activation checkpointing: False keeps all activations, True recomputes whole layers.

    "smart" (and "unsloth", another name for it) plans every batch: what fits stays, what travels
    for nothing waits in host memory, and the rest is recomputed.

    Args:
        model: a model with adapters.
        mode: see above.
        memory_budget_gib: with "smart", most GPU memory that torch may hand out, in GiB; None: what
            is free when a plan is made.
        host_budget_gib: with "smart", most host memory to pin; 0 to offload nothing.

    Raises:
        UserError: another value, or a budget without "smart".
    """
    budgets = (memory_budget_gib, host_budget_gib)
    mode = _checked_mode(mode, budgets)
    earlier = runtime_of(model)
    stop_planning(model)
    if mode is False:
        disable_checkpointing(model)
    else:
        _enable_checkpointing(model)
        # torch's checkpoint passes no gradient to adapters unless its input requires one, and the
        # embedding is frozen; a fused layer needs none
        if not fused_layers(model):
            model.enable_input_require_grads()
    if mode == "smart":
        plan_batches(model, *budgets, earlier=earlier)
    settings = settings_of(model) or _new_settings(model)
    settings.use_gradient_checkpointing = mode
    settings.memory_budget_gib, settings.host_budget_gib = budgets


def _checked_mode(mode: bool | str, budgets: tuple[float | None, float | None]) -> bool | str:
    """False, True or "smart", by whichever name it was asked for."""
    if isinstance(mode, str) and mode.lower() in {"true", "false"}:
        mode = mode.lower() == "true"
    if mode not in CHECKPOINTING_MODES:
        raise UserError(
            "use_gradient_checkpointing is not understood",
            got=repr(mode),
            allowed="False, True, 'smart' ('unsloth' is another name for it)",
        )
    mode = "smart" if mode == "unsloth" else mode
    if mode != "smart" and budgets != (None, None):
        raise UserError(
            "a memory budget needs a planner",
            got=f"use_gradient_checkpointing={mode}",
            allowed="memory_budget_gib and host_budget_gib with use_gradient_checkpointing='smart'",
        )
    check_budgets(*budgets)
    return mode


def _new_settings(model: Any) -> ModelSettings:
    """The settings of a model that the kit did not load; they are attached to it."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    dtype = str(getattr(model, "dtype", "float32")).removeprefix("torch.")
    settings = ModelSettings(name, min(2048, positions), dtype)
    setattr(model, ATTRIBUTE, settings)
    return settings


def _enable_checkpointing(model: Any) -> None:
    kwargs = {"use_reentrant": False}
    # transformers 5.2x renamed the pair and warns about the older names
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def disable_checkpointing(model: Any) -> None:
    """Keep all activations, without changing the choice that `for_training` comes back to."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def count_parameters(model: Any) -> tuple[int, int]:
    """Number of trainable and of all parameters; a 4-bit weight counts its unpacked numbers."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
