"""One decoder layer's forward and backward pass on batches of one shape, recorded.

    forward    input's place -> [recorded] -> output's place, and what the backward pass will read
    backward   gradient's place -> [recorded] -> place of the input's gradient, gradients in a row

A layer's output is the next one's input, where it lies; gradients go down through two buffers by
turns. So between layers nothing is copied. The parameters' gradients lie in a row in a buffer that
all layers share, and are copied out of it at once, together.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from colab_qlora.kernels.attention import AttentionShape
from colab_qlora.kernels.copy_rows import copy_rows
from colab_qlora.layers.decoder_layer import layer_backward, layer_forward
from colab_qlora.layers.gradient_rows import GradientLayout, GradientRows, Gradients
from colab_qlora.layers.graph_recorder import Recorder, Recording
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.saved import SavedTensors
from colab_qlora.layers.scratch import Scratch, Wide, new_rows, wide_of
from colab_qlora.layers.standing import BaseTensors, addresses


class ShapeMemory:
    """What the recorded layers share for batches of one shape.

    Args:
        recorder: makes the recordings of all shapes of a model.
        rows: where gradients of parameters lie, shared by all shapes.
    """

    def __init__(self, recorder: Recorder, rows: GradientRows) -> None:
        self.recorder, self.rows = recorder, rows
        self.scratch = _FixedScratch(self)
        # why a layer could not be recorded: nothing else of this shape is from then on
        self.failure: RuntimeError | None = None
        # of the layer that is being recorded: which of two buffers its gradient comes in
        self.side = 0
        self._wide: dict[tuple[int, int, int], Wide] = {}
        self._tables: dict[tuple[Any, ...], list[FixedTables]] = {}
        self._attentions: dict[tuple[Any, ...], AttentionShape] = {}

    def wide(self, side: int, like: torch.Tensor, spare: int) -> Wide:
        """One of the two buffers that gradients go down through, (tokens, width + spare)."""
        tokens, width = like.shape
        key = (side % 2, width, spare)
        found = self._wide.get(key)
        if found is None:
            found = wide_of(new_rows(like, (tokens, width + spare)), width)
            self._wide[key] = found
        return found

    def tables(self, kind: tuple[Any, ...], cos: torch.Tensor, sin: torch.Tensor) -> FixedTables:
        """Where layers of a kind read these rotation tables, which are copied there once a pass.

        A place belongs to its tables until the pass is over, as the backward pass reads it again:
        layers of one kind whose tables differ get a place for each, in the order of the layers.
        """
        places = self._tables.setdefault(kind, [])
        found = next((place for place in places if place.takes(cos, sin)), None)
        if found is None:
            found = FixedTables(torch.empty_like(cos), torch.empty_like(sin))
            places.append(found)
        found.fill(cos, sin)
        return found

    def attention(self, shape: AttentionShape) -> AttentionShape:
        """The same shape without what it keeps, one for all recorded layers that attend so.

        What is derived from a shape while something is recorded is computed when that runs: never,
        if the recording fails. Layers that run as ever must not find it.
        """
        key = _numbers_of(shape)
        if key not in self._attentions:
            self._attentions[key] = replace(shape)
        return self._attentions[key]

    def new_pass(self) -> None:
        """Tables belong to a batch."""
        for places in self._tables.values():
            for place in places:
                place.source = None

    def all_recorded(self) -> None:
        """Nobody asks for scratch memory any more; what is recorded later may use it."""
        if not self.recorder.runs_again:
            self.scratch.free()


class _FixedScratch(Scratch):
    """Scratch memory for recordings: what a layer hands down lies in one of two places."""

    def __init__(self, memory: ShapeMemory) -> None:
        super().__init__()
        # in a circle it would stay, with the recorder's pool, until Python looks for such
        self._memory = weakref.ref(memory)

    def offer(self, like: torch.Tensor, spare: int) -> torch.Tensor:
        memory = self._memory()
        assert memory is not None, "whoever records holds it"
        return memory.wide(memory.side + 1, like, spare).main

    def taken(self, tensor: torch.Tensor, spare: int) -> Wide | None:
        return None


@dataclass
class FixedTables:
    """Where recorded layers read the rotation tables; `source` is what was copied there."""

    cos: torch.Tensor
    sin: torch.Tensor
    source: tuple[torch.Tensor, torch.Tensor] | None = None

    def takes(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """True if nothing was copied there in this pass yet, or just these."""
        if self.source is None:
            return True
        # other views of their memory do as well: nobody else has it while the source is held
        held_cos, held_sin = self.source
        return held_cos.data_ptr() == cos.data_ptr() and held_sin.data_ptr() == sin.data_ptr()

    def fill(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if self.source is None:
            self.cos.copy_(cos)
            self.sin.copy_(sin)
            self.source = cos, sin


class LayerGraph:
    """A layer's recorded passes; the backward pass is recorded when it is first asked for.

    Args:
        hidden: the layer's input, (batch, length, width); recorded layers read it where it lies if
            `is_fixed`, else from a place of their own.
        parts, run, saved: as for `layer_forward`; `run` has the scratch memory, the tables and the
            attention's shape of `memory`.
        side: which of the two buffers the output's gradient comes in: by turns, layer by layer.
        is_first, is_last: the input's gradient, or the output, leaves the layers: it is copied.
        needs_dx: whether the input's gradient is wanted.

    Raises:
        RuntimeError: as `GraphRecorder.record`.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        parts: LayerParts,
        run: Pass,
        saved: SavedTensors,
        memory: ShapeMemory,
        tables: FixedTables,
        *,
        side: int,
        is_fixed: bool,
        is_first: bool,
        is_last: bool,
        needs_dx: bool,
    ) -> None:
        self.parts, self.tables, self.needs_dx = parts, tables, needs_dx
        self.trainable = parts.trainable()
        self.standing = Standing(parts)
        self._run, self._saved, self._memory = run, saved, memory
        self._side, self._is_first, self._is_last = side, is_first, is_last
        self._lead = run.lead
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        # with the tensor that owns the place
        self._input = flat if is_fixed else flat.clone(memory_format=torch.contiguous_format)
        self._forward = memory.recorder.record(
            lambda: (layer_forward(self._input, parts, run, saved),)
        )
        output = self._forward.results[0]
        assert output is not None
        self.output = output.view(*self._lead, output.shape[-1])
        self._backward: Recording | None = None
        self._gradient: Wide | None = None
        self._layout: GradientLayout | None = None

    def attends_as(self, attention: AttentionShape) -> bool:
        """True if the recorded attention is this one: the same numbers, no mask, no documents."""
        return _numbers_of(self._run.attention) == _numbers_of(attention)

    @property
    def is_whole(self) -> bool:
        """Both passes are recorded."""
        return self._backward is not None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output, (batch, length, width), good until the next batch's pass."""
        if hidden.data_ptr() != self._input.data_ptr():
            self._input.view(hidden.shape).copy_(hidden)
        self._forward()
        # a tensor of its own, which can have a graph; `data`, as a view would be one for autograd
        return self.output.clone() if self._is_last else self.output.data

    def backward(self, dh: torch.Tensor) -> tuple[torch.Tensor | None, Gradients]:
        """Gradients of the input, good until the next layer's pass but one, and of `trainable`."""
        place = self._placed(dh)
        is_recorded = self._backward is not None
        if not is_recorded and self._memory.failure is None:
            is_recorded = self._record_backward(place)
        if not is_recorded:
            return self._unrecorded(place)
        assert self._backward is not None and self._layout is not None
        self._backward()
        dx = self._backward.results[0]
        if dx is not None:
            dx = dx.view(dh.shape)
            dx = dx.clone() if self._is_first else dx.data
        return dx, self._layout.taken()

    def _placed(self, dh: torch.Tensor) -> Wide:
        """The output's gradient where the recorded pass reads it."""
        flat = dh.reshape(-1, dh.shape[-1])
        if self._gradient is None:
            spare = self.parts.down.spare_columns(dh.device)
            self._gradient = self._memory.wide(self._side, flat, spare)
        place = self._gradient
        if flat.data_ptr() != place.main.data_ptr() or flat.stride() != place.main.stride():
            copy_rows(flat if flat.stride(1) == 1 else flat.contiguous(), place.main)
        return place

    def _record_backward(self, place: Wide) -> bool:
        """False if it cannot be recorded."""
        layout = GradientLayout(self.trainable, self._memory.rows)

        def work() -> tuple[torch.Tensor | None]:
            dx, found = layer_backward(
                place, self.parts, self._run, self._saved, needs_dx=self.needs_dx
            )
            layout.write([found.of(p) for p in self.trainable])
            return (dx,)

        self._memory.side = self._side
        if self._is_last and place.main.is_cuda:
            # the loss has left blocks behind, which are not given back while something is recorded
            torch.cuda.empty_cache()
        try:
            self._backward = self._memory.recorder.record(work)
        except RuntimeError as error:
            # without its frames, which hold tensors
            self._memory.failure = error.with_traceback(None)
            return False
        self._layout = layout
        if not self._memory.recorder.runs_again:
            self._saved.release()
        return True

    def _unrecorded(self, place: Wide) -> tuple[torch.Tensor | None, Gradients]:
        """The backward pass of a forward pass that was recorded."""
        self._memory.side = self._side
        # what a recording that failed has put into the attention's shape was never computed
        run = replace(self._run, attention=replace(self._run.attention))
        dx, found = layer_backward(place, self.parts, run, self._saved, needs_dx=self.needs_dx)
        self._saved.release()
        if dx is not None:
            dx = dx.view(*self._lead, dx.shape[-1]).clone()
        return dx, [found.of(p) for p in self.trainable]


