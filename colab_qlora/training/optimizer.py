"""AdamW that updates all parameters in one launch, in 32 or in 8 bits.

A QLoRA model of 32 layers trains 448 matrices. bitsandbytes' AdamW8bit launches a kernel for each
and waits for it: 12 to 42 ms a step in which the GPU mostly idles. `FlatAdamW` keeps the parameters
of a group as views of one tensor (`FlatParameters`), so that the update, clipping and zeroing are
a handful of launches, however many parameters there are. The arithmetic is that of
torch.optim.AdamW, or of bitsandbytes.optim.AdamW8bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colab_qlora.errors import UserError
from colab_qlora.training.adamw_moments import Moments, Moments8, Moments32, read_entry
from colab_qlora.training.flat_parameters import ALIGNMENT, FlatParameters

# as bitsandbytes: moments of a tensor with fewer numbers stay in 32 bits, where they cost little
LEAST_8BIT_NUMBERS = 4096
# bitsandbytes counts the numbers of a tensor in 32 bits
MOST_NUMBERS = 2**31 - 1
_8BIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Part:
    """The parameters of one group that share a tensor, and their moments from the first step on."""

    flat: FlatParameters
    bits: int
    moments: Moments | None = None

    def ready_moments(self) -> Moments:
        """The moments, made of zeros if there are none yet."""
        if self.moments is None:
            self.moments = Moments8(self.flat) if self.bits == 8 else Moments32(self.flat)
        return self.moments


class FlatAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay over a few flat tensors.

    On construction each parameter's `.data` becomes a view of a flat tensor; its value, shape and
    name stay. If something re-points `.data` later (`model.to`, say), the next step notices and
    moves the values, and the moments, into new flat tensors. Parameters that share memory with one
    another do not any more.

    Gradients may be set in any of the usual ways. After `model.zero_grad()` or
    `zero_grad(set_to_none=True)` autograd makes tensors of its own, which a step (or clipping)
    copies into one; with `attach_gradients()` it adds in place, with nothing to copy. A parameter
    whose `.grad` is None does not move in that step, and neither do its moments.

    Args:
        params: parameters of floating point, or groups of them as any torch optimiser takes.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        bits: 32: moments in the parameters' dtype. 8: moments as bitsandbytes' AdamW8bit has them;
            tensors of fewer than 4096 numbers and float64 ones are treated as with 32, and so are
            groups that say "bits": 32.

    Attributes:
        state: parameter -> "step" and views of its moments, "exp_avg" and "exp_avg_sq", or in 8
            bits "state1", "state2", "absmax1", "absmax2", "qmap1" and "qmap2".

    Raises:
        UserError: a hyperparameter out of range, or a parameter that is not floating point.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
    ) -> None:
        if bits not in (8, 32):
            raise UserError("there is no such optimiser state", got=f"{bits} bits", allowed="8, 32")
        self.bits = bits
        self._parts: list[list[_Part]] = []  # one list for each group
        self._addresses: list[list[int]] = []
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters become views of flat tensors of their own.

        Raises:
            UserError: as on construction.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            self._parts.append([])
            self._addresses.append([])
            self._adopt(len(self.param_groups) - 1)
        except Exception:
            del self.param_groups[-1]
            del self._parts[len(self.param_groups) :], self._addresses[len(self.param_groups) :]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        An error while memory is made ready (out of memory) leaves parameters and moments as they
        were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        work = []
        for group, parts in zip(self.param_groups, self._parts, strict=True):
            for part in parts:
                has_gradient = part.flat.gather(points_grads=False)
                if any(has_gradient):
                    work.append((group, part, self._open_state(part, has_gradient)))
        for group, part, states in work:
            self._update_(group, part, states)
            part.flat.release(keep_attached=True)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`.

        As torch.nn.utils.clip_grad_norm_ with `foreach`, in five launches for each flat tensor, and
        without waiting for the device.

        Returns:
            The norm before, a tensor without dimensions.
        """
        if not max_norm > 0:
            raise UserError("max_norm is not positive", got=max_norm, allowed="more than 0")
        self._settle()
        gradients = [flat.gradient for flat in self._flats() if any(flat.gather())]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return torch.zeros(())
        norms = [_norm(gradient) for gradient in present]
        total = norms[0]
        if len(norms) > 1:
            total = torch.linalg.vector_norm(torch.stack([norm.to(total) for norm in norms]))
        # max(1, (total + 1e-6) / max_norm); the 1e-6 is torch's
        divisor = torch.rsub(total, 1e-6 / max_norm, alpha=-1 / max_norm).clamp_(min=1)
        for gradient in present:
            gradient.div_(divisor.to(gradient.device))
        return total

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or (`set_to_none=False`) zero those that there are, where they are.

        Gradients that are attached stay so only with `set_to_none=False`.
        """
        if set_to_none:
            super().zero_grad()
            for flat in self._flats():
                flat.release()
            return
        present = [p.grad for group in self.param_groups for p in group["params"]]
        if gradients := [gradient for gradient in present if gradient is not None]:
            torch._foreach_zero_(gradients)

    @torch.no_grad()
    def attach_gradients(self) -> None:
        """Point every `.grad` to its place in a flat tensor of zeros; autograd adds to it there.

        Call it before the first backward pass of a step. It saves the copy into one tensor, and
        costs an addition for each parameter, which autograd omits where `.grad` is None. All
        parameters then have a gradient, if only a zero, so weight decay and momentum move those
        that took no part too.
        """
        self._settle()
        for flat in self._flats():
            flat.attach()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of this class, of torch.optim.AdamW, or of bitsandbytes' AdamW.

        Parameters that the state has no entry for begin anew.

        Raises:
            UserError: moments of another kind or shape, or a variant of AdamW that is not here;
                the optimiser is as before then.
        """
        self._settle()
        saved_groups = state_dict["param_groups"]
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in saved_groups):
                raise UserError(f"the checkpoint is of AdamW with {name}", do="Use `optim` as then")
        keys = (key for group in saved_groups for key in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        key_of = dict(zip(parameters, keys, strict=False))  # torch checks the lengths below
        saved_of = {p: state_dict["state"].get(key) for p, key in key_of.items()}
        read = [(part, self._read(part, saved_of)) for parts in self._parts for part in parts]
        super().load_state_dict({**state_dict, "state": {}})
        for part, entries in read:
            self._write(part, entries)

    def _flats(self) -> Iterator[FlatParameters]:
        return (part.flat for parts in self._parts for part in parts)

    def _settle(self) -> None:
        """Re-adopt the groups in which a parameter's memory is not the place given to it."""
        for index, group in enumerate(self.param_groups):
            if [p.data_ptr() for p in group["params"]] != self._addresses[index]:
                self._adopt(index)

    @torch.no_grad()
    def _adopt(self, index: int) -> None:
        """Lay a group's parameters out anew and take their moments along."""
        parameters = self.param_groups[index]["params"]
        most_bits = max(self.bits, self.param_groups[index].get("bits", 0))
        parts = [_Part(FlatParameters(run), bits) for run, bits in _runs(parameters, most_bits)]
        for part in parts:
            self._write(part, self._read(part, self.state))
        # last, so that after an error on the way the next step begins anew
        self._parts[index] = parts
        self._addresses[index] = [p.data_ptr() for p in parameters]

    def _read(self, part: _Part, saved: Mapping[Any, Any]) -> dict[int, dict[str, Any]]:
        """The saved states of a part's parameters by their place in it, checked."""
        found = {i: saved.get(p) for i, p in enumerate(part.flat.parameters)}
        entries = {}
        for index, entry in found.items():
            if entry:
                shape = tuple(part.flat.slots[index].shape)
                expected = part.ready_moments().entry(index)
                entries[index] = read_entry(entry, expected, f"a parameter of shape {shape}")
        return entries

    def _write(self, part: _Part, entries: Mapping[int, Mapping[str, Any]]) -> None:
        for index, entry in entries.items():
            moments = part.ready_moments()
            for name, view in moments.views(index).items():
                view.copy_(entry[name])
            state = {"step": entry["step"], **moments.entry(index)}
            self.state[part.flat.parameters[index]] = state

    def _open_state(self, part: _Part, has_gradient: Sequence[bool]) -> list[dict[str, Any] | None]:
        """The states of the parameters that are about to move (zero moments for those that begin)
        and None for the others.
        """
        is_new = part.moments is None
        moments = part.ready_moments()
        states: list[dict[str, Any] | None] = []
        for index, parameter in enumerate(part.flat.parameters):
            if not has_gradient[index]:
                states.append(None)
                continue
            # hashing a parameter is slow, and there are hundreds: looked up once a step
            state = self.state.get(parameter)
            if not state:
                for view in () if is_new else moments.views(index).values():
                    view.zero_()
                state = self.state[parameter] = {"step": 0, **moments.entry(index)}
            states.append(state)
        return states

    def _update_(
        self, group: dict[str, Any], part: _Part, states: Sequence[dict[str, Any] | None]
    ) -> None:
        steps = [None if state is None else state["step"] + 1 for state in states]
        for start, end, step in part.flat.spans(steps):
            part.ready_moments().update_(start, end, step, group)
        moved = []
        for parameter, state in zip(part.flat.parameters, states, strict=True):
            if state is not None:
                state["step"] += 1
                moved.append(parameter)
        # autograd sees writes to the flat tensor only if it is told of them
        torch.autograd.graph.increment_version(moved)


def _norm(gradient: Tensor) -> Tensor:
    # in two levels: one float32 sum over millions of squares loses the small ones on the CPU
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    rows = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT), dim=1, dtype=dtype)
    return torch.linalg.vector_norm(rows)


