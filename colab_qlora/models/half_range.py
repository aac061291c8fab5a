"""Models whose hidden states do not fit float16, which is all that a T4 has tensor cores for.

float16 ends at 65,504. Gemma 3 adds up more than that in its residual stream (to some 300,000), as
it was trained in bfloat16: the first layer that passes the limit gives inf, and the loss is NaN,
with the model's own code as with ours. What is exact there is float32, whose GEMMs run outside
the tensor cores: on a T4 8 TFLOP/s in place of 65. A residual stream in float32 beside float16
GEMMs would be faster, but generation and evaluation, which run the model's own code, would still
be in float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colab_qlora.errors import UserError

if TYPE_CHECKING:
    import torch

# model_type of the config -> what people call it
_TOO_WIDE = {"gemma3_text": "Gemma 3", "gemma3": "Gemma 3"}


def dtype_with_room(
    config: Any, asked: Any, resolved: torch.dtype, note: str | None
) -> tuple[torch.dtype, str | None]:
    """The dtype to compute in, and one line if it is not the one that was asked for.

    Args:
        config: the model's.
        asked: what the user passed as dtype.
        resolved, note: what `resolve_dtype` made of that.

    Raises:
        UserError: float16 was asked for, and this model's hidden states do not fit it.
    """
    import torch

    name = _TOO_WIDE.get(getattr(config, "model_type", ""))
    if name is None or resolved != torch.float16:
        return resolved, note
    if str(asked).lower().removeprefix("torch.") in ("float16", "fp16", "half"):
        raise UserError(
            f"the hidden states of {name} do not fit float16 (65,504): its loss would be NaN",
            got=f"dtype={asked}",
            allowed="dtype=None or 'float32'; 'bfloat16' from compute capability 8.0 on",
            do="Leave dtype at None, or take a model that was trained in float16's range",
        )
    line = f"the hidden states of {name} do not fit float16: computing in float32, which is slower"
    return torch.float32, line
