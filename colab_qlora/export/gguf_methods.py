"""The quantisations of GGUF files: names, who makes them, and bytes a weight.

Written here, with the `gguf` package            f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0
Made from such a file by llama.cpp's quantizer   q2_k to q6_k, in which some tensors get more bits

Formats: https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError

# a name, several of them, or None
Wanted = str | Iterable[str] | None
DEFAULT = "q8_0"
# what tutorials call them: name -> method
ALIASES = {
    "not_quantized": "f16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}


@dataclass(frozen=True)
class GgufMethod:
    """One quantisation.

    Attributes:
        name: in lower case.
        file_type: number in gguf's `LlamaFileType`, the same as llama.cpp's `llama_ftype`.
        bits: of a weight; of llama.cpp's mixtures, those of an 8B Llama.
        matrix: gguf's name of the type of the matrices; None where llama.cpp chooses.
        table: of the embedding and the output head, which lose most in few bits.
    """

    name: str
    file_type: int
    bits: float
    matrix: str | None = None
    table: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is written without llama.cpp."""
        return self.matrix is not None

    @property
    def label(self) -> str:
        """As in file names."""
        return self.name.upper()


_METHODS = (
    GgufMethod("f32", 0, 32, "F32", "F32"),
    GgufMethod("f16", 1, 16, "F16", "F16"),
    GgufMethod("bf16", 32, 16, "BF16", "BF16"),
    GgufMethod("q8_0", 7, 8.5, "Q8_0", "Q8_0"),
    GgufMethod("q5_1", 9, 6, "Q5_1", "Q8_0"),
    GgufMethod("q5_0", 8, 5.5, "Q5_0", "Q8_0"),
    GgufMethod("q4_1", 3, 5, "Q4_1", "Q8_0"),
    GgufMethod("q4_0", 2, 4.5, "Q4_0", "Q8_0"),
    GgufMethod("q6_k", 18, 6.57),
    GgufMethod("q5_k_m", 17, 5.7),
    GgufMethod("q5_k_s", 16, 5.57),
    GgufMethod("q4_k_m", 15, 4.9),
    GgufMethod("q4_k_s", 14, 4.67),
    GgufMethod("q3_k_l", 13, 4.3),
    GgufMethod("q3_k_m", 12, 4),
    GgufMethod("q3_k_s", 11, 3.65),
    GgufMethod("q2_k", 10, 3.2),
)
METHODS = {method.name: method for method in _METHODS}
OURS = tuple(method.name for method in _METHODS if method.is_ours)


def find_methods(quantization_method: Wanted, quantization_type: Wanted = None) -> list[GgufMethod]:
    """The methods of that name, or of a list of names, each once and in order.

    Args:
        quantization_method: None for `DEFAULT`.
        quantization_type: another name of quantization_method in tutorials; one of them is None.

    Raises:
        UserError: an unknown name, or none at all, or both arguments with different values.
    """
    if quantization_type is not None:
        if quantization_method not in (None, quantization_type):
            raise UserError(
                "quantization_method and quantization_type are both set",
                got=f"{quantization_method!r} and {quantization_type!r}",
                allowed="one of them; they mean the same",
            )
        quantization_method = quantization_type
    names = _as_list(DEFAULT if quantization_method is None else quantization_method)
    found: dict[str, GgufMethod] = {}
    for name in names:
        plain = name.lower().replace("-", "_") if isinstance(name, str) else name
        method = METHODS.get(ALIASES.get(plain, plain))
        if method is None:
            raise _unknown(name)
        found[method.name] = method
    if not found:
        raise _unknown("nothing")
    return list(found.values())


def _as_list(names: Any) -> list[Any]:
    is_list = isinstance(names, Iterable) and not isinstance(names, str)
    return list(names) if is_list else [names]


def _unknown(name: object) -> UserError:
    return UserError(
        "quantization_method is unknown",
        got=repr(name),
        allowed=f"{', '.join(METHODS)}; or {', '.join(ALIASES)}; or a list of these",
        do='Pass quantization_method="q8_0", or "q4_k_m" where llama-cpp-python is installed',
    )
