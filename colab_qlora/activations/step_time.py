"""Seconds of a training step and of each of its parts, from costs and the rates of a GPU.

    a layer forward   = GEMMs / rate + attention / rate + (decoded + element-wise bytes) / rates
    a layer backward  = the same with 2.5 times the attention, and what the plan recomputes
    the step          = the larger of that on the GPU, with the gaps between its kernels and what
                        the host does before the first layer, and what the host needs to start it
                        all, with the optimiser on the GPU after that

GEMMs of few tokens are bound by reading their weights, which counts as element-wise bytes. The
head meets labelled rows only, forward and backward together. The optimiser reads and writes its
states, adapters and gradients once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.costs import attention_flops
from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.model_shape import ModelShape, Rank
from colab_qlora.activations.recording import RECORDED_LAUNCHES
from colab_qlora.activations.static_costs import nf4_bytes, static_bytes

# a layer's launches when everything is recomputed, against none of it: at Llama-3.2-1B's shapes and
# 2 x 512 tokens, where an H100 waits for its host, a step took 72 ms against 53
RECOMPUTE_LAUNCHES = 0.35
# the same where every class of a layer is copied away and back: an 8B with 2 x 512 tokens in 7 GiB,
# which waits for the host of an H200, took 170 ms against 125 predicted without it
OFFLOAD_LAUNCHES = 0.4
# kernels of a layer, forward and backward, and as many more where everything is recomputed
# (results/train_step_8b.json); and a GPU's seconds between two of them, of an H200: recorded steps
# of Llama-3.2-1B's shapes and 2 x 512 tokens took 15.6 and 16.0 ms, their 981 kernels 13.6
# (results/train_step_1b.json)
LAYER_KERNELS, RECOMPUTED_KERNELS, KERNEL_GAP_S = 63, 51, 2.2e-6
# share of what the host does beside the layers that comes before the first of them: an assumption,
# with which 18 steps of an H200 are predicted 8 % short to 10 % long (results/planner_8b.json,
# planner_8b_t4.json, planner_1b.json)
START_SHARE = 0.3
# an assumption: rows of a table that the host gathers into page-locked memory
HOST_GATHER_BYTES_PER_S = 4e9
# backward of attention: five products of the forward's size in place of two
ATTENTION_BACKWARD = 2.5
# assumptions: bounded scores are float32 products outside the tensor cores, or a tanh for each
# score in Triton's kernel. 16 heads of 256 on an H200: Triton 0.30 + 1.73 ms, products 4.60 + 9.19,
# where flash without a bound took 0.29 + 0.96 (results/kernels_bfloat16.json)
CAPPED_ATTENTION = {"math": 6.0, "triton": 2.0}


@dataclass(frozen=True)
class Batch:
    """What a micro-batch costs with a model on a GPU.

    Attributes:
        shape, rank: the model and its adapters.
        tokens: of all sequences together.
        seq_length: tokens in a sequence.
        profile: rates of the GPU.
        settings: how the step runs.
        labelled: rows that meet the head; None: all.
    """

    shape: ModelShape
    rank: Rank
    tokens: int
    seq_length: int
    profile: GpuProfile
    settings: CostSettings = DEFAULT
    labelled: int | None = None

    def __hash__(self) -> int:
        return id(self)

    @functools.cached_property
    def group_s(self) -> dict[str, float]:
        """Seconds of each group's wide GEMM, in either direction, with its decoding."""
        return {group: self._linears_s(names, group) for group, names in self.shape.groups.items()}

    @functools.cached_property
    def attention_s(self) -> float:
        flops = attention_flops(self.shape, self.tokens, self.seq_length)
        return self._attention_slowdown * flops / self.profile.attention_flops_per_s

    @functools.cached_property
    def forward_s(self) -> float:
        """One layer forward."""
        shape, row = self.shape, self._row
        # two norms, the rotation, the gated unit, two residuals
        moved = row * (6 * shape.hidden + 2 * (shape.query + shape.key_value))
        if shape.has_branch_norms:
            moved += row * 4 * shape.hidden
        moved += row * (3 * shape.intermediate + self._adapted_columns[0])
        return sum(self.group_s.values()) + self.attention_s + self._move_s(moved)

    @functools.cached_property
    def backward_s(self) -> float:
        """One layer backward, with everything kept."""
        shape, row = self.shape, self._row
        flops = attention_flops(shape, self.tokens, self.seq_length)
        attention_s = ATTENTION_BACKWARD * flops / self.profile.attention_backward_flops_per_s
        attention_s *= self._attention_slowdown
        # norms once more and backward, the gated unit's gradient, q, k and v's
        moved = row * (12 * shape.hidden + 5 * shape.intermediate + 4 * shape.qkv)
        if shape.has_branch_norms:
            moved += row * 11 * shape.hidden
        return sum(self.group_s.values()) + self._factors_s() + attention_s + self._move_s(moved)

    @functools.cached_property
    def recompute_s(self) -> dict[str, float]:
        """Seconds to compute each class of a layer's tensors again, on its way back."""
        shape, row = self.shape, self._row
        turned = 2 * row * (shape.query + shape.key_value)
        # the norms are computed again in any case, and the products ride in the GEMMs
        return {
            "qkv": self.group_s["qkv"] + self._move_s(turned),
            "attention": self.attention_s,
            "h1": self.group_s["o"] + self._move_s(row * (2 * shape.query + shape.hidden)),
            "gate_up": self._gate_up_again_s(),
            "small": self._move_s(row * (3 * shape.hidden + shape.query + 5 * shape.intermediate)),
        }

    @functools.cached_property
    def head_s(self) -> float:
        """Last norm, head and loss, forward and backward."""
        rows = self.tokens if self.labelled is None else self.labelled
        flops = 4 * rows * self.shape.hidden * self.shape.vocab
        moved = 5 * rows * self.shape.vocab * self.settings.itemsize
        moved += 8 * self._row * self.shape.hidden
        return flops / self.profile.gemm_flops_per_s + self._move_s(moved)

    @functools.cached_property
    def held_s(self) -> float:
        """What a layer saves whose weights stay decoded, and only their borders are written."""
        shape, decode_s, borders = self.shape, 0.0, 0
        for group, names in shape.groups.items():
            inner = shape.linear(names[0])[0]
            outer = sum(shape.linear(name)[1] for name in names)
            decode_s += self._decode_s(inner * outer)
            borders += self.settings.spare(shape, self.rank, group) * (inner + outer)
        return max(0.0, 2 * (decode_s - self._move_s(borders * self.settings.itemsize)))

    @functools.cached_property
    def host_embedding_s(self) -> float:
        """To gather a micro-batch's rows of the embedding on the host and send them over."""
        moved = self._row * self.shape.hidden
        copy_s = moved / self.profile.copy_up_bytes_per_s if self.profile.copy_up_bytes_per_s else 0
        return moved / HOST_GATHER_BYTES_PER_S + copy_s

    @functools.cached_property
    def optimizer_s(self) -> float:
        """One optimiser step; of several micro-batches only the last one has it."""
        sizes = static_bytes(self.shape, self.rank, self.settings)
        return self._move_s(
            2 * sum(sizes[n] for n in ("adapters", "gradients", "optimizer states"))
        )

    def step_s(
        self,
        recomputed: Sequence[Mapping[str, int] | frozenset[str]],
        *,
        offloaded: Sequence[frozenset[str]] = (),
        is_recorded: bool = False,
        held_layers: int = 0,
    ) -> float:
        """Seconds of a step whose layers recompute these classes, without exposed copies.

        Args:
            offloaded: the classes that each layer offloads, where any does.
            is_recorded: the layers run as CUDA graphs.
            held_layers: layers whose weights stay decoded.
        """
        gpu_s = self.shape.layers * (self.forward_s + self.backward_s)
        gpu_s += sum(self.recompute_s[name] for names in recomputed for name in names)
        gpu_s += self.head_s + self.optimizer_s - held_layers * self.held_s
        host_s = self.profile.step_launch_s
        for names in recomputed:
            share = len(names) / len(self.recompute_s)
            gpu_s += KERNEL_GAP_S * (LAYER_KERNELS + RECOMPUTED_KERNELS * share)
            launches = RECORDED_LAUNCHES if is_recorded else 1 + RECOMPUTE_LAUNCHES * share
            host_s += self.profile.layer_launch_s * launches
        moving = sum(len(names) / len(self.recompute_s) for names in offloaded)
        host_s += self.profile.layer_launch_s * OFFLOAD_LAUNCHES * moving
        gpu_s += START_SHARE * self.profile.step_launch_s
        return max(gpu_s, host_s + self.optimizer_s)

    @property
    def _attention_slowdown(self) -> float:
        return CAPPED_ATTENTION[self.settings.attention] if self.shape.has_score_cap else 1.0

    @property
    def _row(self) -> int:
        return self.tokens * self.settings.itemsize

    def _move_s(self, moved_bytes: float) -> float:
        return moved_bytes / self.profile.move_bytes_per_s

    def _linears_s(self, names: Sequence[str], group: str) -> float:
        """A wide GEMM over a group, its adapters' product and the weight's decoding."""
        spare = self.settings.spare(self.shape, self.rank, group)
        inner = self.shape.linear(names[0])[0]
        outer = sum(self.shape.linear(name)[1] for name in names)
        numbers = outer * (inner + spare)
        flops = 2 * self.tokens * (numbers + inner * spare)
        gemm_s = max(
            flops / self.profile.gemm_flops_per_s, self._move_s(numbers * self.settings.itemsize)
        )
        return gemm_s + self._decode_s(inner * outer)

    def _decode_s(self, numbers: int) -> float:
        if not self.settings.is_4bit:
            return 0.0
        moved = nf4_bytes(numbers) + numbers * self.settings.itemsize
        return moved / self.profile.decode_bytes_per_s

    @functools.cached_property
    def _adapted_columns(self) -> tuple[int, int]:
        """Columns that LoRA's narrow products read in a layer, forward and backward.

        Forward X for X A^T. Backward dY for dY B and for B's gradient, X for A's; but where gate,
        up and the input of down are concerned these ride in the gated unit's kernel, which takes
        as long as two of its operands more (results/kernels_bfloat16.json). So from sm_80 up;
        below, products of their own read two operands more, 0.5 % of a T4's step: not counted.
        """
        forward = backward = 0
        for group, names in self.shape.groups.items():
            if not self.settings.spare(self.shape, self.rank, group):
                continue
            inner = self.shape.linear(names[0])[0]
            outer = sum(self.shape.linear(name)[1] for name in names)
            forward += inner
            if group == "gate_up":
                backward += inner + 2 * self.shape.intermediate
            else:
                backward += 2 * outer + (inner if group != "down" else 0)
        return forward, backward

    def _factors_s(self) -> float:
        """LoRA's narrow products on the way back: gradients of the adapters, and their inputs'."""
        widths = 0
        for group, names in self.shape.groups.items():
            spare = self.settings.spare(self.shape, self.rank, group)
            outer = sum(self.shape.linear(name)[1] for name in names)
            widths += spare * (self.shape.linear(names[0])[0] + outer)
        flops_s = 4 * self.tokens * widths / self.profile.gemm_flops_per_s
        return max(flops_s, self._move_s(self._row * self._adapted_columns[1]))

    def _gate_up_again_s(self) -> float:
        """Gate and up once more: decoded for that alone, or together with their gradient."""
        decode_s = self._decode_s(2 * self.shape.hidden * self.shape.intermediate)
        return self.group_s["gate_up"] - (decode_s if self.settings.holds_gate_up else 0.0)
