"""The peak of a training step: what comes and goes inside a layer and the loss, phase by phase.

Exact, and tested against the code on a CPU: what a store holds, scratch memory, weights, adapters,
optimiser states, FLOPs of all GEMMs. Counted from the code's own allocations: what comes and goes
inside a layer; the CPU allocator's record of a small step agrees within 3 % (5 % in any phase).
Estimated: what kernels take for themselves (`attention_workspace`, `GEMM_WORKSPACE_BYTES`), the
CUDA context, bytes moved. Llama-3-8B with 2 x 2,048 tokens: `peak_bytes` says 17.91 GiB with all
kept, where an H200 showed 17.93; and 7.14 with inputs kept, where it showed 7.15
(benchmarks/results/train_step_8b.json).
Not counted: rounding of each allocation to 512 bytes (0.4 MB for Llama-3-8B's weights), and what
the allocator reserves without handing it out.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.costs import (
    HALVES,
    HEADS,
    held_bytes,
    kept_costs,
    mlp_spare,
    root_bytes,
    stored_names,
)
from colab_qlora.activations.model_shape import ModelShape, Rank, group_rank
from colab_qlora.activations.scratch_costs import mlp_chunks, scratch_bytes
from colab_qlora.activations.static_costs import static_bytes
from colab_qlora.errors import UserError
from colab_qlora.kernels.attention_backends import MOST_REPEATED_BYTES
from colab_qlora.kernels.logits_chunk import logits_chunk_rows
from colab_qlora.layers.saved import checked_plan

# kernels/glu_lora.py on an H100: 2 programs on each of 132 multiprocessors, 128 columns of sums
_GLU_SUM_COLUMNS = 2 * 132 * 128
# kernels/attention_math.py: three chunks of 2**24 float32 scores
_MATH_SCORE_BYTES = 3 * 4 * 2**24

_MLP_NAMES = frozenset({"rstd2", "xa_gate_up", "xa_down"}) | HALVES


def attention_workspace(
    shape: ModelShape, tokens: int, settings: CostSettings = DEFAULT
) -> tuple[int, int]:
    """Bytes that the attention takes beside its results, forward and backward: estimates.

    Known from this package's code: K and V repeated for every query head, and their gradients, for
    the efficient and the CPU's kernel; row sums of the Triton kernel. Seen in the allocator's
    history on an H200: cuDNN's float32 sum of dq, its gradients of K and V for every query head,
    and row sums, in one piece; the memory-efficient kernel's float32 sum of dq. Assumed, and not
    looked up: the same as cuDNN's for FlashAttention, which may be off by as much.
    """
    queries = tokens * shape.query * settings.itemsize
    expanded = 2 * queries if shape.q_heads > shape.kv_heads else 0
    delta, sums = 4 * tokens * shape.q_heads, 4 * tokens * shape.query
    name = settings.attention
    if name == "efficient_varlen":
        return expanded, 2 * expanded + sums + delta
    if name == "efficient":
        # a few heads at a time: their K and V with gradients, and copies of their o, dy and dq
        a_head = max(1, expanded // shape.kv_heads)
        heads = min(shape.kv_heads, max(1, MOST_REPEATED_BYTES // a_head))
        share = heads / shape.kv_heads if expanded else 1.0
        back = 2 * expanded + sums + (3 * queries if share < 1 else 0)
        return int(share * expanded), int(share * back) + delta
    if name == "cudnn" or name.startswith("flash"):
        return 0, expanded + sums + delta
    wide = 2 * tokens * shape.key_value * settings.statistic_bytes
    # how steep bounded scores are, one more tensor of a chunk
    bent = _MATH_SCORE_BYTES // 3 if shape.has_score_cap else 0
    return {
        "triton": (0, delta),
        "cpu_flash": (expanded, 2 * expanded),
        "math": (_MATH_SCORE_BYTES, _MATH_SCORE_BYTES + bent + wide),
    }[name]


def transient_bytes(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    plan: Collection[str],
    settings: CostSettings = DEFAULT,
) -> dict[str, int]:
    """Bytes that live inside one layer at the peak of each phase, beside kept ones and scratch.

    Returns:
        "forward attention", "forward mlp", "backward rebuild" (of the attention half), "backward
        mlp", "backward attention". Those of the backward pass contain the gradient of the layer's
        output; the layer's parameter gradients are counted elsewhere.
    """
    names, row = stored_names(shape, plan), tokens * settings.itemsize
    hidden, query, heads = row * shape.hidden, row * shape.query, row * shape.qkv
    costs = kept_costs(shape, tokens, seq_length, rank, settings.itemsize)
    missing = {name: 0 if name in names else cost.bytes for name, cost in costs.items()}
    outputs, late = missing["o"] + missing["lse"], missing["h1"] + missing["xa_o"]
    d_qkv = heads + row * settings.spare(shape, rank, "qkv")
    d_out = hidden + row * settings.spare(shape, rank, "down")
    ahead, back = attention_workspace(shape, tokens, settings)
    rotated = row * (shape.query + shape.key_value) if shape.has_head_norms else 0
    attention = rotated + ahead
    # q, k and v are one buffer, also where some of them are kept
    own, again = heads * (not names & HEADS), heads * (not names >= HEADS)
    rebuilt = _rebuild_bytes(names, attention, heads - outputs)
    have = d_out + again + outputs + missing["xa_qkv"] + missing["rstd1"]
    forward, inner = _mlp_transients(shape, tokens, rank, names, settings)
    # of what is kept, h1 and xa_o come after the attention
    before = attention - (costs["h1"].bytes + costs["xa_o"].bytes - late)
    after = max(rotated + heads + back, heads + d_qkv, d_qkv + hidden + d_out)
    # where branches are normed, h1 stands beside the branch that it was made from
    joined = hidden if shape.has_branch_norms else 0
    statistic = tokens * settings.statistic_bytes if shape.has_branch_norms else 0
    return {
        "forward attention": own + outputs + max(before, missing["h1"] + joined),
        # h1 and h2, which is made last where branches are normed
        "forward mlp": joined + max(forward, joined)
        if joined
        else missing["h1"] + hidden + forward,
        "backward rebuild": have + max(rebuilt, late),
        "backward mlp": have + late + joined + statistic + inner,
        "backward attention": have + missing["xa_o"] + query + after,
    }


def _rebuild_bytes(plan: frozenset[str], attention: int, shaped: int) -> int:
    """Bytes beside its results that rebuilding the attention half takes."""
    rebuilt = attention * (not plan >= {"o", "lse"})
    if "xa_qkv" not in plan and plan >= HEADS:
        rebuilt = max(rebuilt, shaped)  # made for its shape, and let go
    return rebuilt


def _mlp_transients(
    shape: ModelShape, tokens: int, rank: Rank, plan: frozenset[str], settings: CostSettings
) -> tuple[int, int]:
    """Bytes inside the MLP half, forward and backward, without its inputs and outputs."""
    size, wide = settings.itemsize, shape.intermediate
    chunk, back_chunk = mlp_chunks(plan, tokens, settings)
    columns = 2 * wide + mlp_spare(shape, rank, settings)
    # forward, the buffer of one chunk is there until that of the next is made
    buffers = 0 if plan >= HALVES else min(2, -(-tokens // max(chunk, 1)))
    again = 0 if plan >= HALVES else back_chunk * size * columns
    ranks = group_rank(shape, rank, "gate_up") + group_rank(shape, rank, "down")
    # one adapter of gate and up: its gradient comes in two halves, which are joined
    joined = 2 * wide * group_rank(shape, rank, "gate_up") if shape.has_fused_projections else 0
    ranks += group_rank(shape, rank, "gate_up") if shape.has_fused_projections else 0
    sums = 0
    on_gpu = settings.gemm_workspace_bytes > 0
    if on_gpu and size == 2 and "xa_down" in plan:  # else these gradients have no kernel of theirs
        sums = 4 * (ranks * (max(_GLU_SUM_COLUMNS, wide) + wide) + joined)
    if settings.has_dropout:
        sums += back_chunk * wide * (1 + 2 * size)  # a mask, and the product before its scaling
    d_down, d_norm = back_chunk * wide * size, back_chunk * shape.hidden * size
    products = 0 if "xa_down" in plan else back_chunk * size * settings.spare(shape, rank, "down")
    return buffers * chunk * size * columns, again + max(d_down + sums + products, d_norm)


def loss_bytes(
    shape: ModelShape, tokens: int, settings: CostSettings = DEFAULT, labelled: int | None = None
) -> dict[str, int]:
    """Bytes of the last norm, the head and the loss, "loss forward" and "loss backward".

    Args:
        labelled: rows that have a label; None: all (it is one less for each sequence).
    """
    size, count = settings.itemsize, tokens if labelled is None else labelled
    hidden, rows = tokens * shape.hidden * size, count * shape.hidden * size
    step = min(logits_chunk_rows(shape.vocab, size, settings.logits_budget_bytes), count)
    # rows of logits start at multiples of 64 numbers
    chunk = step * size * (-(-shape.vocab // 64) * 64 + shape.hidden)
    kept = hidden + tokens * settings.statistic_bytes + count * (16 + settings.statistic_bytes)
    return {"loss forward": kept + hidden + rows + chunk, "loss backward": kept + hidden + 2 * rows}


@dataclass(frozen=True)
class Moment:
    """One moment of a training step and the memory that is in use then.

    Attributes:
        phase: as in `peak_phases`.
        layer: number of the layer at work, from 0; None outside of layers.
        parts: bytes by name: what `static_bytes` names (without the CUDA context, which is not
            torch's), "batch", "scratch", "kept activations" (of layers that wait), "copies" (on
            their way to or from the host), and "at work" (the layer, the loss or the optimiser).
    """

    phase: str
    layer: int | None
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def step_moments(
    shape: ModelShape,
    batch: int,
    seq_length: int,
    rank: Rank,
    plans: Sequence[Collection[str]],
    settings: CostSettings = DEFAULT,
    offloads: Sequence[Collection[str]] = (),
) -> dict[str, Moment]:
    """Of each phase of a training step the moment at which torch's allocator has handed out most.

    Args:
        batch: sequences in a micro-batch.
        seq_length: tokens in each.
        plans: for each layer the names that it keeps.
        offloads: for each layer the names that wait in host memory; empty: none. A layer's are on
            the GPU while it works, and while the layer after it does: on their way down when it
            goes forward, on their way up when it goes backward.

    Returns:
        The five phases of `transient_bytes`, the two of `loss_bytes`, and "optimizer" (AdamW copies
        all gradients into one tensor).
    """
    offloads = offloads or [()] * shape.layers
    for what, names in (("plans", plans), ("offloads", offloads)):
        if len(names) != shape.layers:
            raise UserError(
                f"{what} are not one for each layer", got=len(names), allowed=shape.layers
            )
    tokens, static = batch * seq_length, static_bytes(shape, rank, settings)
    sizes, row = (shape, tokens, seq_length, rank), tokens * settings.itemsize
    gradients = static.pop("gradients")
    stored = [checked_plan([*p, *o]) for p, o in zip(plans, offloads, strict=True)]
    del static["CUDA context"]
    static["batch"] = _batch_bytes(shape, batch, seq_length, settings)
    static["scratch"] = sum(scratch_bytes(shape, tokens, rank, set(stored), settings).values())
    earlier, kept, moving = gradients if settings.has_gradients else 0, 0, 0
    found: dict[str, Moment] = {}

    def add(phase: str, layer: int | None, made: int, size: int) -> None:
        parts = {"gradients": made, "kept activations": kept, "copies": moving, "at work": size}
        moment = Moment(phase, layer, static | parts)
        if phase not in found or moment.bytes > found[phase].bytes:
            found[phase] = moment

    add("optimizer", None, gradients, static["adapters"])
    # LlamaModel.forward has a name for what came out of the embedding until it returns
    named = row * shape.hidden if shape.layers and "h0" in offloads[0] else 0
    layer_phases = functools.cache(functools.partial(_layer_phases, *sizes, settings=settings))
    held = functools.cache(functools.partial(held_bytes, *sizes, settings=settings))
    for index, plan in enumerate(stored):
        late = earlier or gradients // shape.layers * (shape.layers - index)
        for phase, size in layer_phases(plan, is_last=index == shape.layers - 1).items():
            if phase.startswith("forward"):
                # beside that of the layer before, which counts as a copy
                add(phase, index, earlier, size + (named if index > 1 else 0))
            else:
                add(phase, index, late, size)
        moving = held(plan) - held(frozenset(plans[index])) if offloads[index] else 0
        if "h0" in offloads[index]:  # which a plan always names
            moving += root_bytes(shape, tokens, settings.itemsize)
        kept += held(plan) - moving
    for phase, size in loss_bytes(shape, tokens, settings, max(tokens - batch, 0)).items():
        add(phase, None, earlier, size)
    return found


def peak_phases(
    shape: ModelShape,
    batch: int,
    seq_length: int,
    rank: Rank,
    plans: Sequence[Collection[str]],
    settings: CostSettings = DEFAULT,
    offloads: Sequence[Collection[str]] = (),
) -> dict[str, int]:
    """Most bytes that torch's allocator has handed out in each phase, see `step_moments`."""
    moments = step_moments(shape, batch, seq_length, rank, plans, settings, offloads)
    return {phase: moment.bytes for phase, moment in moments.items()}


