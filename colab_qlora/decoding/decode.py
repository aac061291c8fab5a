"""The loop over tokens: replay, choose, send the token to the host, look at those that arrived.

The host reads a token a few passes after it has launched the one that makes it, so that the GPU
always has the next pass queued. Passes beyond the end of all answers are those few at most, and
their tokens are dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from colab_qlora.decoding.decode_step import DecodeStep
from colab_qlora.decoding.eligibility import why_not_graphed
from colab_qlora.decoding.kept_steps import borrow_step, free_decoding, give_back
from colab_qlora.decoding.sampling import Sampling, sampling_of
from colab_qlora.models.fuse import causal_model

# passes that the host may be ahead of what it has read; a CPU has nothing to wait for
LAGS = {"cuda": 2, "cpu": 0}


def decode(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    streamer: Any = None,
    stops: Sequence[threading.Event] = (),
) -> torch.Tensor | None:
    """New tokens of the answers, as transformers' generate gives them.

    Args:
        model: a causal language model in evaluation mode, adapted or not.
        inputs: "input_ids" and "attention_mask" of the prompts, (prompts, longest), padded on the
            left, on the model's device.
        options: arguments of generate, "max_new_tokens" among them.
        streamer: of transformers; gets the prompt and each token, for one prompt.
        stops: once one of them is set, no further token is computed.

    Returns:
        int64, (prompts, longest answer), on the CPU, rows that ended before padded; None, with
        nothing done, if generate has to be called.
    """
    causal = causal_model(model)
    if model.training or why_not_graphed(model):
        # of what is kept nothing holds any more, on a model that was moved say
        free_decoding(model)
        return None
    # as PEFT's generate does, whose wrapper may have been given another one
    causal.generation_config = model.generation_config
    # what is kept has to be written to outside of inference mode too
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(inputs["input_ids"]):
        sampling = sampling_of(causal, inputs, options)
        if sampling is None:
            return None
        rows, prompt = inputs["input_ids"].shape
        step = borrow_step(causal, rows, prompt, sampling.max_new_tokens)
        if step is None:
            return None
        try:
            return _write(causal, step, inputs, sampling, streamer, stops)
        finally:
            give_back(causal)


def _write(
    causal: Any,
    step: DecodeStep,
    inputs: Mapping[str, torch.Tensor],
    sampling: Sampling,
    streamer: Any,
    stops: Sequence[threading.Event],
) -> torch.Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answers = _Answers(sampling, ids.shape[0], streamer)
    arrivals = _Arrivals(ids.shape[0], ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    step.prefill(causal, ids, mask)
    for number in range(sampling.max_new_tokens):
        if number:
            step.run(causal)
        if not sampling.is_plain:
            step.token.copy_(sampling.choose(ids, step.logits))
            ids = torch.cat([ids, step.token], dim=1)
        arrivals.send(step.token)
        answers.add(arrivals.take(keep=arrivals.lag))
        if answers.are_over or any(stop.is_set() for stop in stops):
            break
    answers.add(arrivals.take(keep=0))
    if streamer is not None:
        streamer.end()
    return answers.tokens()


class _Answers:
    """Tokens that have arrived; none is added to a row after its end, but padding."""

    def __init__(self, sampling: Sampling, rows: int, streamer: Any) -> None:
        self._sampling, self._streamer = sampling, streamer
        self._rows: list[list[int]] = [[] for _ in range(rows)]
        self._open = [True] * rows

    @property
    def are_over(self) -> bool:
        return not any(self._open)

    def add(self, arrived: Iterator[list[int]]) -> None:
        for tokens in arrived:
            if self.are_over:
                continue
            for row, token in enumerate(tokens):
                self._rows[row].append(token if self._open[row] else self._sampling.pad_token)
                self._open[row] &= token not in self._sampling.end_tokens
            if self._streamer is not None:
                self._streamer.put(torch.tensor([row[-1] for row in self._rows]))

    def tokens(self) -> torch.Tensor:
        return torch.tensor(self._rows, dtype=torch.int64)


class _Arrivals:
    """Tokens on their way to the host, in page-locked memory, each with an event at its end."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self.lag = LAGS[device.type]
        self._places = [
            torch.empty(rows, dtype=torch.int64, pin_memory=self._is_gpu)
            for _ in range(self.lag + 1)
        ]
        self._events = [torch.cuda.Event() for _ in self._places] if self._is_gpu else []
        self._sent = self._taken = 0

    def send(self, token: torch.Tensor) -> None:
        """Begin to copy (rows, 1) tokens; at most `lag` others may be on their way."""
        place = self._sent % len(self._places)
        self._places[place].copy_(token[:, 0], non_blocking=True)
        if self._is_gpu:
            self._events[place].record()
        self._sent += 1

    def take(self, keep: int) -> Iterator[list[int]]:
        """The oldest ones, until `keep` of them are left; waits for the GPU where it has to."""
        while self._sent - self._taken > keep:
            place = self._taken % len(self._places)
            if self._is_gpu:
                self._events[place].synchronize()
            self._taken += 1
            yield self._places[place].tolist()
