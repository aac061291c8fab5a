"""AdamW over one flat tensor: its two moments, in 32 or in 8 bits, and the update in one launch.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Bytes moved a number, parameters and gradients in float32: 28 with moments in 32 bits (read p, g, m,
v; write p, m, v), 16 in 8 bits.

In 8 bits the moments are stored as bitsandbytes stores them: each block of 256 numbers is divided
by its largest magnitude (absmax), and each quotient becomes a code of 8 bits, the nearest of 256
levels (qmap) that are dense near zero (Dettmers et al. 2021, arXiv 2110.02861). The update is
bitsandbytes' own kernel, and the names below are those of its checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.training.flat_parameters import ALIGNMENT, FlatParameters

# where torch has its fused AdamW for every float type; elsewhere the plain form is computed
FUSED_DEVICES = ("cpu", "cuda")
# bitsandbytes wraps its tensors in this key to hide them from FSDP
_BITSANDBYTES_KEY = "__bnb_optimizer_quant_state__"
_SAME_RUN = "Resume with the model, `optim` and bitsandbytes that the checkpoint was written with"


class Moments32:
    """The two moments in the parameters' dtype, as torch.optim.AdamW has them.

    Attributes:
        exp_avg, exp_avg_sq: (numbers,) of the flat tensor's layout.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat
        self.exp_avg = torch.zeros_like(flat.values)
        self.exp_avg_sq = torch.zeros_like(flat.values)

    def views(self, index: int) -> dict[str, Tensor]:
        """One parameter's moments, in its shape."""
        slot = self._flat.slots[index]
        return {
            name: flat.as_strided(slot.shape, slot.stride, slot.start)
            for name, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
        }

    def entry(self, index: int) -> dict[str, Tensor]:
        """What `optimizer.state` shows of one parameter, beside the step."""
        return self.views(index)

    def update_(self, start: int, end: int, step: int, group: Mapping[str, Any]) -> None:
        """Move the numbers from `start` to `end` by their gradient; `step` counts from 1."""
        assert self._flat.gradient is not None
        tensors = (self._flat.values, self._flat.gradient, self.exp_avg, self.exp_avg_sq)
        values, gradient, exp_avg, exp_avg_sq = (tensor[start:end] for tensor in tensors)
        if values.device.type not in FUSED_DEVICES:
            _plain_adamw_(values, gradient, exp_avg, exp_avg_sq, step, group)
            return
        torch._fused_adamw_(
            [values],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            # made on the device, since a copy from the host would wait for it
            [torch.full((), float(step), dtype=torch.float32, device=values.device)],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class Moments8:
    """The two moments in 8 bits, as bitsandbytes' AdamW8bit has them: 2 bytes for each number.

    Attributes:
        state1, state2: (numbers,) uint8, codes of the first and the second moment.
        absmax1, absmax2: (numbers / 256,) float32, the scale of each block.
        qmap1, qmap2: (256,) float32, the levels; all parameters share them.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self._flat = flat
        values = flat.values
        self.qmap1, self.qmap2, zero1, zero2 = _levels(values.device)
        # codes of zero, so that the gaps are zero too once a checkpoint sets the scales
        self.state1 = torch.full_like(values, zero1, dtype=torch.uint8)
        self.state2 = torch.full_like(values, zero2, dtype=torch.uint8)
        blocks = values.numel() // ALIGNMENT
        self.absmax1 = torch.zeros(blocks, dtype=torch.float32, device=values.device)
        self.absmax2 = torch.zeros_like(self.absmax1)
        functional = import_bitsandbytes().functional
        self._update_ = functional.optimizer_update_8bit_blockwise

    def views(self, index: int) -> dict[str, Tensor]:
        """One parameter's codes in its shape, and the scales of its blocks."""
        slot = self._flat.slots[index]
        blocks = slice(slot.start // ALIGNMENT, slot.end // ALIGNMENT)
        return {
            "state1": self.state1.as_strided(slot.shape, slot.stride, slot.start),
            "state2": self.state2.as_strided(slot.shape, slot.stride, slot.start),
            "absmax1": self.absmax1[blocks],
            "absmax2": self.absmax2[blocks],
        }

    def entry(self, index: int) -> dict[str, Tensor]:
        """What `optimizer.state` shows of one parameter, beside the step."""
        return {**self.views(index), "qmap1": self.qmap1, "qmap2": self.qmap2}

    def update_(self, start: int, end: int, step: int, group: Mapping[str, Any]) -> None:
        """Move the numbers from `start` to `end` by their gradient; `step` counts from 1."""
        assert self._flat.gradient is not None
        blocks = slice(start // ALIGNMENT, end // ALIGNMENT)
        self._update_(
            "adam",
            self._flat.gradient[start:end],
            self._flat.values[start:end],
            self.state1[start:end],
            self.state2[start:end],
            group["betas"][0],
            group["betas"][1],
            0.0,
            0.0,
            group["eps"],
            step,
            float(group["lr"]),
            self.qmap1,
            self.qmap2,
            self.absmax1[blocks],
            self.absmax2[blocks],
            weight_decay=group["weight_decay"],
            gnorm_scale=1.0,
            skip_zeros=False,
        )


Moments = Moments32 | Moments8


def read_entry(saved: Mapping[str, Any], expected: Mapping[str, Tensor], name: str) -> dict:
    """One parameter's state out of a checkpoint of torch's, bitsandbytes' or this package's AdamW.

    Args:
        saved: the entry of the checkpoint.
        expected: what `entry` gives for this parameter.
        name: how messages call the parameter.

    Returns:
        "step", and a tensor under each name of `expected`.

    Raises:
        UserError: the moments are of another kind or shape.
    """
    entry = {**saved, **saved.get(_BITSANDBYTES_KEY, {})}
    entry.pop(_BITSANDBYTES_KEY, None)
    for ours, theirs in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
        if theirs in entry and entry[theirs].is_floating_point():  # a small tensor, kept in 32 bits
            entry[ours] = entry.pop(theirs)
    wanted = {"step", *expected}
    if not wanted <= entry.keys():
        raise UserError(
            f"the checkpoint's optimiser state of {name} is of another kind",
            got=", ".join(sorted(entry)),
            allowed=", ".join(sorted(wanted)),
            do=_SAME_RUN,
        )
    for key, tensor in expected.items():
        if entry[key].shape != tensor.shape:
            raise UserError(
                f"{key} of {name} in the checkpoint has another shape",
                got=tuple(entry[key].shape),
                allowed=tuple(tensor.shape),
                do=_SAME_RUN,
            )
        if key in ("qmap1", "qmap2") and not torch.equal(entry[key].to(tensor.device), tensor):
            raise UserError(f"{key} of {name} in the checkpoint has other levels", do=_SAME_RUN)
    return {"step": int(entry["step"]), **{key: entry[key] for key in expected}}


@functools.lru_cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """The levels of the first and the second moment, and the codes of zero among them."""
    functional = import_bitsandbytes().functional
    maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
    zero1, zero2 = (int(levels.abs().argmin()) for levels in maps)
    return maps[0].to(device), maps[1].to(device), zero1, zero2


def _plain_adamw_(
    values: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    group: Mapping[str, Any],
) -> None:
    rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    denominator = torch.empty_like(values)  # first, so that a lack of memory changes nothing
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    torch.sqrt(exp_avg_sq, out=denominator)
    denominator.div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    values.mul_(1 - rate * group["weight_decay"])
    values.addcdiv_(exp_avg, denominator, value=-rate / (1 - beta1**step))
