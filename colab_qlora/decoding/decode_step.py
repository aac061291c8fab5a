"""The pass of one token over fixed buffers: embedding to logits to the greedy token, as one graph.

    token (batch, 1) -> model -> logits (batch, vocabulary) -> token = argmax of each row

Places and positions are counted up by the pass itself, on the GPU. Each replay is the next token;
whoever draws tokens another way writes them into `token` before the next one.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from colab_qlora.decoding.fixed_cache import FixedCache
from colab_qlora.layers.graph_recorder import after_failed_capture, recording_stream
from colab_qlora.models.key_value_cache import cache_field

# bitsandbytes and Triton choose and load their kernels in the first pass, cuBLAS its workspace
WARM_UP_PASSES = 2


class DecodeStep:
    """Buffers of one batch size and cache length, and the graph of a token's pass over them.

    The model is given to each call and not held, so that it can be freed.

    Args:
        rows: answers that are decoded together.
        length: places of the cache: prompt, padding and answer, in tokens.
        device: the model's.

    Attributes:
        token: int64, (rows, 1): the newest tokens; input of the next pass, and its output.
        logits: float32, (rows, vocabulary): those that `token` was chosen from.
    """

    token: torch.Tensor
    logits: torch.Tensor

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.token = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._cache = FixedCache(length, self._slot)
        self._mask: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._filled = 0

    def prepare(self, causal: Any) -> None:
        """Make all buffers and capture the pass; on a CPU nothing is captured."""
        ids = torch.zeros((self.rows, 1), dtype=torch.int64, device=self.device)
        self.prefill(causal, ids, torch.ones_like(ids))
        if self.device.type == "cuda":
            self._capture(causal)

    def prefill(self, causal: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Begin new answers: run the prompts through the model, and choose their first tokens.

        Args:
            causal: the transformers model, in evaluation mode.
            ids: int64, (rows, longest prompt), padded on the left.
            mask: 1 for tokens, 0 for padding, (rows, longest prompt).
        """
        prompt = ids.shape[1]
        assert ids.shape[0] == self.rows and prompt < self.length
        self._cache.clear()
        self._cache.takes_prompt = True
        # as transformers' generate counts them
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self._logits(causal, ids, mask, positions)
        self._cache.takes_prompt = False
        if self._mask is None:
            self.logits = torch.zeros_like(logits, dtype=torch.float32)
            self._mask = torch.zeros(
                (self.rows, 1, 1, self.length), dtype=self._cache.dtype, device=self.device
            )
        self._mask.fill_(torch.finfo(self._mask.dtype).min)
        self._mask[:, 0, 0, :prompt].masked_fill_(mask.bool(), 0.0)
        self._positions.copy_(mask.sum(-1, keepdim=True))
        self._slot.fill_(prompt)
        self._filled = prompt
        self._choose(logits)

    def run(self, causal: Any) -> None:
        """One pass: `token` gets its place in the cache, and becomes the next greedy token."""
        assert self._filled < self.length, "the cache has no place left"
        self._filled += 1
        if self._graph is None:
            self._pass(causal)
        else:
            self._graph.replay()

    def _pass(self, causal: Any) -> None:
        assert self._mask is not None
        self._mask.index_fill_(3, self._slot, 0.0)
        # four dimensions: transformers takes the mask as it is, and looks into nothing
        self._choose(self._logits(causal, self.token, self._mask, self._positions))
        self._slot.add_(1)
        self._positions.add_(1)

    def _logits(
        self, causal: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits after the last token of each row, (rows, vocabulary)."""
        cache: dict[str, Any] = {cache_field(CausalLMOutputWithPast): self._cache}
        kind = self.device.type
        # autocast would keep casts of adapters until its region ends, and a graph their addresses
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            output = causal(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **cache,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _choose(self, logits: torch.Tensor) -> None:
        self.logits.copy_(logits)
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def _capture(self, causal: Any) -> None:
        """Record the pass on a stream of its own, after it has run there."""
        current, side = torch.cuda.current_stream(), recording_stream(self.device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        collects = gc.isenabled()
        # what is collected might wait for the GPU, which ends a capture
        gc.disable()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_PASSES):
                    self._pass(causal)
            current.wait_stream(side)
            # the user may compute on other threads
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                self._pass(causal)
        except BaseException:
            torch.cuda.set_stream(current)
            after_failed_capture(self.device, pool)
            raise
        finally:
            if collects:
                gc.enable()
        self._graph = graph