def _runs(parameters: Sequence[Parameter], bits: int) -> Iterator[tuple[list[Parameter], int]]:
    """Parameters that can share one tensor, with the bits of their moments."""
    runs: dict[tuple, list[Parameter]] = {}
    for parameter in parameters:
        is_8bit = parameter.dtype in _8BIT_DTYPES and parameter.numel() >= LEAST_8BIT_NUMBERS
        key = (8 if bits == 8 and is_8bit else 32, parameter.dtype, parameter.device)
        runs.setdefault(key, []).append(parameter)
    for (run_bits, *_), run in runs.items():
        first, numbers = 0, 0
        for index, parameter in enumerate(run):
            numbers += parameter.numel() + ALIGNMENT
            if numbers > MOST_NUMBERS and index > first:
                yield run[first:index], run_bits
                first, numbers = index, parameter.numel() + ALIGNMENT
        yield run[first:], run_bits


def _check_group(group: Mapping[str, Any]) -> None:
    limits = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
    for name, value in limits.items():
        if not value >= 0:
            raise UserError(f"{name} is negative", got=value, allowed="0 or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise UserError("betas are out of range", got=group["betas"], allowed="0 <= beta < 1")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} is not floating point",
                got=parameter.dtype,
                do="Give the optimiser only parameters with requires_grad",
            )
