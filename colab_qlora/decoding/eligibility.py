"""Whether a model's pass can be captured, and what a captured one holds for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from colab_qlora.models.architectures import attention_window
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.host_embedding import compute_device, is_on_host

# models whose pass over a cache asks the host nothing, and whose masks come from one place
ARCHITECTURES = tuple(
    f"{name}ForCausalLM"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite", "Gemma")
)
# a rotation whose tables are made anew as the sequence grows
_CHANGING_ROPE = ("dynamic", "longrope")
# whose hooks do the same at each pass, but for what they do in training
_KNOWN_HOOKS = ("colab_qlora.", "transformers.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# that modules compute with, beside their tensors
_NUMBERS = ("scaling", "attention_scaling", "variance_epsilon", "eps")
_PARAMETERS = ("Parameter", "Params4bit")

_FAILURES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_cpu_users = 0


@contextmanager
def eager_on_cpu() -> Iterator[None]:
    """Have models on a CPU decoded by the same code, which captures nothing there; for tests."""
    global _cpu_users
    _cpu_users += 1
    try:
        yield
    finally:
        _cpu_users -= 1


def why_not_graphed(model: Any) -> str:
    """Why transformers' generate decodes this model's answers; empty if a CUDA graph can.

    Args:
        model: a causal language model, adapted or not.
    """
    causal = causal_model(model)
    device = compute_device(causal)
    if device.type != "cuda" and not _cpu_users:
        return f"the model is on the {device.type.upper()}"
    kind = type(causal)
    if kind.__name__ not in ARCHITECTURES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is none of {', '.join(ARCHITECTURES)}"
    if causal in _FAILURES:
        return _FAILURES[causal]
    return _why_not_config(causal) or _why_not_adapters(model) or _why_not_modules(causal, device)


def remember_failure(causal: Any, reason: str) -> None:
    """Have `why_not_graphed` say so from now on."""
    _FAILURES[causal] = reason


def fingerprint(causal: Any) -> list[Any]:
    """What a captured pass was made of: classes, addresses, active adapters, dtypes of autocast.

    Values may change under it, as an optimiser's step does; anything else makes another list.
    """
    device = compute_device(causal).type
    found: list[Any] = [
        causal.config._attn_implementation,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    ]
    for module in causal.modules():
        found.append(type(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found += _address(tensor)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                found += _quantised(state)
        found += [getattr(module, name, None) for name in _NUMBERS]
        # PEFT's layers; a transformers model has a method of that name
        if isinstance(getattr(type(module), "active_adapters", None), property):
            scaling = getattr(module, "scaling", None)
            found += [
                list(module.active_adapters),
                module.disable_adapters,
                list(getattr(module, "merged_adapters", ())),
                dict(scaling) if isinstance(scaling, dict) else scaling,
            ]
    return found


def _quantised(state: Any) -> list[Any]:
    """What decodes a 4-bit weight; `.to()` moves each of them by itself."""
    found: list[Any] = [state.blocksize]
    nested = getattr(state, "state2", None)
    for tensor in (state.absmax, state.code, getattr(state, "offset", None)):
        found += _address(tensor)
    if nested is not None:
        found += [nested.blocksize, *_address(nested.absmax), *_address(nested.code)]
    return found


def _address(tensor: torch.Tensor | None) -> list[Any]:
    return [None] if tensor is None else [tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)]


def _why_not_config(causal: Any) -> str:
    config = causal.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation!r}, which takes no mask"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in _CHANGING_ROPE:
        return f"its rotation is {rope['rope_type']!r}, which changes with the length"
    for layer in causal.model.layers:
        if attention_window(layer.self_attn) is not None:
            return "its attention slides over a window"
    if is_on_host(causal.get_input_embeddings()):
        return "its embedding is in host memory; FastLanguageModel.for_inference brings it back"
    return ""


def _why_not_adapters(model: Any) -> str:
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            return f"its adapters are {kind}"
        if getattr(config, "alora_invocation_tokens", None):
            return "its adapters begin at a token of the prompt"
    return ""


def _why_not_modules(causal: Any, device: torch.device) -> str:
    for name, module in causal.named_modules():
        if "forward" in vars(module):
            return f"the forward of {name or 'the model'} is replaced"
        for hooks in _HOOKS:
            for hook in vars(module)[hooks].values():
                if not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS):
                    return f"{name or 'the model'} has hooks"
        if type(module).__name__ == "Linear8bitLt":
            return f"{name} looks for outliers in its input"
        for tensor in module._parameters.values():
            if tensor is None:
                continue
            if type(tensor).__name__ not in _PARAMETERS:
                return f"{name} has a weight of class {type(tensor).__name__}"
            if tensor.device != device:
                return f"the model is on {device} and {tensor.device}"
    return ""
