"""Two hooks on a fused model's own modules: they see each batch before the layers do."""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.documents import Documents, stand_in
from colab_qlora.models.fused_state import fused_state
from colab_qlora.models.key_value_cache import cache_in


def prepare_batch(
    trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Find out what the attention has to know, and keep transformers from writing it as a mask.

    A token never looks at a later one, so padding that follows all tokens of a row changes nothing
    for them; without the mask the fastest attention runs. Packed documents are found where the
    positions start again. Each answer is one read from the GPU a batch.

    Raises:
        UserError: a training sequence with more tokens than the model has positions.
    """
    state = fused_state(trunk)
    if state is None:
        return None
    state.new_batch()
    learns = trunk.training and torch.is_grad_enabled()
    if learns:
        if state.trained.in_float32_(trunk):
            line = "the trained weights are in float32 again: something had cast them to 16 bits"
            print(f"colab_qlora: {line}", flush=True)
        _check_length(trunk, args, kwargs)
        if kwargs.get("use_cache") is None:
            # a config that says use_cache=True would have every training step fill a cache
            kwargs = {**kwargs, "use_cache": False}
    if cache_in(kwargs) is not None or kwargs.get("use_cache"):
        return args, kwargs
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and is_right_padded(mask):
        # beside a mask, positions that start again are padding's, not documents'
        kept = None if positions is None else stand_in(None, mask.device)
        return args, {**kwargs, "attention_mask": kept}
    has_no_cache = learns or kwargs.get("use_cache") is False
    if has_no_cache and mask is None and positions is None:
        # transformers would look for documents in positions that it makes itself, and wait for it
        inputs = _inputs(args, kwargs)
        if inputs is not None:
            return args, {**kwargs, "attention_mask": stand_in(None, inputs.device)}
    if has_no_cache and mask is None and isinstance(positions, torch.Tensor):
        documents = _documents(positions, _batch_rows(args, kwargs))
        if documents is not None:
            return args, {**kwargs, "attention_mask": stand_in(documents, positions.device)}
    return args, kwargs


def is_right_padded(mask: torch.Tensor) -> bool:
    """True if in no row of (batch, length) a token follows a padding place."""
    seen = mask.bool()
    return not bool((seen[:, 1:] & ~seen[:, :-1]).any())


def tables_in_float32(
    rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Have the rotation tables in float32: the model reads only dtype and device of its input.

    In bfloat16 a table entry is off by up to 0.4 %; the fused layers rotate in float32, and the
    model's own code gets the tables rounded as ever.
    """

    def like(x: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(0, dtype=wide, device=x.device)

    if args:
        return (like(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "x": like(kwargs["x"])}


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    found = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if found is None else found


def _batch_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    inputs = _inputs(args, kwargs)
    return 1 if inputs is None else inputs.shape[0]


def _check_length(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = _inputs(args, kwargs)
    limit = _position_limit(trunk.config)
    positions = kwargs.get("position_ids")
    if inputs is None or limit is None or positions is not None or inputs.shape[1] <= limit:
        return
    raise UserError(
        "a sequence is longer than the model's positions",
        got=f"input_ids of {inputs.shape[1]} tokens",
        allowed=f"up to {limit} tokens (max_position_embeddings)",
        do="Lower max_seq_length, or load the model with rope_scaling",
    )


def _position_limit(config: Any) -> int | None:
    """Positions that the model was made or stretched for, in tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # in llama3's form and in longrope's the limit of the config is the stretched one
    if limit is None or rope.get("rope_type", "default") in ("default", "llama3", "longrope"):
        return limit
    return int(limit * max(1.0, float(rope.get("factor") or 1.0)))


def _documents(positions: torch.Tensor, rows: int) -> Documents | None:
    """Bounds of the documents in a batch whose positions start again; None if every row is one."""
    positions = positions.expand(rows, -1)
    length = positions.shape[1]
    if not length:
        return None
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] - positions[:, :-1] != 1
    first = starts.reshape(-1).nonzero().flatten().tolist()
    if len(first) == rows:
        return None
    ends = [*first[1:], rows * length]
    bounds = tuple(zip(first, ends, strict=True))
    cu_seqlens = torch.tensor([*first, rows * length], dtype=torch.int32, device=positions.device)
    return Documents(bounds, cu_seqlens, max(end - start for start, end in bounds))
