"""Decides which batches run as recorded layers (CUDA graphs), and has them recorded.

A shape of batch is recorded when it comes for the third time, if at the second the host needed most
of the time that the GPU took for the layers' forward pass, and if there is memory for it beside
everything else. Batches of other shapes run as ever, and so does whatever a recording cannot hold:
dropout draws, packed documents and masks, offloaded tensors, modules that are called as they are,
models with hooks on their layers. Results are the same bit by bit: it is the same kernels in the
same order.

Recorded tensors stand at fixed places, so one pass at a time: while one is under way (a second
forward pass before the first one's backward pass), others are not recorded and run as ever.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from colab_qlora.layers.graph_recorder import Recorder
from colab_qlora.layers.layer_graph import FixedTables, LayerGraph
from colab_qlora.models.kept_recordings import KeptRecordings
from colab_qlora.models.pass_parts import (
    Flight,
    LayerPass,
    Recorded,
    Room,
    is_of_one_batch,
    why_not_recorded,
)
from colab_qlora.models.pass_sights import HOST_SHARE, SAVING_HOST_SHARE, PassSights, Sight

# times that a shape is recorded, as long as none of its recordings has served so many passes
MOST_TIMES, PAID_OFF = 3, 10


class PassGraphs:
    """The recordings of one model.

    Args:
        say: takes one line for people.
        free_scratch: gives back the memory that passes share which run as ever.
        recorder: makes recordings; None: CUDA graphs, on a GPU only.
        always: record every shape when it comes for the third time (tests).

    Attributes:
        is_on: set it to False to have every batch run as ever.
        layers: the model's that have asked so far, by number.
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
        self.layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._can_run_anywhere = recorder is not None
        self._sights = PassSights()
        self._recorded = KeptRecordings(recorder)
        self._flight: weakref.ref[Flight] | None = None
        self._has_said = False
        self.new_batch()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(batch, length, width) of the batches that are recorded."""
        return [tuple(key[0]) for key, _ in self._recorded.items()]

    def new_batch(self) -> None:
        """The next layer that asks begins a forward pass."""
        self._sights.new_pass()
        self._now: Recorded | None = None
        self._token: Flight | None = None
        self._last_number = -1
        self._last_output: torch.Tensor | None = None
        self._is_decided = False

    def clear(self) -> None:
        """Let all recordings go, with their memory."""
        failures = [found.memory.failure for _, found in self._recorded.items()]
        self._recorded.drop_all()
        self._sights.clear()
        self.new_batch()
        if failure := next(filter(None, failures), None):
            self._give_up(failure)

    def idle_bytes(self) -> int:
        """GPU memory that only recordings can use."""
        return self._recorded.pool_bytes()[0]

    def let_go_of_held(self) -> None:
        """Recordings of decoded weights that are held no longer go once no pass is under way."""
        for _, found in self._recorded.items():
            graphs = found.layers.values()
            found.is_stale |= any(graph.standing.reads_what_is_let_go() for graph in graphs)

    def takes(self, hidden: torch.Tensor) -> bool:
        """True if layers with this input may ask for recordings."""
        return self.is_on and (hidden.is_cuda or self._can_run_anywhere)

    def graph_of(self, layer: LayerPass, room: Callable[[], Room]) -> LayerGraph | None:
        """The layer's recording, made now if it is time; None: the layer runs as ever."""
        if layer.number == 0 or not self._is_decided:
            # the model need not be on the current device
            with torch.cuda.device_of(layer.hidden):
                self._decide(layer, room)
        now = self._now
        # one after the other: a layer that somebody calls by itself is no part of the pass
        if now is None or layer.number <= self._last_number or layer.hidden.device != now.device:
            return None
        self._last_number = layer.number
        tables = now.memory.tables(layer.kind, layer.run.cos, layer.run.sin)
        graph = now.layers.get(layer.number)
        if graph is None:
            graph = None if now.is_finished else self._record(now, layer, tables)
        elif not self._still_fits(now, graph, layer, tables):
            # a batch with a mask is no reason to record the others anew
            now.is_stale = now.is_stale or not is_of_one_batch(layer.run.attention)
            graph = None
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
        if layer.is_last:
            self._sights.stop_clock(layer.hidden, scratch_bytes)

    def _decide(self, layer: LayerPass, room: Callable[[], Room]) -> None:
        """At a pass's first layer: run as ever, as ever with an eye on the clock, or recorded."""
        self.new_batch()
        self._is_decided = True
        self._recorded.new_pass()
        if self._flight is not None and self._flight() is not None:
            return
        self._tidy()
        if not self.is_on or why_not_recorded(layer.parts, layer.run.attention):
            return
        if layer.is_watched():
            return
        hidden = layer.hidden
        key = (hidden.shape, hidden.dtype, hidden.device, layer.plan)
        found = self._recorded.get(key)
        if found is not None:
            self._take_off(found)
            if found.uses == PAID_OFF:
                self._sights.forgive_times(key)
            return
        sight = self._sights.of(key)
        if sight.count >= 3 and self._is_worth_it(sight, room, saves_memory=layer.saves_memory):
            sight.times_recorded += 1
            try:
                self._take_off(self._recorded.new(key))
            except RuntimeError as error:
                self._give_up(error.with_traceback(None))
            return
        if self._recorded and hidden.is_cuda:
            self._make_way(room())
        self._sights.start_clock(hidden)

    def _tidy(self) -> None:
        """No pass is under way: let go what is stale, or was recorded by half."""
        for key, found in self._recorded.items():
            if found.memory.failure is not None:
                self._give_up(found.memory.failure)
                return
            # order counts, so half a recording is made again from the start
            if found.is_stale or not found.is_whole:
                self._recorded.drop(key)
            elif not found.is_finished:
                found.is_finished = True
                found.memory.all_recorded()
                self._tell(key[0])

    def _make_way(self, room: Room) -> None:
        """A pass that runs as ever may want the memory that recordings hold."""
        if room.pass_bytes is None:
            return
        idle, owned = self._recorded.pool_bytes()
        if room.left_bytes - idle < room.pass_bytes + owned:
            self._recorded.drop_all()
            torch.cuda.empty_cache()

    def _take_off(self, found: Recorded) -> None:
        self._recorded.use(found)
        self._now, self._token = found, Flight()
        self._flight = weakref.ref(self._token)

    def _is_worth_it(self, sight: Sight, room: Callable[[], Room], *, saves_memory: bool) -> bool:
        """Whether to record a shape now; what would be in the way of its memory is let go."""
        if sight.times_recorded >= MOST_TIMES or not self._recorded.has_place():
            return False
        if self.always or sight.is_refused:
            return self.always
        if not sight.waits_for_host(SAVING_HOST_SHARE if saves_memory else HOST_SHARE):
            return False
        # what passes that run as ever leave behind, recordings cannot use
        self.free_scratch()
        torch.cuda.empty_cache()
        sight.is_refused = not sight.fits(room(), *self._recorded.pool_bytes())
        return not sight.is_refused

    @staticmethod
    def _still_fits(
        now: Recorded, graph: LayerGraph, layer: LayerPass, tables: FixedTables
    ) -> bool:
        seen, choice = now.known[layer.number]
        return (
            seen is layer.parts
            and graph.tables is tables
            and graph.attends_as(layer.run.attention)
            and choice == layer.choice
            and graph.needs_dx == layer.hidden.requires_grad
            and graph.standing.holds()
        )

    def _record(self, now: Recorded, layer: LayerPass, tables: FixedTables) -> LayerGraph | None:
        if why_not_recorded(layer.parts, layer.run.attention):
            return None
        if any(group.is_held_stale() for group in layer.parts.groups()):
            # this pass decodes the weights that shall stay, and the next one is recorded
            now.is_stale = True
            return None
        memory, hidden = now.memory, layer.hidden
        run = replace(
            layer.run,
            attention=memory.attention(layer.run.attention),
            cos=tables.cos,
            sin=tables.sin,
            scratch=memory.scratch,
            calls={},
        )
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
            # what this pass has run so far needs its recordings yet: they go at the next one
            memory.failure = error.with_traceback(None)
            self._now = self._last_output = None
            return None
        now.layers[layer.number] = graph
        now.known[layer.number] = (layer.parts, layer.choice)
        return graph

    def _give_up(self, error: RuntimeError) -> None:
        """From now on everything runs as ever."""
        self.is_on, self._now = False, None
        self._recorded.drop_all()
        what = str(error).split("\n")[0].split(". ")[0]
        self.say(f"layers are not recorded as CUDA graphs: {what}")
        gc.collect()

    def _tell(self, shape: torch.Size) -> None:
        if not self._has_said and not self.always:
            self._has_said = True
            self.say(
                f"batches of {shape[0]} x {shape[1]} tokens wait for the host: the layers are "
                "recorded as CUDA graphs now, which it starts in one call each"
            )
