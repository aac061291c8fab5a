"""Changes of the adapters: their rank and dropout."""

from __future__ import annotations

import math
from typing import Any

from colab_qlora.curves.remedies.changes import Change
from colab_qlora.curves.remedies.run_facts import USUAL_R, RunFacts

__all__ = ["lower_r", "raise_dropout", "raise_r"]

_MOST_DROPOUT, _USUAL_DROPOUT = 0.1, 0.05


def lower_r(facts: RunFacts, expect: str) -> Change | None:
    """Lowers the rank towards the usual one, and its scale stays; None at 16 or below."""
    if facts.r is None or facts.r <= USUAL_R:
        return None
    why = (
        f"rank {facts.r} has {facts.r / USUAL_R:g} times the room of rank {USUAL_R} for single rows"
    )
    return _set_r(facts, USUAL_R, why, expect)


def raise_r(facts: RunFacts, expect: str) -> Change | None:
    """Doubles the rank, and its scale stays; None from 64 up, where it no longer matters."""
    if facts.r is None or facts.r >= 4 * USUAL_R:
        return None
    why = f"rank {facts.r} may be too small to hold what the rows have to teach"
    return _set_r(facts, 2 * facts.r, why, expect)


def _set_r(facts: RunFacts, then: int, why: str, expect: str) -> Change:
    now = facts.r
    assert now is not None
    arguments: dict[str, Any] = {"r": then}
    kept = ""
    if facts.alpha is not None:
        # the adapter is scaled by alpha / r, or alpha / sqrt(r) with rslora: one change, not two
        ratio = math.sqrt(then / now) if facts.use_rslora else then / now
        alpha = float(f"{facts.alpha * ratio:.4g}")
        arguments["lora_alpha"] = int(alpha) if alpha.is_integer() else alpha
        kept = f", with lora_alpha={arguments['lora_alpha']} so that the scale stays"
    verb = "lower" if then < now else "raise"
    return Change("r", now, then, f"{verb} r from {now} to {then}{kept}", why, expect, arguments)


def raise_dropout(facts: RunFacts, expect: str) -> Change | None:
    """Turns dropout on, or up to 0.1; None beyond that, or where it is unknown."""
    now = facts.dropout
    if now is None or now >= _MOST_DROPOUT:
        return None
    then = _USUAL_DROPOUT if now < _USUAL_DROPOUT else _MOST_DROPOUT
    do = f"raise lora_dropout from {now:g} to {then:g}"
    why = "dropout makes it harder to learn single rows by heart"
    return Change("lora_dropout", now, then, do, why, expect, {"lora_dropout": then})
