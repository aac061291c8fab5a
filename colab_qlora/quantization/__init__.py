"""What a base model of few bits loses, by module, and where bytes buy most of it back.

What is measured
    calibration.py            the user's rows as a few micro-batches
    activation_statistics.py  what the inputs of each linear look like on them
    prices.py                 what each precision of each module costs in loss; rung_prices.py
What is chosen
    budget.py                 how many bytes there are
    ladder.py                 which precision each module gets, under the cap; precision_map.py
What is held
    scale_search.py           NF4 whose block scales are searched for; scale_search_reference.py
    nf4_format.py             codes and scales as a 4-bit weight of bitsandbytes
    int8_weight.py            weights of 8 bits, one scale a row; int8_modules.py
    quantised_weights.py      which weights are codes, and what they are worth
    weight_source.py          the 16-bit matrices of a checkpoint, one at a time; own_source.py
    placing.py                a weight on another rung, in place
    dynamic.py                all of it for one model, and what the model carries along
    map_file.py               the file beside an adapter that says what stands where
While it trains
    schedule.py               when prices are measured again and what moves
    live_prices.py            measuring in the middle of a run
    remaking.py               making weights anew, demoted ones first
What comes out
    report.py                 table, and report_picture.py
    merging.py                16-bit source plus adapters; merged_weights.py, merge_checks.py
    adapter_starts.py         what an adapter's start did to its base
    stock_checkpoint.py       a folder that stock transformers reads; shard_writer.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

if TYPE_CHECKING:
    from colab_qlora.quantization.merging import merge_16_bit, save_merged_16_bit
    from colab_qlora.quantization.nf4_format import (
        NestedAbsmax,
        nest_absmax,
        nf4_weight,
        pack_codes,
    )
    from colab_qlora.quantization.scale_search import quantize_nf4
    from colab_qlora.quantization.schedule import ScheduleSettings
    from colab_qlora.quantization.stock_checkpoint import save_stock_checkpoint

# public name -> the module that defines it; scale_search, the function, is named as its module
_EXPORTS = {
    "NestedAbsmax": "nf4_format",
    "ScheduleSettings": "schedule",
    "merge_16_bit": "merging",
    "nest_absmax": "nf4_format",
    "nf4_weight": "nf4_format",
    "pack_codes": "nf4_format",
    "quantize_nf4": "scale_search",
    "save_merged_16_bit": "merging",
    "save_stock_checkpoint": "stock_checkpoint",
}

__all__ = [
    "NestedAbsmax",
    "ScheduleSettings",
    "merge_16_bit",
    "nest_absmax",
    "nf4_weight",
    "pack_codes",
    "quantize_nf4",
    "save_merged_16_bit",
    "save_stock_checkpoint",
]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
