"""Decides which batches run as recorded layers (CUDA graphs), and keeps the recordings.

A shape of batch is recorded when it comes for the third time, if at the second the host needed most
of the time that the GPU took for the layers' forward pass, and if there is memory for it beside
everything else. Batches of other shapes run as ever, and so does whatever a recording cannot hold:
dropout draws, packed documents and masks, offloaded tensors, modules that are called as they are,
layers with hooks. Results are the same bit by bit: it is the same kernels in the same order.

Recorded tensors stand at fixed places, so one pass at a time: while one is under way (a second
forward pass before the first one's backward pass), others are not recorded and run as ever.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from colab_qlora.layers.graph_recorder import GraphRecorder, Recorder
from colab_qlora.layers.layer_graph import (
    FixedTables,
    GradientRows,
    LayerGraph,
    ShapeMemory,
    addresses_of,
)
from colab_qlora.models.pass_parts import (
    Flight,
    Key,
    LayerPass,
    Recorded,
    Room,
    Sight,
    why_not_recorded,
)

# shapes that are kept, and seen shapes that are remembered
MOST_RECORDED, MOST_SEEN = 16, 512
# what a recording may need, against what was measured when the pass ran as ever: the backward
# pass's own tensors come on top of the kept ones
NEED_FACTOR = 1.3
MARGIN_BYTES = 256 * 2**20
# times that a shape's recording is made again after it had to go
MOST_TIMES = 3


class PassGraphs:
    """The recordings of one model.

    Args:
        say: takes one line for people.
        free_scratch: gives back the memory that passes share which run as ever.
        recorder: makes recordings; None: CUDA graphs, on a GPU only.
        always: record every shape when it comes for the third time (tests).

    Attributes:
        is_on: set it to False to have every batch run as ever.
    """

    def __init__(
        self,
        say: Callable[[str], None] = print,
        free_scratch: Callable[[], None] = lambda: None,
        recorder: Recorder | None = None,
        *,
        always: bool = False,
    ) -> None:
        self.is_on, self.say, self.always = True, say, always
        self.free_scratch = free_scratch
        self._recorder = recorder
        self._can_run_anywhere = recorder is not None
        self._rows = GradientRows()
        self._seen: dict[Key, Sight] = {}
        self._recorded: dict[Key, Recorded] = {}
        self._flight: weakref.ref[Flight] | None = None
        self._has_said = False
        self.new_batch()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(batch, length, width) of the batches that are recorded."""
        return [tuple(key[0]) for key in self._recorded]

    def new_batch(self) -> None:
        """The next layer that asks begins a forward pass."""
        # of the pass that tells: when it began, by the host and by the GPU, and what was allocated
        self._start: tuple[float, Any, int] | None = None
        self._now: Recorded | None = None
        self._sight: Sight | None = None
        self._token: Flight | None = None
        self._last_number = -1
        self._last_output: torch.Tensor | None = None
        self._is_decided = False

    def clear(self) -> None:
        """Let all recordings go, with their memory."""
        self._drop_all()
        self._seen.clear()
        self._rows = GradientRows()
        self.new_batch()

    def idle_bytes(self) -> int:
        """GPU memory that only recordings can use."""
        return self._pool_bytes()[0]

    def _pool_bytes(self) -> tuple[int, int]:
        """Of the recordings' memory what no tensor owns, and what one does."""
        return self._recorder.pool_bytes() if self._recorded and self._recorder else (0, 0)

    def takes(self, hidden: torch.Tensor) -> bool:
        """True if layers with this input may ask for recordings."""
        return self.is_on and (hidden.is_cuda or self._can_run_anywhere)

    def graph_of(self, layer: LayerPass, room: Callable[[], Room]) -> LayerGraph | None:
        """The layer's recording, made now if it is time; None: the layer runs as ever."""
        if layer.number == 0 or not self._is_decided:
            # the model need not be on the current device
            with torch.cuda.device_of(layer.hidden):
                self._decide(layer, room)
        # one after the other: a layer that somebody calls by itself is no part of the pass
        if self._now is None or layer.number <= self._last_number:
            return None
        self._last_number = layer.number
        tables = self._now.memory.tables(layer.kind, layer.run.cos, layer.run.sin)
        tables.fill(layer.run.cos, layer.run.sin)
        graph = self._now.layers.get(layer.number)
        if graph is None:
            graph = self._record(layer, tables) if not self._now.is_finished else None
        elif not self._still_fits(graph, layer, tables):
            self._now.is_stale, graph = True, None
        if graph is not None:
            self._last_output = graph.output
        if layer.is_last:
            self._now = None
        return graph

    def flight(self, *, is_last: bool) -> Flight | None:
        """What a pass has to hold until its backward pass is through."""
        token = self._token
        if is_last:
            self._token = None
        return token

    def layer_ran(self, layer: LayerPass, scratch_bytes: int) -> None:
        """A layer ran as ever: look at the clock if this pass is the one that tells."""
        sight, start = self._sight, self._start
        if sight is None or start is None or not layer.is_last:
            return
        began, event, before = start
        sight.host_s = time.perf_counter() - began
        sight.events = (event, torch.cuda.Event(enable_timing=True))
        sight.events[1].record()
        grown = torch.cuda.memory_allocated(layer.hidden.device) - before
        sight.need_bytes = int(NEED_FACTOR * max(0, grown)) + 2 * scratch_bytes

    def _decide(self, layer: LayerPass, room: Callable[[], Room]) -> None:
        """At a pass's first layer: run as ever, as ever with an eye on the clock, or recorded."""
        self.new_batch()
        self._is_decided = True
        if self._flight is not None and self._flight() is not None:
            return
        self._tidy()
        if not self.is_on or why_not_recorded(layer.parts, layer.run.attention):
            return
        hidden = layer.hidden
        key = (hidden.shape, hidden.dtype, hidden.device, layer.plan)
        found = self._recorded.get(key)
        if found is not None:
            self._take_off(found)
            return
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        sight = self._sight = self._seen.setdefault(key, Sight())
        sight.count += 1
        if sight.count >= 3 and self._is_worth_it(sight, hidden, room):
            sight.times_recorded += 1
            self._sight = None
            self._recorded[key] = Recorded(ShapeMemory(self._recorder_for(hidden), self._rows))
            self._take_off(self._recorded[key])
            return
        if self._recorded and hidden.is_cuda:
            self._make_way(room())
        if hidden.is_cuda and sight.events is None and sight.count >= 2:
            # a host that has run ahead would be held up by the GPU, and look slow
            torch.cuda.synchronize(hidden.device)
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            allocated = torch.cuda.memory_allocated(hidden.device)
            self._start = (time.perf_counter(), event, allocated)

    def _tidy(self) -> None:
        """No pass is under way: let go what is stale, or was recorded by half."""
        for key, found in list(self._recorded.items()):
            if found.memory.failure is not None:
                self._give_up(found.memory.failure)
                return
            # order counts, so half a recording is made again from the start
            if found.is_stale or not found.is_whole:
                del self._recorded[key]
            elif not found.is_finished:
                found.is_finished = True
                found.memory.all_recorded()
                self._tell(key[0])

    def _make_way(self, room: Room) -> None:
        """A pass that runs as ever may want the memory that recordings hold."""
        if room.pass_bytes is None:
            return
        idle, owned = self._pool_bytes()
        if room.left_bytes - idle < room.pass_bytes + owned:
            self._drop_all()
            torch.cuda.empty_cache()

    def _take_off(self, found: Recorded) -> None:
        found.memory.new_pass()
        self._now, self._token = found, Flight()
        self._flight = weakref.ref(self._token)

    def _is_worth_it(self, sight: Sight, hidden: torch.Tensor, room: Callable[[], Room]) -> bool:
        if sight.times_recorded >= MOST_TIMES or len(self._recorded) >= MOST_RECORDED:
            return False
        if self.always or sight.is_refused:
            return self.always
        if not sight.waits_for_host():
            return False
        # what passes that run as ever leave behind, recordings cannot use
        self.free_scratch()
        torch.cuda.empty_cache()
        now = room()
        idle, owned = self._pool_bytes()
        if now.pass_bytes is not None:
            # the recordings' idle memory is there for this one too
            needed = now.pass_bytes + owned + now.recording_bytes
        else:
            # nothing makes way for passes of other shapes then: room for both
            needed = 2 * sight.need_bytes + MARGIN_BYTES + idle
        sight.is_refused = now.left_bytes < needed
        return not sight.is_refused

    def _drop_all(self) -> None:
        if self._recorded and torch.cuda.is_available():
            # what is freed here was last used on another stream than the one it was made on
            torch.cuda.synchronize()
        self._recorded.clear()
        # with its pool of memory
        if not self._can_run_anywhere:
            self._recorder = None

    def _recorder_for(self, hidden: torch.Tensor) -> Recorder:
        if self._recorder is None:
            self._recorder = GraphRecorder(hidden.device)
        return self._recorder

    def _still_fits(self, graph: LayerGraph, layer: LayerPass, tables: FixedTables) -> bool:
        assert self._now is not None
        seen, choice = self._now.known[layer.number]
        return (
            seen is layer.parts
            and graph.tables is tables
            and graph.attends_as(layer.run.attention)
            and choice == layer.choice
            and graph.needs_dx == layer.hidden.requires_grad
            and graph.addresses == addresses_of(layer.parts)
        )

    def _record(self, layer: LayerPass, tables: FixedTables) -> LayerGraph | None:
        assert self._now is not None
        if why_not_recorded(layer.parts, layer.run.attention):
            return None
        memory, hidden = self._now.memory, layer.hidden
        run = replace(layer.run, cos=tables.cos, sin=tables.sin, scratch=memory.scratch, calls={})
        last = self._last_output
        is_fixed = last is not None and hidden.data_ptr() == last.data_ptr()
        try:
            with torch.cuda.device_of(hidden):
                graph = LayerGraph(
                    hidden,
                    layer.read_again(memory.scratch),
                    run,
                    layer.store(),
                    memory,
                    tables,
                    side=layer.number % 2,
                    is_fixed=is_fixed,
                    is_first=layer.number == 0,
                    is_last=layer.is_last,
                    needs_dx=hidden.requires_grad,
                )
        except RuntimeError as error:
            self._give_up(error)
            return None
        self._now.layers[layer.number] = graph
        self._now.known[layer.number] = (layer.parts, layer.choice)
        return graph

    def _give_up(self, error: RuntimeError) -> None:
        """From now on everything runs as ever."""
        self.is_on, self._now = False, None
        self._drop_all()
        what = str(error).split("\n")[0].split(". ")[0]
        self.say(f"layers are not recorded as CUDA graphs: {what}")
        # its frames hold tensors of the pass
        error.__traceback__ = None
        gc.collect()

    def _tell(self, shape: torch.Size) -> None:
        if not self._has_said and not self.always:
            self._has_said = True
            self.say(
                f"batches of {shape[0]} x {shape[1]} tokens wait for the host: the layers are "
                "recorded as CUDA graphs now, which it starts in one call each"
            )
