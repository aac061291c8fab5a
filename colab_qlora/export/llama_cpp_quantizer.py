"""llama.cpp's own quantizer, through its Python binding, where that is installed."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.export.gguf_methods import OURS, GgufMethod


def load_llama_cpp(methods: Sequence[GgufMethod]) -> Any:
    """The module llama_cpp.

    Args:
        methods: that need it, for the message.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        names = ", ".join(method.name for method in methods)
        verb = "is" if len(methods) == 1 else "are"
        raise UserError(
            f"{names} {verb} made by llama.cpp's quantizer, whose Python binding is not there",
            got=next(iter(str(error).splitlines()), type(error).__name__),
            allowed=f"{', '.join(OURS)} without it",
            do="Run pip install llama-cpp-python (it is compiled, 10 to 25 minutes), or pass "
            'quantization_method="q8_0"',
        ) from error


def quantize_file(llama_cpp: Any, source: Path, target: Path, method: GgufMethod) -> None:
    """Make a file of a method from one in 16 or 32 bits, on all cores.

    Args:
        llama_cpp: the module.
        source, target: GGUF files; the second does not exist yet.
        method: one that is not ours.

    Raises:
        UserError: llama.cpp refuses; its reason is in the message.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = method.file_type
    with _listening(llama_cpp) as said:
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), parameters
        )
    text = "".join(said)
    if failed or not target.is_file():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise UserError(
            f"llama.cpp could not make {method.name}",
            got=lines[-1] if lines else f"code {failed}",
            do="Check that the disk has room, or take another method; what was written is removed",
        )
    others = text.count("falling back to")
    if others:
        print(
            f"colab_qlora: {method.name}: {others} matrices have rows that do not divide by 256, "
            "and llama.cpp gave them a type of more bits."
        )


@contextmanager
def _listening(llama_cpp: Any) -> Iterator[list[str]]:
    """Collect what llama.cpp says, a line for each tensor; its logging is as before afterwards."""
    said: list[str] = []
    if not hasattr(llama_cpp, "llama_log_get"):
        # an older binding writes to stderr
        yield said
        return

    def hear(level: int, text: bytes, data: Any) -> None:
        said.append(text.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(hear)
    before, its_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(its_data))
    llama_cpp.llama_log_set(callback, None)
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(before, its_data)
