"""The planner's words: what it is given, the plan that it makes, and the error if there is none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from colab_qlora.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Item:
    """One tensor that one layer can save for its backward pass.

    Attributes:
        layer: number of the layer, from 0, in the order of the forward pass.
        name: the tensor's name, as in `layers/saved.py`.
        bytes: its size.
        recompute_s: seconds to rebuild it; of no meaning with `must_keep_or_offload`.
        can_offload: whether it may wait in host memory.
        must_keep_or_offload: it cannot be rebuilt.
    """

    layer: int
    name: str
    bytes: int
    recompute_s: float
    can_offload: bool = False
    must_keep_or_offload: bool = False


@dataclass(frozen=True)
class Setting:
    """One alternative of a choice that holds for the whole model, e.g. the loss's chunk size.

    Attributes:
        name: what the plan reports.
        fixed_bytes: GPU memory at the peak of a step.
        extra_s: seconds a step beyond the fastest alternative.
        grows_with_tokens: whether fewer tokens in a micro-batch make `fixed_bytes` smaller.
    """

    name: str
    fixed_bytes: int
    extra_s: float = 0.0
    grows_with_tokens: bool = False


@dataclass(frozen=True)
class CopyLimits:
    """What copies between GPU and host can do.

    Attributes:
        bytes_down_per_s: rate from the GPU to pinned host memory.
        bytes_up_per_s: rate back.
        forward_s: seconds of compute in one layer's forward pass, which hides the copies down.
        backward_s: the same for its backward pass without recomputation and the copies up.
        host_bytes_cap: most bytes of pinned host memory.
        share: part of a layer's compute time that copies may take.
        layers_in_flight: layers whose offloaded tensors are on the GPU at once: the one that uses
            them and the next one's, on their way.
    """

    bytes_down_per_s: float
    bytes_up_per_s: float
    forward_s: float
    backward_s: float
    host_bytes_cap: int
    share: float = 0.95
    layers_in_flight: int = 2

    def hidden_bytes(self) -> int:
        """Most bytes that one layer can copy down and up again without anybody waiting."""
        down, up = self.forward_s * self.bytes_down_per_s, self.backward_s * self.bytes_up_per_s
        return int(self.share * min(down, up))

    def exposed_s(self, layer_bytes: int) -> float:
        """Seconds that a layer waits for its copies when it offloads `layer_bytes`."""
        if layer_bytes <= self.hidden_bytes():
            return 0.0
        down = layer_bytes / self.bytes_down_per_s - self.share * self.forward_s
        up = layer_bytes / self.bytes_up_per_s - self.share * self.backward_s
        return max(0.0, down) + max(0.0, up)


@dataclass(frozen=True)
class Plan:
    """What each layer does with each of its tensors, and what that costs.

    Attributes:
        keep, offload, recompute: names for each layer, from the first layer to the last.
        settings: name of the chosen alternative of each choice, in the order of the choices.
        recompute_s, exposed_s, setting_s: predicted seconds a step.
        gpu_bytes: predicted peak, at most the budget.
        host_bytes: pinned host memory.
    """

    keep: tuple[frozenset[str], ...]
    offload: tuple[frozenset[str], ...]
    recompute: tuple[frozenset[str], ...]
    settings: tuple[str, ...]
    recompute_s: float
    exposed_s: float
    setting_s: float
    gpu_bytes: int
    host_bytes: int

    @property
    def seconds(self) -> float:
        """Predicted seconds a step beyond one that keeps everything with the fastest settings."""
        return self.recompute_s + self.exposed_s + self.setting_s

    def describe(self) -> str:
        """One line for each distinct choice of a layer, e.g.

        layers 0-27: keep h0 k v; recompute gate h1 o q up
        layers 28-31: keep gate h0 h1 k o q up v
        """
        layers: dict[tuple[frozenset[str], ...], list[int]] = defaultdict(list)
        choice: tuple[frozenset[str], ...]
        for layer, choice in enumerate(zip(self.keep, self.offload, self.recompute, strict=True)):
            layers[choice].append(layer)
        lines = []
        for choice, members in layers.items():
            actions = [
                f"{action} {' '.join(sorted(names))}"
                for action, names in zip(("keep", "offload", "recompute"), choice, strict=True)
                if names
            ]
            what = "; ".join(actions) or "nothing to save"
            lines.append(f"{'layer' if len(members) == 1 else 'layers'} {_ranges(members)}: {what}")
        return "\n".join(lines)


class BudgetTooSmall(UserError):
    """Nothing but what cannot be rebuilt is stored, and it still does not fit.

    Attributes:
        floor_bytes: smallest budget for which the planner has a plan; where a name's tensors differ
            in size between layers and the host is nearly full, a smaller one may exist.
        budget_bytes: the budget that was given.
        parts: bytes of each part of the floor, the largest first.
        host_bytes_needed: pinned host memory with which the budget would do; None if none would.
        tokens_share: part of the micro-batch's tokens with which the budget would do; None if no
            number of tokens would.
    """

    def __init__(
        self,
        floor_bytes: int,
        budget_bytes: int,
        parts: dict[str, int],
        host_bytes_needed: int | None = None,
        tokens_share: float | None = None,
    ) -> None:
        self.floor_bytes, self.budget_bytes, self.parts = floor_bytes, budget_bytes, parts
        self.host_bytes_needed, self.tokens_share = host_bytes_needed, tokens_share
        largest = ", ".join(f"{name} {_gib(size)}" for name, size in list(parts.items())[:3])
        ways = [f"free {_gib(floor_bytes - budget_bytes)} of GPU memory"]
        if tokens_share is not None and tokens_share >= 0.01:
            percent = math.floor(100 * tokens_share)
            ways.insert(0, f"train on at most {percent} % of the tokens in a micro-batch")
        if host_bytes_needed is not None:
            ways.insert(0, f"allow {_gib(host_bytes_needed)} of pinned host memory")
        do = ", or ".join(ways)
        super().__init__(
            "no plan fits in the GPU memory",
            got=f"a budget of {budget_bytes / _GIB:.2f} GiB",
            allowed=f"{_gib(floor_bytes)} or more" + (f" ({largest})" if largest else ""),
            do=do[0].upper() + do[1:],
        )

    def __reduce__(self):
        data = (self.floor_bytes, self.budget_bytes, self.parts)
        return BudgetTooSmall, (*data, self.host_bytes_needed, self.tokens_share)


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short: 0-2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _gib(size: int) -> str:
    """Rounded up, so that an advice to have that much is enough."""
    return f"{math.ceil(100 * size / _GIB) / 100:.2f} GiB"
