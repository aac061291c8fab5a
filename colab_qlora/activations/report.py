"""A memory plan in words: one sentence, or a table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

from colab_qlora.activations.memory_plan import GIB, MemoryPlan
from colab_qlora.activations.static_costs import CUDA_CONTEXT_BYTES
from colab_qlora.activations.step_plan import StepPlan
from colab_qlora.activations.step_settings import WHOLE

WIDTH = 100
WORDS = {
    "input": "layer input",
    "qkv": "q k v",
    "attention": "attention output",
    "h1": "MLP input",
    "gate_up": "gate and up",
    "small": "small ones",
}
# parts of a moment (`phase_costs.Moment`), as people know them
GROUPS = {
    "weights": ("weights", "weight tables", "norms", "biases", "rotation"),
    "embedding and head": ("embedding", "head"),
    "adapters and optimiser": ("adapters", "optimizer states", "gradients"),
    "decoded weights": ("decoded weights",),
    "buffers": ("scratch", "batch", "GEMM workspace"),
    "kept activations": ("kept activations",),
    "copies on their way": ("copies",),
    "the work of the moment": ("at work",),
    "other tensors": ("other tensors",),
}


def seconds_text(seconds: float) -> str:
    """ "249 ms" or "5.4 s"."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


def memory_groups(parts: dict[str, int]) -> dict[str, int]:
    """Bytes of each group of parts, without empty ones."""
    known = {name: group for group, names in GROUPS.items() for name in names}
    found: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for name, size in parts.items():
        found[known.get(name, "other tensors")] += size
    return {group: size for group, size in found.items() if size}


def peak_parts(plan: MemoryPlan) -> dict[str, int]:
    """Bytes at the peak by group; of a misfit, of the least that would do."""
    if plan.step is None:
        assert plan.error is not None
        return memory_groups(plan.error.parts)
    other = {"other tensors": plan.step.other_bytes, "decoded weights": plan.step.held_bytes}
    return memory_groups(plan.step.peak.parts | other)


def sentence(plan: MemoryPlan) -> str:
    """What the plan says, in one sentence."""
    where, budget = plan.machine.profile.name, plan.machine.budget_bytes / GIB
    if plan.step is None:
        change = plan.cheapest_change
        way = f"; cheapest way out: {change.text}" if change else ""
        return (
            f"{_what(plan)} does not fit: it needs at least {plan.peak_memory_gib:.2f} GiB of the "
            f"{budget:.2f} on this {where}{way}"
        )
    needs = f"{_what(plan)} needs {plan.peak_memory_gib:.2f} of {budget:.2f} GiB on this {where}"
    return f"{needs}: {_actions(plan.step)}{_speed(plan)}"


def _what(plan: MemoryPlan) -> str:
    return f"{plan.workload.batch_size} x {plan.workload.seq_length} tokens"


def _actions(step: StepPlan) -> str:
    layers = len(step.plan.keep)
    said = [
        f"{_layers(places, layers)} {verb}"
        for places, verb in (
            (step.plan.offload, "send tensors to the host"),
            (step.plan.recompute, "recompute some"),
        )
        if any(places)
    ]
    if any(step.plan.recompute):
        said[-1] += f" ({step.recompute_share:.0%} of what full checkpointing would)"
    else:
        said.append("nothing is recomputed")
    if step.held_layers:
        which = "the weights" if step.held_layers == layers else f"{step.held_layers} layers"
        said.append(f"{which} stay decoded ({step.held_bytes / GIB:.2f} GiB)")
    return ", ".join(said)


def _layers(places: Iterable[frozenset[str]], layers: int) -> str:
    count = sum(bool(names - {"small"}) for names in places)
    return f"{count} of {layers} layers"


def _speed(plan: MemoryPlan) -> str:
    assert plan.step is not None
    if plan.machine.profile.layer_launch_s == 0:  # a CPU, whose rates are not known
        return ""
    full = seconds_text(plan.step.full_checkpointing_s)
    step = seconds_text(plan.step_seconds)
    return f"; about {step} a step (full checkpointing: {full})"


def table(plan: MemoryPlan) -> str:
    """All that the plan says, in lines of 100 characters at most."""
    blocks = [_head(plan), _memory(plan)]
    if plan.step is not None:
        blocks += [_layer_lines(plan.step), _times(plan)]
    blocks.append(_end(plan))
    return "\n\n".join("\n".join(map(_wrapped, lines)) for lines in blocks)


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(
        line,
        WIDTH,
        subsequent_indent=indent,
        drop_whitespace=False,
        replace_whitespace=False,
        break_long_words=False,
    )


