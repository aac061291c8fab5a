"""The tensors of a layer in the classes that a plan decides about, each as one.

Some share memory (q, k and v are columns of one buffer, gate and up of another), some come out of
one kernel (o and lse), and some are too small to be worth a choice of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.costs import held_bytes
from colab_qlora.activations.model_shape import ModelShape, Rank

_ROOT = frozenset({"h0"})

# class -> names of layers/saved.py; "input" is the root of every rebuild and cannot be recomputed
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


def names_of(classes: Iterable[str]) -> frozenset[str]:
    """The names of the tensors in these classes."""
    return frozenset(name for group in classes for name in CLASSES[group])


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
    if "attention" in classes:  # o and lse lie apart
        output = tokens * settings.itemsize * shape.query
        blocks += [output, sizes["attention"] - output]
    return blocks