def _numbers_of(attention: AttentionShape) -> tuple[Any, ...]:
    a = attention
    lengths = (a.batch, a.seq_length, a.q_heads, a.kv_heads, a.head_dim)
    return (*lengths, a.scale, a.causal, a.window, a.cap, a.packed, a.mask is None)


class Standing:
    """Where everything stands that a layer's kernels read besides its input.

    Args:
        parts: of the layer, as the recorded pass reads them.
    """

    def __init__(self, parts: LayerParts) -> None:
        groups = parts.groups()
        linears = [part for group in groups for part in group.parts]
        self._base = BaseTensors(linears)
        self._others: list[torch.Tensor] = [norm.weight for norm in parts.norms()]
        self._others += [part.bias for part in linears if part.bias is not None]
        for group in groups:
            self._others += [x for _, _, block in group.blocks for x in (block.a, block.b)]
        self._addresses = addresses([*self._base.now(), *self._others])
        # a recorded pass only adds borders to decoded weights that are held. The buffers stay as
        # long as the recording, which knows their addresses alone
        self._held = [(group, group.held_now()) for group in groups]

    def holds(self) -> bool:
        """True if nothing has moved, and held weights are those of the layer as it is now."""
        return (
            self._addresses == addresses([*self._base.now(), *self._others])
            and not self.reads_what_is_let_go()
            and all(held is None or group.is_current(held) for group, held in self._held)
        )

    def reads_what_is_let_go(self) -> bool:
        """True if other decoded weights are held now than were recorded, or none."""
        return any(group.held_now() is not held for group, held in self._held)
