"""E[x_j^2] of what enters each linear, from a few micro-batches of the user's own data.

    mean_square[j] = sum over tokens t of x_tj^2 / tokens

Scale search weights the error of a block with it. All tokens count, labelled or not, since the
model reads both; padding does not. Squares are made in float32 (exact for 16-bit activations; in
float64 for float64) and added up in float64.

An embedding picks rows: its input is one-hot, so E[x^2] of a row is the share of tokens that are
that row's (`token_share`), and within a row all columns weigh the same. Where head and embedding
are one tensor they are one item: columns weigh as the head's input, rows as the tokens' shares.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from colab_qlora.errors import UserError


@dataclass(frozen=True, eq=False)
class WeightItem:
    """A weight of the ladder and the modules that use it: two of them where a tensor is tied.

    Attributes:
        name: of the first module, as in `model.named_modules()` without PEFT's wrappers.
        modules: linears and embeddings whose weight is this tensor.
    """

    name: str
    modules: tuple[torch.nn.Module, ...]

    @property
    def weight(self) -> torch.Tensor:
        weight = self.modules[0].weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def is_table(self) -> bool:
        """True for an embedding or one tied to the head."""
        return any(isinstance(module, torch.nn.Embedding) for module in self.modules)


def weight_items(model: Any) -> list[WeightItem]:
    """All linears, the embedding and the head; adapters' own matrices are left out."""
    found: dict[int, tuple[str, list[torch.nn.Module]]] = {}
    for full_name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        parts = full_name.split(".")
        # copies that PEFT trains whole are adapters too
        if "modules_to_save" in parts or any(part.startswith("lora_") for part in parts):
            continue
        name = full_name.removeprefix("base_model.model.")
        name = name.removesuffix(".base_layer").removesuffix(".original_module")
        # named_modules names each module once, and tied modules share the parameter
        found.setdefault(id(module.weight), (name, []))[1].append(module)
    return [WeightItem(name, tuple(modules)) for name, modules in found.values()]


@dataclass
class ActivationStatistics:
    """What was collected, by the weight's name, on the CPU.

    Attributes:
        mean_square: E[x_j^2] of linears, float32, shape (in_features,).
        token_share: of embeddings, float32, shape (vocabulary,); sums to 1.
        tokens: how many were counted.
    """

    mean_square: dict[str, torch.Tensor] = field(default_factory=dict)
    token_share: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


class BatchWindow:
    """Knows whether a forward pass of the model runs, the how manieth, and its attention mask.

    A layer that activation checkpointing runs again in the backward pass is outside the window, so
    nothing is counted twice.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.passes = 0
        self.mask: torch.Tensor | None = None

    def hook(self, model: torch.nn.Module, hooks: ExitStack) -> None:
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        hooks.callback(before.remove)
        hooks.callback(model.register_forward_hook(self._after, always_call=True).remove)

    def _before(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            raise UserError(
                "the attention mask does not say which tokens are padding",
                got=f"shape {tuple(getattr(mask, 'shape', ()))}",
                allowed="1 for a token and 0 for padding, shape (rows, tokens), or none",
            )
        self.mask, self.is_open = None if mask is None else mask.bool(), True
        self.passes += 1

    def _after(self, *_: Any) -> None:
        self.is_open = False

    def tokens_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Drop padding: shape (rows, tokens, ...) becomes (kept tokens, ...).

        Inputs that are not laid out as the mask (an expert's tokens) are kept whole.
        """
        if self.mask is None or rows.shape[: self.mask.ndim] != self.mask.shape:
            # token ids have no last dimension of features
            return rows.flatten(0, -2) if rows.is_floating_point() else rows.flatten()
        return rows[self.mask.to(rows.device)]


class ActivationCollector:
    """Collects while it is entered, in whatever forward passes of the model run.

    Example:
        >>> with ActivationCollector(model) as collector:
        ...     for batch in batches:
        ...         model(**batch)
        >>> statistics = collector.statistics()
    """

    def __init__(self, model: Any) -> None:
        self._model, self._hooks, self._window = model, ExitStack(), BatchWindow()
        self._items = weight_items(model)
        self._sums: dict[tuple[str, bool], torch.Tensor] = {}
        self._tokens: dict[tuple[str, bool], int] = {}

    def __enter__(self) -> ActivationCollector:
        with ExitStack() as hooks:
            self._window.hook(self._model, hooks)
            for item in self._items:
                for module in item.modules:
                    hook = functools.partial(self._see, item.name)
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            # kept only if all of them could be registered
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def _see(self, name: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Count the inputs of a module; a forward pre-hook."""
        if not self._window.is_open:
            return
        is_table = isinstance(module, torch.nn.Embedding)
        tokens = self._window.tokens_of(args[0].detach())
        if isinstance(module, torch.nn.Embedding):
            sums = torch.bincount(tokens, minlength=module.num_embeddings).double()
        else:
            squares = tokens if tokens.dtype == torch.float64 else tokens.float()
            sums = squares.square().sum(0, dtype=torch.float64)
        key = name, is_table
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self._tokens[key] = self._tokens.get(key, 0) + len(tokens)

    def statistics(self) -> ActivationStatistics:
        """What was counted so far.

        Raises:
            UserError: no token was, or some activations are infinite or NaN.
        """
        if not any(self._tokens.values()):
            raise UserError(
                "the calibration data hold no token",
                got="no batch, or padding only",
                allowed="a few micro-batches of the training set",
            )
        found = ActivationStatistics()
        for (name, is_table), sums in self._sums.items():
            tokens = self._tokens[name, is_table]
            if not tokens:
                continue
            if not torch.isfinite(sums).all():
                raise UserError(
                    f"activations that enter {name} are infinite or NaN",
                    do="Load the model in bfloat16 or float32",
                )
            mean = (sums / tokens).float().cpu()
            (found.token_share if is_table else found.mean_square)[name] = mean
            found.tokens[name] = max(tokens, found.tokens.get(name, 0))
        return found


def collect_statistics(model: Any, batches: Iterable[Mapping[str, Any]]) -> ActivationStatistics:
    """E[x_j^2] from forward passes over `batches`; the model is left as it was.

    Args:
        model: a causal language model, with or without adapters.
        batches: keyword arguments of its forward: input_ids, attention_mask; labels are left out.

    Raises:
        UserError: no token, a mask of another shape, or broken activations.
    """
    with ActivationCollector(model) as collector, torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            model(**{"use_cache": False, **inputs})
    return collector.statistics()
