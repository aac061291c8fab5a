"""Two hooks on a fused model's own modules: they see each batch before the layers do."""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.models.fused_state import fused_state


def prepare_batch(
    trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Drop a padding mask that causal attention makes needless.

    A token never looks at a later one, so padding that follows all tokens of a row changes nothing
    for them; without the mask the fastest attention runs. The answer is one number from the GPU.
    """
    state = fused_state(trunk)
    if state is None:
        return None
    state.new_batch()
    if kwargs.get("use_cache") is None and trunk.training and torch.is_grad_enabled():
        # a config that says use_cache=True would have every training step fill a cache
        kwargs = {**kwargs, "use_cache": False}
    mask = kwargs.get("attention_mask")
    if (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 2
        or kwargs.get("past_key_values") is not None
        or kwargs.get("use_cache")
        or not is_right_padded(mask)
    ):
        return args, kwargs
    return args, {**kwargs, "attention_mask": None}


def is_right_padded(mask: torch.Tensor) -> bool:
    """True if in no row of (batch, length) a token follows a padding place."""
    seen = mask.bool()
    return not bool((seen[:, 1:] & ~seen[:, :-1]).any())


def tables_in_float32(
    rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Have the rotation tables in float32: the model reads only dtype and device of its input.

    In bfloat16 the angle of a table entry is off by up to 0.4 %; the fused layers rotate in
    float32, and the model's own code gets the tables rounded as ever.
    """

    def stand_in(x: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(0, dtype=wide, device=x.device)

    if args:
        return (stand_in(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "x": stand_in(kwargs["x"])}