def _head(plan: MemoryPlan) -> list[str]:
    work, machine = plan.workload, plan.machine
    ranks = {work.rank} if isinstance(work.rank, int) else set(work.rank.values()) - {0}
    rank = ", ".join(map(str, sorted(ranks))) or "0"
    bits = "4-bit" if work.settings.is_4bit else f"{8 * work.settings.itemsize}-bit"
    packed = f", documents of {work.document_tokens}" if work.document_tokens else ""
    return [
        f"{work.model_name}: {bits} weights, LoRA rank {rank}",
        f"{_what(plan)} a micro-batch{packed}",
        f"{machine.profile.name} ({machine.profile.source})",
        f"{machine.budget_bytes / GIB:.2f} GiB of GPU memory for torch, "
        f"{machine.host_bytes / GIB:.2f} GiB of host memory to pin",
    ]


def _memory(plan: MemoryPlan) -> list[str]:
    budget = plan.machine.budget_bytes
    if plan.step is None:
        lines = ["least memory that would do"]
    else:
        peak = plan.step.peak
        layer = "" if peak.layer is None else f" of layer {peak.layer}"
        lines = [f"memory at the peak ({peak.phase}{layer}), predicted"]
    parts = peak_parts(plan)
    total = sum(parts.values())
    rows = [*parts.items(), ("together", total)]
    rows.append(("left", budget - total) if total <= budget else ("missing", total - budget))
    lines += [f"  {name:24}{size / GIB:8.2f} GiB" for name, size in rows]
    if plan.machine.profile.layer_launch_s:
        lines.append(f"  {'CUDA itself, outside':24}{CUDA_CONTEXT_BYTES / GIB:8.2f} GiB (assumed)")
    if plan.step is not None and plan.step.plan.host_bytes:
        lines.append(f"  {'on the host':24}{plan.step.plan.host_bytes / GIB:8.2f} GiB")
    return lines


def _layer_lines(step: StepPlan) -> list[str]:
    lines = ["what layers do"]
    for line in step.plan.describe().splitlines():
        layers, _, rest = line.partition(": ")
        lines.append(f"  {layers}")
        for part in rest.split("; "):
            action, *names = part.split(" ")
            known = [WORDS.get(name, name) for name in names]
            lines.append(f"    {action:10}{', '.join(known)}")
    return lines + [f"  {text}" for text in settings_text(step)]


def settings_text(step: StepPlan) -> list[str]:
    """The settings that are not the fastest ones, in words."""
    settings, found = step.batch.settings, []
    if settings.embedding == "host":
        shape = step.batch.shape
        size = shape.vocab * shape.hidden * settings.itemsize / GIB
        found.append(f"the embedding's {size:.2f} GiB wait on the host, which looks its rows up")
    if settings.mlp_tokens is not None and settings.mlp_tokens < step.batch.tokens:
        found.append(f"the MLP works on {settings.mlp_tokens} tokens at a time")
    if settings.max_weight_bytes is not None and settings.max_weight_bytes < WHOLE:
        found.append("one weight is decoded at a time")
    if settings.logits_budget_bytes is not None:
        found.append(f"{settings.logits_budget_bytes // 2**20} MiB of logits at a time")
    if settings.holds_gate_up and any("gate_up" in names for names in step.plan.recompute):
        found.append("gate and up are decoded once for recomputation and gradient")
    return found


def _times(plan: MemoryPlan) -> list[str]:
    step, profile = plan.step, plan.machine.profile
    assert step is not None
    if profile.layer_launch_s == 0:
        return [f"recomputed: {step.recompute_share:.0%} of what full checkpointing would"]
    rows = {
        "a step": seconds_text(plan.step_seconds),
        "with full checkpointing": seconds_text(step.full_checkpointing_s),
        "recomputed": f"{step.recompute_share:.0%} of what full checkpointing would",
        "waiting for copies": seconds_text(step.plan.exposed_s),
        "tokens a second": f"{plan.tokens_per_second:,.0f}",
        "10,000 rows of this length": f"{plan.hours(10_000):.2f} hours",
    }
    basis = "predicted" if profile.is_measured else "predicted from a data sheet"
    return [f"time ({basis})", *(f"  {name:28}{text}" for name, text in rows.items())]


def _end(plan: MemoryPlan) -> list[str]:
    length, size = plan.workload.seq_length, plan.workload.batch_size
    lines = [
        f"largest batch at {length} tokens: {plan.largest_batch_size}",
        f"longest sequence at batch {size}: {plan.longest_seq_length}",
    ]
    if plan.fits:
        return ["fits", *lines]
    change = plan.cheapest_change
    if change is None:
        return ["does not fit, and neither does a smaller batch", *lines]
    after = change.plan
    seconds = (
        "" if math.isnan(after.step_seconds) else f", {seconds_text(after.step_seconds)} a step"
    )
    return [
        "does not fit",
        *lines,
        f"cheapest change: {change.text}",
        f"  then {after.peak_memory_gib:.2f} GiB{seconds}",
    ]
