"""The rungs of the precision ladder, what a weight costs on each, and how many bytes may be spent.

    rung    bits a weight, and what they are
    nf4_64  4.127   NF4 in blocks of 64, absmax nested in 8 bits (blocks of 256): plain QLoRA
    nf4_32  4.254   the same in blocks of 32
    int8    8.0 + 32 / columns   one float32 scale a row, weights only
    16bit   16      float16 or bfloat16, as in the checkpoint

A budget is counted from what plain NF4 needs: all linears on nf4_64, embedding and head in 16 bit.
"+5%" adds 5 % of the linears' NF4 bytes; a number is GiB for all weights of the ladder together;
"auto" adds what the activation planner leaves unused. An embedding or head on int8 frees bytes for
other weights, so that more than 5 % may go into linears.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError

GIB = 2**30
NF4_64, NF4_32, INT8, SIXTEEN_BIT = "nf4_64", "nf4_32", "int8", "16bit"
# from the fewest bytes to the most
RUNGS = (NF4_64, NF4_32, INT8, SIXTEEN_BIT)
BLOCK_SIZES: Mapping[str, int] = {NF4_64: 64, NF4_32: 32}
ALLOWED = '"+0%", "+5%", "+10%" or another percentage, a number of GiB, or "auto"'
# the 16 bit of all linears are +288 %: more cannot be spent
MOST_PERCENT = 300
_NESTED_BLOCK, _SCALE_BYTES = 256, 4


def rung_bytes(shape: Sequence[int], rung: str) -> int:
    """Bytes of a weight on a rung.

    The two lookup tables that bitsandbytes keeps for each NF4 weight (1,092 bytes, whatever its
    size) are left out.

    Args:
        shape: (rows, columns); rows are output features, or the tokens of an embedding.
        rung: one of RUNGS.

    Raises:
        UserError: another rung.
    """
    rows, columns = shape
    numbers = rows * columns
    if rung in BLOCK_SIZES:
        # the nested absmax: a byte a block, and a float32 for each 256 of them
        blocks = -(-numbers // BLOCK_SIZES[rung])
        return -(-numbers // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK)
    if rung == INT8:
        return numbers + _SCALE_BYTES * rows
    if rung == SIXTEEN_BIT:
        return 2 * numbers
    raise UserError("unknown rung of precision", got=repr(rung), allowed=", ".join(RUNGS))


@dataclass(frozen=True)
class Budget:
    """A `quantization_budget` that was understood; one of the three is set.

    Attributes:
        share: of the linears' bytes in plain NF4, to be added to what plain NF4 needs.
        gib: for all weights of the ladder together.
        is_auto: what the activation planner leaves unused is added.
    """

    share: float | None = None
    gib: float | None = None
    is_auto: bool = False

    def cap_bytes(self, nf4_bytes: int, sixteen_bit_bytes: int = 0, spare_bytes: int = 0) -> int:
        """Most bytes that all weights of the ladder may have together.

        Args:
            nf4_bytes: of the weights that plain NF4 quantises, on nf4_64.
            sixteen_bit_bytes: of those that it leaves in 16 bit (embedding, head).
            spare_bytes: for "auto", what is left of the GPU's memory with plain NF4; below 0 counts
                as 0, since plain NF4 is the least.

        Raises:
            UserError: GiB that plain NF4 does not fit into.
        """
        plain_bytes = nf4_bytes + sixteen_bit_bytes
        if self.is_auto:
            return plain_bytes + max(0, int(spare_bytes))
        if self.share is not None:
            return plain_bytes + int(self.share * nf4_bytes)
        assert self.gib is not None
        cap = int(self.gib * GIB)
        if cap < plain_bytes:
            # rounded up, so that the number that is shown is one that works
            least = math.ceil(plain_bytes / GIB * 1000) / 1000
            raise UserError(
                "quantization_budget is below what plain NF4 needs",
                got=f"{self.gib:g} GiB",
                allowed=f"{least:.3f} GiB or more",
                do='Pass quantization_budget="+0%" for the least, or choose a smaller model',
            )
        return cap


def parse_budget(value: Any) -> Budget:
    """Understand a `quantization_budget`.

    Args:
        value: "+5%" (0 to 300), a number of GiB above 0, or "auto".

    Raises:
        UserError: anything else.
    """
    if isinstance(value, str):
        return _parse_words(value)
    # numpy's numbers are no int or float, and bool is an int
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise _not_understood(value)
    try:
        gib = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _not_understood(value) from error
    if not 0 < gib < math.inf:
        raise _not_understood(value)
    return Budget(gib=gib)


def _parse_words(value: str) -> Budget:
    words = value.strip().lower()
    if words == "auto":
        return Budget(is_auto=True)
    found = re.fullmatch(r"\+\s*([0-9]+(?:\.[0-9]+)?)\s*%", words)
    if not found:
        raise _not_understood(value)
    percent = float(found[1])
    if percent > MOST_PERCENT:
        raise UserError(
            "quantization_budget is more than 16-bit weights need",
            got=repr(value),
            allowed=f"+0% to +{MOST_PERCENT}% of plain NF4's bytes",
            do="Load the model in 16 bit with load_in_4bit=False",
        )
    return Budget(share=percent / 100)


def _not_understood(value: Any) -> UserError:
    return UserError(
        "quantization_budget is not understood",
        got=repr(value),
        allowed=ALLOWED,
        do='Pass "+5%" to spend 5 % more bytes than plain NF4',
    )
