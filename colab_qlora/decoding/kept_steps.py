"""One decode step a model, kept between its answers until something about it has changed.

A step costs the memory of its cache and of a pass, so a model has one at a time, and none while it
trains. Its cache is as long as the answers need, rounded up, so that the next ones may fit too.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from colab_qlora.decoding.decode_step import DecodeStep
from colab_qlora.decoding.eligibility import fingerprint, remember_failure
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.host_embedding import compute_device

# the cache's length is a multiple of it, in tokens
BUCKET = 256
# a cache this many times too long is not worth its reading
MOST_TOO_LONG = 4
# answers that are shorter take less time without a capture, which costs three passes by the host
LEAST_NEW_TOKENS = 8

_KEPT: WeakKeyDictionary[Any, tuple[list[Any], DecodeStep]] = WeakKeyDictionary()
_BUSY: WeakSet[Any] = WeakSet()
_LOCK = threading.Lock()
# one capture at a time in the process: random numbers and garbage collection are everybody's
_CAPTURE = threading.Lock()


def borrow_step(causal: Any, rows: int, prompt: int, new_tokens: int) -> DecodeStep | None:
    """A step for these answers, until `give_back`; None if transformers' generate has to do it.

    Args:
        causal: the transformers model, which `why_not_graphed` has nothing against.
        rows: prompts.
        prompt, new_tokens: of the longest prompt and of the longest answer, in tokens.
    """
    with _LOCK:
        # another thread's answer is under way, in the only cache
        if causal in _BUSY:
            return None
        _BUSY.add(causal)
    step = None
    try:
        step = _step_for(causal, rows, prompt, new_tokens)
    finally:
        if step is None:
            give_back(causal)
    return step


def give_back(causal: Any) -> None:
    """End `borrow_step`."""
    with _LOCK:
        _BUSY.discard(causal)


def free_decoding(model: Any) -> None:
    """Free the memory that decoding keeps for a model; the next answer captures anew."""
    _KEPT.pop(causal_model(model), None)


def _step_for(causal: Any, rows: int, prompt: int, new_tokens: int) -> DecodeStep | None:
    needed = prompt + new_tokens
    made_of = fingerprint(causal)
    step = _kept(causal, made_of)
    most = MOST_TOO_LONG * _bucket(needed)
    if step is not None and step.rows == rows and needed <= step.length <= most:
        return step
    device = compute_device(causal)
    if device.type == "cuda" and new_tokens < LEAST_NEW_TOKENS:
        return None
    # the old one's memory first
    step = None
    free_decoding(causal)
    try:
        made = DecodeStep(rows, _bucket(needed), device)
        with _CAPTURE:
            made.prepare(causal)
    except torch.OutOfMemoryError:
        # these answers' cache is too long; others' may not be, and generate's grows as it has to
        torch.cuda.empty_cache()
        return None
    # whatever it was: generate needs no graph, and says itself what is wrong with the model
    except Exception as error:
        reason = f"its pass could not be captured ({_first_line(error)})"
        remember_failure(causal, reason)
        print(f"colab_qlora: transformers' generate decodes this model: {reason}", flush=True)
        return None
    _KEPT[causal] = made_of, made
    return made


def _kept(causal: Any, made_of: list[Any]) -> DecodeStep | None:
    """The model's step, if the model is still what it was captured of."""
    found = _KEPT.get(causal)
    return found[1] if found is not None and found[0] == made_of else None


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


def _first_line(error: BaseException) -> str:
    """Of what began it: the end of a capture that had failed before fails too."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
