"""What a base model of few bits loses, by module, and where bytes buy most of it back.

budget.py                 how many bytes there are
activation_statistics.py  what the inputs of each linear look like on the user's rows
prices.py                 what each precision of each module costs in loss
ladder.py                 which precision each module gets, under the cap
int8_weight.py            weights of 8 bits, one scale a row
int8_modules.py           linears and embeddings that hold such weights
scale_search.py           NF4 whose block scales are searched for; scale_search_reference.py
nf4_format.py             codes and scales as a 4-bit weight of bitsandbytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

if TYPE_CHECKING:
    from colab_qlora.quantization.nf4_format import (
        NestedAbsmax,
        nest_absmax,
        nf4_weight,
        pack_codes,
    )
    from colab_qlora.quantization.scale_search import quantize_nf4

# public name -> the module that defines it; scale_search, the function, is named as its module
_EXPORTS = {
    "NestedAbsmax": "nf4_format",
    "nest_absmax": "nf4_format",
    "nf4_weight": "nf4_format",
    "pack_codes": "nf4_format",
    "quantize_nf4": "scale_search",
}

__all__ = [
    "NestedAbsmax",
    "nest_absmax",
    "nf4_weight",
    "pack_codes",
    "quantize_nf4",
]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
