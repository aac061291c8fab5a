"""Write GGUF files: header, metadata, then one tensor after the other.

Several files are written side by side, so that each tensor is merged once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from colab_qlora.export.gguf_architecture import Architecture
from colab_qlora.export.gguf_methods import GgufMethod
from colab_qlora.export.gguf_tensors import GgufTensor, encoded
from colab_qlora.export.gguf_tokenizer import Vocabulary


def write_gguf_files(
    files: Mapping[Path, GgufMethod],
    tensors: Sequence[GgufTensor],
    architecture: Architecture,
    vocabulary: Vocabulary,
    name: str,
) -> None:
    """Write one model in several quantisations.

    Args:
        files: where each goes; all of methods that are ours.
        tensors: of the model.
        architecture, vocabulary: what the metadata says.
        name: of the model, for `general.name`.

    Raises:
        OSError: a disk that is full, for instance; what was written stays for the caller to remove.
        UserError: a weight that cannot be read or held.
    """
    with ExitStack() as stack:
        writers = {}
        for file, method in files.items():
            writer = _opened(file, method, tensors, architecture, vocabulary, name)
            stack.callback(writer.close)
            writers[file] = writer
        for tensor in tensors:
            made = tensor.make()
            for file, method in files.items():
                _append(writers[file], tensor, made, method)


def _opened(
    file: Path,
    method: GgufMethod,
    tensors: Sequence[GgufTensor],
    architecture: Architecture,
    vocabulary: Vocabulary,
    name: str,
) -> Any:
    """A writer whose file has everything but the tensors' numbers."""
    import gguf

    writer: Any = gguf.GGUFWriter(file, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(method.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in architecture.values.items():
        full = f"{architecture.name}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    vocabulary.add_to(writer)
    for tensor in tensors:
        kind = tensor.type_in(method)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes_in(method), kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    return writer


def _append(writer: Any, tensor: GgufTensor, made: Any, method: GgufMethod) -> None:
    # by hand, as write_tensor_data wants the whole tensor at once, and a full disk by its number
    stream, size = writer.fout[0], 0
    for chunk in encoded(made, tensor.type_in(method), tensor.name):
        stream.write(chunk)
        size += len(chunk)
    assert size == tensor.bytes_in(method), f"{tensor.name}: {size} bytes"
    writer.write_padding(stream, size)
