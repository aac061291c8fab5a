"""What the fused layers of one model share: scratch memory, the batch's shape, and settings."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.activations.runtime import ActivationRuntime, BatchKind
from colab_qlora.kernels.attention import AttentionShape
from colab_qlora.layers.layer_parts import LayerParts, MlpChunks
from colab_qlora.layers.saved import BRANCH, KEEP_ALL, KEEP_INPUT, SavedTensors
from colab_qlora.layers.scratch import Scratch
from colab_qlora.models.adapter_precision import TrainedWeights
from colab_qlora.models.architectures import (
    largest_linear_bytes,
    read_layer,
    watch_layer,
    why_stock_now,
)
from colab_qlora.models.decoder_families import known_family
from colab_qlora.models.documents import documents_of, is_stand_in
from colab_qlora.models.pass_graphs import PassGraphs

ATTRIBUTE = "colab_qlora_fused"
LAYER_NUMBER = "colab_qlora_layer_number"

# a GEMM over fewer tokens leaves a large GPU waiting for the weight to be decoded once more
LEAST_CHUNK_TOKENS = 2048

# what is known of a layer: in training and evaluation, with adapters and without
MOST_READINGS = 4
# kinds of layers in a model: a few; more shapes than that are of other batches
MOST_SHAPES = 8


@dataclass(frozen=True)
class LayerChoice:
    """What one layer does in one pass.

    Attributes:
        plan: names of the tensors that it stores, wherever.
        mlp_tokens, max_weight_bytes, holds_gate_up: as in `FusedState`.
        number: the layer's number if a plan of the whole step says where it stores them, else None.
        holds_weights: its decoded weights stay from pass to pass.
    """

    plan: frozenset[str]
    mlp_tokens: int | None
    max_weight_bytes: int | None
    holds_gate_up: bool
    number: int | None = None
    holds_weights: bool = False

    @property
    def is_short(self) -> bool:
        """True if gate and up are computed again."""
        return not self.plan >= {"gate", "up"}


@dataclass(eq=False)
class FusedState:
    """Shared by the swapped modules of one model.

    Attributes:
        runtime: plans every batch and says what each layer stores; what is set by hand below wins.
        plan: names of what every layer keeps; None leaves it to the runtime, and without one to the
            layer's gradient_checkpointing flag: all tensors without it, `KEEP_INPUT` with it.
        mlp_tokens: token chunk of the MLP half; None: the whole batch, and where gate and up are
            computed again, half of it but at least 2,048 in the backward pass, which is when memory
            is shortest.
        max_weight_bytes: decode at most this much of a group of weights at a time; None: whole
            groups, and where gate and up are computed again, the bytes of the largest linear.
        holds_gate_up: where gate and up are computed again, decode them once for that and for their
            gradient, at the price of a buffer of their own.
        logits_budget_bytes: for a chunk of logits; None: 256 MiB.
        last_shape: what the attention of the present batch is computed over.
        trained: the weights that the model learns, which are watched over at every batch.
        graphs: recordings of the layers' passes on batches that would wait for the host.
        layer_count: layers of the model that are fused.
        stock_passes: reasons why layers ran the model's own code, and how often; generation with a
            key-value cache does not count.
    """

    scratch: Scratch = field(default_factory=Scratch)
    runtime: ActivationRuntime | None = None
    plan: frozenset[str] | None = None
    mlp_tokens: int | None = None
    max_weight_bytes: int | None = None
    holds_gate_up: bool = False
    logits_budget_bytes: int | None = None
    stock_passes: dict[str, int] = field(default_factory=dict)
    last_shape: AttentionShape | None = None
    trained: TrainedWeights = field(default_factory=TrainedWeights)
    graphs: PassGraphs = field(default_factory=lambda: PassGraphs(_print_line))
    layer_count: int = 0
    _shapes: dict[Any, tuple[Any, AttentionShape]] = field(default_factory=dict)
    _tables: Any = (None, None)
    _readings: Any = field(default_factory=weakref.WeakKeyDictionary)

    def __post_init__(self) -> None:
        self.graphs.free_scratch = self.scratch.free

    def __getstate__(self) -> dict[str, Any]:
        """The settings; not what belongs to the present batch, or was read of the present model."""
        names = ("last_shape", "trained", "graphs", "_shapes", "_tables", "_readings")
        return {name: value for name, value in vars(self).items() if name not in names}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        vars(self).update(vars(FusedState()) | settings)
        self.__post_init__()

    def choice_for(
        self, layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None
    ) -> LayerChoice:
        """What a layer does with these hidden states, (batch, length, width)."""
        number = layer.__dict__.get(LAYER_NUMBER)
        runtime, learns = self.runtime, torch.is_grad_enabled()
        if runtime is None or self.plan is not None or number is None or not learns:
            plan = self.plan_for(layer)
            if known_family(layer).branch_norms is not None:
                plan |= {BRANCH}
            return LayerChoice(plan, self.mlp_tokens, self.max_weight_bytes, self.holds_gate_up)
        if runtime.current is None:
            if not self.graphs.is_on:
                runtime.layers_are_not_recorded()
            held = self.scratch.held
            planned = runtime.plan_of(_kind_of(layer, hidden, mask), held.bytes_held())
            if held.hold(planned.step.held_layers if planned.step else 0):
                self.graphs.let_go_of_held()
        assert runtime.current is not None
        assert runtime.current.step is not None
        step = runtime.current.step
        settings = step.batch.settings
        return LayerChoice(
            step.stored[number],
            settings.mlp_tokens,
            settings.max_weight_bytes,
            settings.holds_gate_up,
            number,
            number < step.held_layers,
        )

    def store_for(self, choice: LayerChoice) -> SavedTensors:
        """A new store for a layer's pass."""
        if choice.number is None or self.runtime is None:
            return SavedTensors(choice.plan)
        return self.runtime.store(choice.number)

    def chunk_of_logits_bytes(self) -> int | None:
        """Memory for a chunk of logits in the pass that runs; None: 256 MiB."""
        current = self.runtime.current if self.runtime else None
        if self.logits_budget_bytes is not None or current is None or current.step is None:
            return self.logits_budget_bytes
        return current.step.batch.settings.logits_budget_bytes

    def reading_of(self, layer: Any, choice: LayerChoice) -> tuple[str, LayerParts | None]:
        """Why the layer has to take the model's own code now, or its parts as they are now."""
        held = choice.number if choice.holds_weights else None
        settings = (choice.max_weight_bytes, choice.holds_gate_up, choice.is_short, held)
        known = self._readings.get(layer, [])
        for reading in known:
            if reading[0] == settings and reading[1].holds():
                return reading[2]
        # watched before it is read: what changes in between is noticed at the next pass
        watch, reason, parts = watch_layer(layer), why_stock_now(layer), None
        if not reason:
            parts = read_chosen(layer, choice, self.scratch)
        # of a part that is called as it is, which parameters learn is the part's own affair
        if parts is None or not any(group.has_modules for group in parts.groups()):
            # evaluation, and passes without adapters, alternate with training over the same weights
            older = [reading for reading in known if _same_weights(reading[2][1], parts)]
            new = (settings, watch, (reason, parts))
            self._readings[layer] = [new, *older[: MOST_READINGS - 1]]
        return reason, parts

    def mlp_chunks(self, parts: LayerParts, choice: LayerChoice, tokens: int) -> MlpChunks:
        """Token chunks of the MLP half, forward and backward."""
        if choice.mlp_tokens is not None:
            return MlpChunks(choice.mlp_tokens, choice.mlp_tokens)
        # random numbers are drawn chunk by chunk, so there the chunks have to be the same
        if not choice.is_short or parts.draws_in_mlp:
            return MlpChunks(None, None)
        return MlpChunks(None, max(LEAST_CHUNK_TOKENS, -(-tokens // 2)))

    def tables(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation tables as (positions, head_dim); all layers of a pass are given the same two."""
        of, found = self._tables
        if of is not given:
            cos, sin = (table.reshape(-1, table.shape[-1]) for table in given)
            found = (cos, sin)
            self._tables = (given, found)
        return found

    def plan_for(self, layer: Any) -> frozenset[str]:
        if self.plan is not None:
            return self.plan
        return KEEP_INPUT if getattr(layer, "gradient_checkpointing", False) else KEEP_ALL

    def attention_shape(
        self,
        lead: tuple[int, ...],
        heads: tuple[int, int, int],
        scale: float,
        mask: torch.Tensor | None,
        window: int | None,
        cap: float | None = None,
    ) -> AttentionShape:
        """The shape of this batch; one object for all layers of a kind, which share its masks."""
        key = (lead, heads, scale, window, cap, id(mask))
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            # with the mask, so that no other one gets its id
            found = mask, self._new_shape(lead, heads, scale, mask, window, cap)
            self._shapes[key] = found
        self.last_shape = found[1]
        return found[1]

    def forget(self) -> None:
        """Let go of all that was read of the model, so that a replaced weight is freed at once."""
        self.new_batch()
        self.graphs.clear()
        self.scratch.held.free()
        self._readings.clear()

    def free(self) -> None:
        """Give back all memory that is kept from one pass to the next."""
        self.graphs.clear()
        self.scratch.free()
        self.scratch.held.free()

    def new_batch(self) -> None:
        """Let the last batch's shape and masks go."""
        self.last_shape = None
        self._shapes.clear()
        self._tables = (None, None)
        self.graphs.new_batch()
        if self.runtime is not None:
            self.runtime.new_pass()

    def _new_shape(
        self,
        lead: tuple[int, ...],
        heads: tuple[int, int, int],
        scale: float,
        mask: torch.Tensor | None,
        window: int | None,
        cap: float | None,
    ) -> AttentionShape:
        batch, length = lead
        documents = documents_of(mask)
        if documents is not None:
            return AttentionShape(
                batch,
                length,
                *heads,
                scale,
                window=window,
                cap=cap,
                cu_seqlens=documents.cu_seqlens,
                documents=documents.bounds,
                max_seqlen=documents.longest,
            )
        if is_stand_in(mask):
            mask = None
        if mask is not None:
            mask = mask.expand(batch, mask.shape[1], length, length)
        return AttentionShape(batch, length, *heads, scale, mask=mask, window=window, cap=cap)


def read_chosen(layer: Any, choice: LayerChoice, scratch: Scratch) -> LayerParts:
    """A layer's parts as they are now, decoded as the choice says."""
    budget = choice.max_weight_bytes
    if budget is None and choice.is_short and not choice.holds_gate_up:
        budget = largest_linear_bytes(layer)
    return read_layer(
        layer,
        scratch,
        budget,
        holds_gate_up=choice.holds_gate_up,
        held_number=choice.number if choice.holds_weights else None,
    )


def fused_state(module: Any) -> FusedState | None:
    """The state of a swapped module, or None."""
    found = module.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, FusedState) else None


def _same_weights(known: LayerParts | None, now: LayerParts | None) -> bool:
    """True if both read the same base weights, so that keeping one keeps no memory of its own."""
    if known is None or now is None:
        return False
    pairs = zip(known.groups(), now.groups(), strict=True)
    return all(
        old.weight is new.weight
        for before, after in pairs
        for old, new in zip(before.parts, after.parts, strict=True)
    )


def _print_line(line: str) -> None:
    print(f"colab_qlora: {line}", flush=True)


def _kind_of(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None) -> BatchKind:
    rows, length = hidden.shape[0], hidden.shape[1]
    documents = documents_of(mask)
    mean = None
    if documents is not None:
        tokens = max(1, rows * length // max(len(documents.bounds), 1))
        mean = 1 << (tokens - 1).bit_length()
    learning = next((p for p in layer.parameters() if p.requires_grad), None)
    has_gradients = learning is not None and learning.grad is not None
    return BatchKind(rows, length, mean, has_gradients)