def _batch_bytes(shape: ModelShape, batch: int, seq_length: int, settings: CostSettings) -> int:
    """Token ids, labels and shifted labels; rotation tables of one sequence."""
    given = 3 * 8 * batch * seq_length
    turning = shape.rotary_dim or shape.head_dim
    return given + shape.rotations * 2 * seq_length * turning * settings.statistic_bytes


def _layer_phases(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    plan: frozenset[str],
    *,
    settings: CostSettings,
    is_last: bool,
) -> dict[str, int]:
    """`transient_bytes` and what the layer itself has kept by then."""
    sizes = (shape, tokens, seq_length, rank)
    inside = transient_bytes(*sizes, plan, settings)
    row_bytes = tokens * shape.hidden * settings.itemsize
    half = held_bytes(*sizes, plan - _MLP_NAMES, settings)
    # of what cannot be computed again, only the input is there before the MLP
    half += row_bytes - root_bytes(shape, tokens, settings.itemsize)
    all_of_it = held_bytes(*sizes, plan, settings)
    # the gradient of the last layer's output comes without spare columns and is copied
    copied = row_bytes * is_last
    found = {}
    for phase, size in inside.items():
        there = half if phase == "forward attention" else all_of_it
        found[phase] = there + size + (0 if phase.startswith("forward") else copied)
    return found


def peak_bytes(
    shape: ModelShape,
    batch: int,
    seq_length: int,
    rank: Rank,
    plans: Sequence[Collection[str]],
    settings: CostSettings = DEFAULT,
    offloads: Sequence[Collection[str]] = (),
) -> int:
    """The largest of `peak_phases`: what torch.cuda.max_memory_allocated will show.

    The process takes the CUDA context beside it, and what the allocator reserves without use.
    """
    return max(peak_phases(shape, batch, seq_length, rank, plans, settings, offloads).values())
