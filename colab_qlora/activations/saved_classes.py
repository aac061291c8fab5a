"""The tensors of a layer in the classes that a plan decides about, each as one.

Some share memory (q, k and v are columns of one buffer, gate and up of another), some come out of
one kernel (o and lse), and some are too small to be worth a choice of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.costs import held_bytes
from colab_qlora.activations.model_shape import ModelShape, Rank
from colab_qlora.layers.saved import BRANCH

_ROOT = frozenset({"h0"})

# class -> names of layers/saved.py; "input" is the root of every rebuild and cannot be recomputed.
# With it goes what a layer that norms its branches always keeps
CLASSES = {
    "input": ("h0",),
    "qkv": ("q", "k", "v"),
    "attention": ("o", "lse"),
    "h1": ("h1",),
    "gate_up": ("gate", "up"),
    "small": ("rstd1", "rstd2", "xa_qkv", "xa_o", "xa_gate_up", "xa_down"),
}
# copies of a few bytes a token are not worth an event each
OFFLOADABLE = ("input", "qkv", "attention", "h1", "gate_up")


def names_of(classes: Iterable[str], shape: ModelShape | None = None) -> frozenset[str]:
    """The names of the tensors in these classes; of a model of that shape, if it is given."""
    names = frozenset(name for group in classes for name in CLASSES[group])
    has_branch = shape is not None and shape.has_branch_norms and names >= _ROOT
    return names | {BRANCH} if has_branch else names


def class_bytes(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    settings: CostSettings = DEFAULT,
    classes: Collection[str] = tuple(CLASSES),
) -> dict[str, int]:
    """Bytes that storing each class holds in one layer; they add up to `held_bytes` exactly."""
    layer = (shape, tokens, seq_length, rank)
    base = held_bytes(*layer, _ROOT, settings)
    found = {"input": base}
    for name in CLASSES:
        if name != "input":
            found[name] = held_bytes(*layer, _ROOT | names_of([name]), settings) - base
    return {name: found[name] for name in classes}


def host_blocks(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    classes: Collection[str],
    settings: CostSettings = DEFAULT,
) -> list[int]:
    """Bytes of each piece of memory that offloading these classes of one layer sends away."""
    sizes = class_bytes(shape, tokens, seq_length, rank, settings, classes)
    blocks = [sizes[name] for name in classes if name != "attention"]
    if "input" in classes and shape.has_branch_norms:  # two tensors of one size
        blocks.remove(sizes["input"])
        blocks += [sizes["input"] // 2] * 2
    if "attention" in classes:  # o and lse lie apart
        output = tokens * settings.itemsize * shape.query
        blocks += [output, sizes["attention"] - output]
    return blocks
