"""How an adapter was started, as PEFT's `init_lora_weights` has it, and what that does to its base.

Most starts leave the base as it is. PiSSA, CorDA, OLoRA and LoRA-GA subtract the adapter from it,
which PEFT can do to weights in 16 bits only. A LoftQ adapter stands in for what its base lost when
that was quantised, so it belongs to the quantised weights and not to those of the checkpoint.

PEFT would quantise the base again if it read "loftq" in a saved config. So the config says that the
weights are there, and LoftQ is noted in `auto_mapping`: PEFT keeps that field, saves it, and reads
it only where a config has no task type.
"""

from __future__ import annotations

from typing import Any

LOFTQ = "loftq"
LEAVE_BASE = ("gaussian", "eva", "orthogonal")
# PEFT subtracts these from the base; beginnings of names, as of "pissa_niter_4"
_CHANGE_BASE = ("pissa", "corda", "olora", "lora_ga")
# PEFT makes these in the dtype of the base's weights, which is that of codes
_NEED_DENSE = ("orthogonal", "mica")
_NOTE = "adapters_started_as"


def changes_base(start: Any) -> bool:
    """Whether PEFT takes a part of the base into an adapter that starts so."""
    return isinstance(start, str) and start.lower().startswith(_CHANGE_BASE)


def needs_dense_base(start: Any) -> bool:
    """Whether PEFT can start an adapter so over 16 or 32 bits only."""
    return changes_base(start) or (isinstance(start, str) and start.lower() in _NEED_DENSE)


def leaves_base(start: Any) -> bool:
    """Whether it is known that such an adapter belongs beside the base as it was loaded."""
    return not isinstance(start, str) or start in LEAVE_BASE


def note_loftq_(config: Any) -> None:
    """Note in a `LoraConfig` that its adapter makes up for the error of a quantised base."""
    config.auto_mapping = {**(config.auto_mapping or {}), _NOTE: LOFTQ}


def belongs_to_quantised(config: Any) -> bool:
    """Whether an adapter was started as what its base had lost, by `note_loftq_`."""
    return (getattr(config, "auto_mapping", None) or {}).get(_NOTE) == LOFTQ
