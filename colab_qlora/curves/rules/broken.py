"""Rules about numbers that are no losses any more: not finite, collapsed, on another scale."""

from __future__ import annotations

import numpy as np

from colab_qlora.curves.picture.marks import steps_words
from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.rules.readings import Readings
from colab_qlora.curves.verdicts import Verdict

# logs with a broken gradient norm in a row that no loss scaler explains
_BROKEN_RUN = 3
# a loss scaler that starts high skips some of the first steps
_SCALER_STEPS = 10
_RATIO_SPREAD = 0.25


def non_finite(r: Readings) -> Verdict | None:
    """A loss that is nan or inf; zeros beside broken gradients; broken gradients in a row."""
    (steps, losses), (eval_steps, evals) = r.all_losses, r.all_evals
    bad_train, bad_eval = steps[~np.isfinite(losses)], eval_steps[~np.isfinite(evals)]
    bad = np.concatenate([bad_train, bad_eval])
    if bad.size:
        # eval rows without labels break the eval loss alone, and harm nothing
        what, at = ("train", bad_train) if bad_train.size else ("eval", bad_eval)
        return _broken(r, int(at.min()), f"the {what} loss is nan or inf", int(bad.size))
    norm_steps, norms = r.series("grad_norm")
    broken = ~np.isfinite(norms)
    if not broken.any():
        return None
    zero_steps = steps[losses == 0.0]
    hidden = np.intersect1d(zero_steps, norm_steps[broken].astype(steps.dtype))
    if hidden.size >= 2:
        # transformers logs 0 for what it filtered out
        because = "the loss is exactly 0 where the gradient norm is nan or inf"
        return _broken(r, int(hidden[0]), because, int(hidden.size))
    first = _row_of(broken & (norm_steps > _skipped_until(r, norm_steps, broken)), _BROKEN_RUN)
    if first is None:
        return None
    because = f"the gradient norm is nan or inf {_BROKEN_RUN} logs in a row"
    return _broken(r, int(norm_steps[first]), because, int(broken.sum()))


def _skipped_until(r: Readings, steps: np.ndarray, broken: np.ndarray) -> int:
    """The last step at which a loss scaler may still be looking for its scale; -1 without one."""
    dtype = r.run.get("compute_dtype")
    if r.run.get("fp16") or dtype == "float16":
        return _SCALER_STEPS
    if r.run.get("bf16") or dtype:
        return -1
    # a log that does not name the precision looks like this in float16 alone
    later = broken[steps > _SCALER_STEPS]
    return _SCALER_STEPS if later.size and not later.any() else -1


def _row_of(flags: np.ndarray, length: int) -> int | None:
    """Index of the first of `length` true flags in a row."""
    if flags.size < length:
        return None
    rows = np.lib.stride_tricks.sliding_window_view(flags, length).all(axis=1)
    return int(rows.argmax()) if rows.any() else None


def _broken(r: Readings, step: int, because: str, count: int) -> Verdict:
    if because.startswith("the eval loss"):
        action = "look for eval rows without labels"
    elif r.run.get("compute_dtype") == "float16" or r.run.get("fp16"):
        action = "train in bfloat16 or float32 if the GPU can; else halve the learning rate"
    else:
        action = "halve the learning rate, and look for rows without labels before that step"
    numbers = {"values": float(count)}
    return Verdict("non-finite", "fault", "sure", step, because, action, numbers)


def skipped_steps(r: Readings) -> Verdict | None:
    """Single broken gradient norms while all losses are finite: mostly the loss scaler's skips."""
    steps, norms = r.series("grad_norm")
    broken = steps[~np.isfinite(norms)].astype(int)
    if not broken.size:
        return None
    marked = tuple(broken.tolist())
    have = "has" if broken.size == 1 else "have"
    because = f"{broken.size} of {norms.size} logs {have} a gradient norm of nan or inf"
    row = f"none in a row of {_BROKEN_RUN}"
    said, action = "", "nothing: the loss scaler repeats with a smaller scale"
    if _skipped_until(r, steps, ~np.isfinite(norms)) >= 0:
        because += f", {row} after the first steps, and all losses are finite"
    else:
        because += f", {row}, and all losses are finite"
        said = "single gradients that are nan or inf"
        action = f"look at the rows of {steps_words(marked, 5)}"
        if r.run.get("compute_dtype") or r.run.get("bf16"):
            because += "; without float16 there is no loss scaler that skips such a step"
    numbers = {"skipped": float(broken.size)}
    return Verdict("skipped steps", "info", "likely", None, because, action, numbers, marked, said)


def collapsed(r: Readings) -> Verdict | None:
    """A train loss of next to nothing that no eval loss vouches for."""
    if r.is_short or not r.has_levels or r.evals.size or not r.start > 0:
        return None
    last = r.losses[-r.window :]
    if r.end >= r.limits.collapsed_loss or last.max() > max(0.01 * r.start, 1e-12):
        return None
    gone = r.steps[np.flatnonzero(r.levels <= 0.01 * r.start)]
    return Verdict(
        "collapsed",
        "fault",
        "sure",
        int(gone[0]) if gone.size else None,
        f"the last {r.window} train losses are below {loss_text(max(0.01 * r.start, 0.0))}, 1 % of "
        f"where they began, and there is no eval loss",
        "look at the labels of a few rows (empty, or the answer stands in the prompt), and add an "
        "eval set",
        {"end": r.end, "start": r.start},
    )


def scale_mismatch(r: Readings) -> Verdict | None:
    """A train loss that is a steady multiple of the eval loss."""
    gaps = r.gaps
    if gaps is None or (gaps >= 1).any():
        return None
    ratios = 1 / (1 - gaps)
    ratio = float(np.median(ratios))
    if ratio < r.limits.scale_ratio or ratios.std() / ratios.mean() >= _RATIO_SPREAD:
        return None
    accumulation = r.run.get("gradient_accumulation_steps")
    because = f"at each of the last {ratios.size} evals the train loss is {ratio:.1f} times as high"
    action = "check that train and eval rows are masked alike"
    kind = "warning"
    if isinstance(accumulation, int) and accumulation > 1:
        if abs(ratio / accumulation - 1) < _RATIO_SPREAD:
            kind = "fault"
            because += f", and gradient_accumulation_steps is {accumulation}"
            action = "divide the logged train loss by gradient_accumulation_steps, or update the "
            action += "trainer: it logs a sum"
        else:
            action = "check whether the trainer logs a sum over gradient_accumulation_steps"
    return Verdict(
        "scale mismatch", kind, "likely", None, because, action, {"train_over_eval": ratio}
    )
