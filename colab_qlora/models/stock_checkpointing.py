"""Smart checkpointing of layers that run their own code: each is kept or recomputed as a whole.

transformers' decoder layers look at a flag of their own, in every pass, whether to run under
torch's checkpoint. So a plan is a flag for each layer. What a layer would keep is measured in the
first batch of each length: its first layer runs without checkpointing, and what autograd saves is
counted. Where not even all layers' inputs fit, these wait in host memory (torch's `save_on_cpu`,
which the step waits for).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from colab_qlora.activations.plan import BudgetTooSmall, Item, Setting
from colab_qlora.activations.planner import make_plan
from colab_qlora.activations.runtime import LESS_BUDGET, bucket_length
from colab_qlora.activations.this_machine import CPU_PROFILE, this_machine
from colab_qlora.models.fused_head import is_fused_head

ATTRIBUTE = "colab_qlora_stock_planner"
GIB = 2**30
# a layer's backward pass holds gradients of about what it has kept, beside what it has kept
_WORK = 2
# the loss without logits: a chunk of them in 16 bit, and its gradient's product
_LOSS_BYTES = 512 * 2**20
# the loss of transformers: logits in half precision, in float32, and their gradient
_BYTES_PER_LOGIT = 2 + 4 + 4


class StockPlanner:
    """Sets the checkpointing flag of each layer before a pass.

    Args:
        model: the transformers model.
        memory_budget_gib: most GPU memory that torch may hand out; None: what is free.
        say: takes one line for people.

    Attributes:
        is_at_floor: every layer is recomputed and its input is on the host.
        device: where the layers are.
    """

    def __init__(
        self, model: Any, memory_budget_gib: float | None, say: Callable[[str], None]
    ) -> None:
        self.layers = checkpointed_layers(model)
        self.device = next(self.layers[0].parameters()).device
        self.budget_gib, self.say = memory_budget_gib, say
        self.share, self.is_at_floor = 1.0, False
        self.kept: dict[tuple[int, int], int] = {}  # layers that keep, by batch and length
        self.offloads = False
        self._model, self._kind = model, (0, 0)
        self._counter: _SavedBytes | None = None
        trunk = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        first = self.layers[0]
        self._handles = [
            trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            first.register_forward_pre_hook(self._begin_counting, with_kwargs=True),
            first.register_forward_hook(self._end_counting, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks away and give the layers back what they had."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            checkpoint = layer._gradient_checkpointing_func
            if _is_offloading(checkpoint):
                layer._gradient_checkpointing_func = checkpoint.args[0]

    def lower_budget(self) -> str:
        """Plan the next pass for less; a clause that says so."""
        self.share *= LESS_BUDGET
        if self.kept.get(self._kind) == 0 and not self.offloads:
            self.offloads = True
            return "layers' inputs wait in host memory from now on"
        self.is_at_floor = self.offloads
        self.kept.clear()
        return f"planning again with {self.share:.0%} of the memory"

    def describe(self) -> str:
        """What the last pass did, in one line."""
        count = self.kept.get(self._kind, 0)
        inputs = ", their inputs on the host" if self.offloads else ""
        return f"{count} of {len(self.layers)} layers keep all, {len(self.layers) - count} are " + (
            f"computed again{inputs}"
        )

    def _before(self, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (trunk.training and torch.is_grad_enabled()):
            return
        found = args[0] if args else kwargs.get("input_ids")
        found = kwargs.get("inputs_embeds") if found is None else found
        if found is None:
            return
        self._kind = (found.shape[0], bucket_length(found.shape[1]))
        for layer in self.layers if self.offloads else ():
            # a trainer sets torch's checkpoint anew when it starts
            checkpoint = layer._gradient_checkpointing_func
            if not _is_offloading(checkpoint):
                layer._gradient_checkpointing_func = functools.partial(_offloading, checkpoint)
        # without a plan the first layer is kept, and looked at
        self._set(self.kept.get(self._kind))

    def _set(self, count: int | None) -> None:
        """Let the last `count` layers keep all; None: the first one alone, to be measured."""
        total = len(self.layers)
        for number, layer in enumerate(self.layers):
            keeps = number == 0 if count is None else number >= total - count
            layer.gradient_checkpointing = not keeps

    def _begin_counting(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training and torch.is_grad_enabled() and self._kind not in self.kept:
            self._counter = _SavedBytes(layer)
            self._counter.__enter__()

    def _end_counting(self, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        counter, self._counter = self._counter, None
        if counter is None:
            return
        counter.__exit__()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor):  # else the layer failed
            self._plan(counter.bytes, hidden)

    def _plan(self, kept_bytes: int, hidden: torch.Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        tokens = hidden.numel() // hidden.shape[-1]
        room = self._room_bytes() - _WORK * kept_bytes - self._loss_bytes(tokens)
        items = []
        for number in range(1, len(self.layers)):
            items.append(Item(number, "input", 0 if self.offloads else size, 0.0, False, True))
            items.append(Item(number, "rest", max(0, kept_bytes - size), 1.0))
        try:
            plan = make_plan(items, [[Setting("step", 0)]], max(0, room))
            count = sum("rest" in names for names in plan.keep)
        except BudgetTooSmall:
            count = 0
        is_first = not self.kept
        self.kept[self._kind] = count
        self._set_rest(count)
        if is_first:
            self.say(self.describe())

    def _set_rest(self, count: int) -> None:
        """The layers that are still to come in this pass; the first one has kept."""
        total = len(self.layers)
        for number, layer in enumerate(self.layers[1:], start=1):
            layer.gradient_checkpointing = number < total - count

    def _room_bytes(self) -> int:
        """What may be allocated beyond what is now."""
        machine = this_machine(self.device, CPU_PROFILE, 0, self.budget_gib)
        # of a CPU only what is free is known, of a GPU what torch has handed out
        return int(machine.budget_bytes * self.share) - machine.other_bytes

    def _loss_bytes(self, tokens: int) -> int:
        if is_fused_head(self._model):
            return _LOSS_BYTES
        vocab = self._model.config.get_text_config().vocab_size
        return tokens * int(vocab) * _BYTES_PER_LOGIT


class _SavedBytes:
    """Counts the memory that autograd saves, each piece once, without the layer's own weights."""

    def __init__(self, layer: Any) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self.pieces: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed)

    @property
    def bytes(self) -> int:
        return sum(self.pieces.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self) -> None:
        self._hooks.__exit__()


def checkpointed_layers(model: Any) -> list[Any]:
    """The layers of a model that can run under checkpointing, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _offloading(checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's checkpoint as it was set up, with what it saves (its input) in host memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(*args, **kwargs)


def _is_offloading(checkpoint: Any) -> bool:
    return isinstance(checkpoint, functools.partial) and checkpoint.func is _offloading


def stock_planner_of(model: Any) -> StockPlanner | None:
    """What plans the layers of a model that is not fused, if anything does."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, StockPlanner) else None


def attach_stock_planner(
    model: Any, memory_budget_gib: float | None, say: Callable[[str], None]
) -> StockPlanner | None:
    """Have a transformers model's layers planned; None if it has none that can be checkpointed."""
    detach_stock_planner(model)
    if not checkpointed_layers(model):
        return None
    planner = StockPlanner(model, memory_budget_gib, say)
    model.__dict__[ATTRIBUTE] = planner
    return planner


def detach_stock_planner(model: Any) -> None:
    """Undo `attach_stock_planner`."""
    planner = stock_planner_of(model)
    if planner is not None:
        planner.detach()
        del model.__dict__[ATTRIBUTE]
