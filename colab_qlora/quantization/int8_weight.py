"""int8 weights, symmetric, with one scale a row; activations stay as they are.

    codes = round(127 * w / absmax of the row),  w' = codes * absmax / 127

The error is uniform in +-absmax / 254, about 1 % of NF4's in the mean square for 4 more bits.
Codes and row absmax are laid out as bitsandbytes has them (`weight` int8 and `SCB` float32 of
Linear8bitLt). A float32 scale costs 2 bytes a row more than float16: 0.35 % of a weight with 576
columns, 0.05 % with 4096. In return no row underflows (float16 loses bits below an absmax of 6e-5)
and stock code reads the result. A row of zeros has absmax 0 and decodes to zeros.
"""

from __future__ import annotations

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.int8_decode import row_scales
from colab_qlora.quantization.row_chunks import row_slices

LARGEST_CODE = 127


def encode_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a weight row by row; beside the codes it takes a few rows in float32.

    Args:
        weight: floating point, shape (rows, columns).

    Returns:
        Codes, int8, shape (rows, columns), from -127 to 127; and the rows' absmax, float32, shape
        (rows,).

    Raises:
        UserError: not a matrix of floating-point numbers, or some are infinite or NaN.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(
            "int8 weights are made from a matrix of floating-point numbers",
            got=f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}",
            allowed="float16, bfloat16, float32 or float64 of shape (rows, columns)",
        )
    weight = weight.detach()
    absmax = torch.zeros(weight.shape[0], device=weight.device)
    for part in row_slices(*weight.shape):
        if weight.shape[1]:
            absmax[part] = weight[part].float().abs().amax(1)
    if not torch.isfinite(absmax).all():
        raise UserError(
            "a weight has numbers that are infinite or NaN",
            got=f"{int((~torch.isfinite(absmax)).sum())} such rows",
            do="Load the checkpoint again",
        )
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    divisors = absmax.masked_fill(absmax == 0, 1.0)[:, None]
    for part in row_slices(*weight.shape):
        # divided before it is multiplied: 127 / absmax would overflow for the smallest numbers
        codes[part] = torch.round(weight[part].float() / divisors[part] * LARGEST_CODE)
    return codes, absmax


def decode_int8(
    codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight that codes and absmax stand for, computed in float32, shape (rows, columns)."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scales = row_scales(absmax)[:, None]
    for part in row_slices(*codes.shape):
        weight[part] = codes[part].float() * scales[part]
    return weight
