"""How many positions a model has, and how they are stretched for longer texts."""

from __future__ import annotations

from typing import Any

from colab_qlora.errors import UserError


def fit_positions(config: Any, rope_scaling: dict | None, max_seq_length: int) -> None:
    """Stretch a config's positions if that is asked for, and see that the length fits into them.

    Args:
        config: of transformers; is changed.
        rope_scaling: as `FastLanguageModel.from_pretrained` takes it.
        max_seq_length: in tokens.

    Raises:
        UserError: another kind of stretching, or a length beyond the last position.
    """
    _stretch(config, rope_scaling)
    _check(config, max_seq_length)


def _stretch(config: Any, rope_scaling: dict | None) -> None:
    if not rope_scaling:
        return
    kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
    factor = float(rope_scaling.get("factor", 1.0))
    # "dynamic" starts beyond max_position_embeddings, which the user's length would have to exceed
    if kind not in {"linear", "yarn"} or factor < 1:
        raise UserError(
            "rope_scaling is not understood",
            got=rope_scaling,
            allowed='{"rope_type": "linear" or "yarn", "factor": 1.0 or more}',
        )
    scaled = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = config.max_position_embeddings
    rope = dict(config.rope_parameters or {})
    # Gemma 3 has positions for each kind of layer; those in a window see no further than before
    if "full_attention" in rope:
        scaled = {"full_attention": {**rope["full_attention"], **scaled}}
    config.rope_parameters = {**rope, **scaled}
    config.max_position_embeddings = int(config.max_position_embeddings * factor)


def _check(config: Any, max_seq_length: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_seq_length > positions:
        factor = -(-max_seq_length // positions)
        raise UserError(
            "max_seq_length is longer than the model's positions",
            got=max_seq_length,
            allowed=f"at most {positions} tokens",
            do=f"Lower it, or stretch the positions: "
            f'rope_scaling={{"rope_type": "linear", "factor": {factor}.0}}',
        )
