"""What a fused layer tells `PassGraphs` of its part of a pass, and of the memory there is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from colab_qlora.activations.recording import recording_bytes
from colab_qlora.layers.layer_graph import LayerGraph
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.saved import SavedTensors
from colab_qlora.layers.scratch import Scratch
from colab_qlora.models.fused_state import LAYER_NUMBER, FusedState, LayerChoice, read_chosen
from colab_qlora.models.pass_parts import LayerPass, Room

# a private name of torch's: where it is gone, hooks may be anywhere, and nothing is recorded
_has_any_global_hook = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)


def graph_for(state: FusedState, layer: LayerPass | None) -> LayerGraph | None:
    """The recording that this pass runs, if there is one or it is made now."""
    return None if layer is None else state.graphs.graph_of(layer, lambda: room_of(state))


def layer_pass(
    state: FusedState,
    layer: Any,
    hidden: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    choice: LayerChoice,
) -> LayerPass | None:
    """A layer's part of a pass that may be recorded; None if this one may not."""
    if not state.graphs.takes(hidden) or not torch.is_grad_enabled():
        return None
    number = layer.__dict__.get(LAYER_NUMBER)
    if number is None:
        return None
    layers = state.graphs.layers
    layers[number] = layer
    learns = hidden.requires_grad or bool(parts.trainable())
    current = state.runtime.current if state.runtime else None
    step = None if current is None else current.step
    if not learns or _is_hooked(layer) or (step and any(step.offload)):
        return None
    # that of a whole step leaves open what layers do in between
    how: tuple[Any, ...] = (choice.mlp_tokens, choice.max_weight_bytes, choice.holds_gate_up)
    if step is not None:
        how = (*how, step.held_layers)
    return LayerPass(
        number=number,
        is_last=number == state.layer_count - 1,
        hidden=hidden,
        parts=parts,
        run=run,
        store=lambda: SavedTensors(choice.plan),
        choice=choice,
        plan=choice if step is None else (step.stored, *how),
        read_again=lambda scratch: _read_again(state, layer, choice, scratch),
        kind=(run.cos.shape, parts.window, parts.uses_rope),
        is_watched=lambda: _is_watched(layers.values()),
        saves_memory=step is None and choice.is_short,
    )


def _read_again(state: FusedState, layer: Any, choice: LayerChoice, scratch: Scratch) -> LayerParts:
    """The layer's parts on other scratch memory; weights that are held are the same."""
    scratch.held = state.scratch.held
    return read_chosen(layer, choice, scratch)


def room_of(state: FusedState) -> Room:
    """GPU memory that is left of the budget that the present plan was made for."""
    current = state.runtime.current if state.runtime else None
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    cap = int(torch.cuda.get_per_process_memory_fraction() * total)
    left = min(free + torch.cuda.memory_reserved(), cap) - allocated
    if current is None or current.step is None:
        return Room(left, None)
    left = min(left, current.machine.budget_bytes - allocated)
    batch = current.step.batch
    extra = recording_bytes(batch.shape, batch.rank, batch.tokens, batch.settings)
    return Room(left, max(0, current.step.peak_bytes - allocated), extra)


def _is_watched(layers: Iterable[Any]) -> bool:
    """Somebody sees what goes between layers, and might keep it: recorded it is good for one pass.

    Who has a hook on one layer sees its input and its output's gradient as well, which are those of
    the layers beside it.
    """
    return bool(_has_any_global_hook()) or any(_is_hooked(layer) for layer in layers)


def _is_hooked(layer: Any) -> bool:
    """Somebody sees the layer's input, output or a gradient of them, or replaces its forward."""
    own = layer.__dict__
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    hooks = own["_forward_hooks"]
    return "forward" in own or bool(hooks and not _only_idle_collectors(hooks.values()))


def _only_idle_collectors(hooks: Iterable[Any]) -> bool:
    """True if all hooks are transformers' own, which stay once hidden states were asked for."""
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    if collector is None or collector.get():
        return False
    return all(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in hooks)
