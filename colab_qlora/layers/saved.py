"""What a fused layer can keep from its forward pass for its backward pass, by name.

The minimal exact set: from these tensors every gradient follows without running a GEMM again, and
each can be left out and rebuilt from the others. Bytes a token for Llama-3-8B in 16 bit:

    h0          8,192    the layer's input; the root of every rebuild
    q, k, v    12,288    after the rotation (before norm and rotation where a model norms q and k)
    o + lse     8,320    attention output and log-sum-exp
    h1          8,192    input of the MLP half
    gate, up   57,344    the two MLP projections
    xa_*          224    the rank-r products x sA^T of the four linear groups (r = 16)
    rstd1, 2        8    1 / rms of the two norms' inputs

94,568 bytes together. The norms' outputs, the MLP's activation and down_proj's output are never
kept: the first two are computed again on the way of another pass, and nothing needs the last.

A layer that norms what its halves add (Gemma 2 and 3) needs the inputs of these norms. So there h1
is the attention half's output before its norm, from which the input of the MLP half is one pass
away; and down_proj's output is kept beside the layer's input, always, as "down".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from colab_qlora.errors import UserError

ALL_NAMES = (
    "h0",
    "rstd1",
    "xa_qkv",
    "q",
    "k",
    "v",
    "o",
    "lse",
    "xa_o",
    "h1",
    "rstd2",
    "xa_gate_up",
    "gate",
    "up",
    "xa_down",
)
KEEP_ALL = frozenset(ALL_NAMES)
# beside the input of a layer that norms its branches; others never have it
BRANCH = "down"
# beside the input the products of down_proj: of an 8B, 32 bytes a token that it would take a pass
# over 28,672 bytes a token to have again
KEEP_INPUT = frozenset({"h0", "xa_down"})
_ROOT = frozenset({"h0"})


def checked_plan(names: Iterable[str]) -> frozenset[str]:
    """The names as a plan; the layer's input is always kept.

    Raises:
        UserError: a name that a layer does not have.
    """
    plan = frozenset(names)
    unknown = plan - KEEP_ALL - {BRANCH}
    if unknown:
        raise UserError(
            "unknown tensor in the plan of what a layer keeps",
            got=", ".join(sorted(unknown)),
            allowed=", ".join(ALL_NAMES),
        )
    return plan | _ROOT


class SavedTensors:
    """Keeps the planned tensors of one layer between its forward and its backward pass.

    Another store with the same methods may keep them elsewhere (on the host, say).
    """

    def __init__(self, plan: frozenset[str]) -> None:
        self.plan = plan
        self._tensors: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensor: torch.Tensor, *, is_scratch: bool = False) -> None:
        """Keep `tensor` if the plan names it; a view of scratch memory is copied."""
        if name in self.plan:
            self._tensors[name] = tensor.clone() if is_scratch else tensor

    def end_forward(self) -> None:
        """The layer's forward pass is through: nothing more is put."""

    def get(self, name: str) -> torch.Tensor | None:
        """The kept tensor, or None: rebuild it. Not before `end_forward`."""
        return self._tensors.get(name)

    def release(self) -> None:
        """Let all of them go; the memory is free although the graph may live on."""
        self._tensors.clear()


class RebuiltTensors:
    """What a store kept and what has been computed again since; it keeps all it is given.

    Args:
        saved: the store, which is only read from.
        names: what of it is looked at.
    """

    def __init__(self, saved: SavedTensors, names: Iterable[str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = saved.get(name)
            if tensor is not None:
                self.tensors[name] = tensor

    def put(self, name: str, tensor: torch.Tensor, *, is_scratch: bool = False) -> None:
        """Keep a tensor that was missing; a view of scratch memory is copied."""
        if name not in self.tensors:
            self.tensors[name] = tensor.clone() if is_scratch else tensor

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None: compute it again."""
        return self.tensors.get(name)

    def need(self, name: str) -> torch.Tensor:
        """A tensor that is there by now."""
        return self.tensors[name]
