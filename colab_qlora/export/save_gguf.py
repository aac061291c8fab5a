"""`save_pretrained_gguf`: the merged model as files that llama.cpp and Ollama run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.export.base_weights import merged_weights
from colab_qlora.export.gguf_architecture import Architecture, read_architecture
from colab_qlora.export.gguf_file import write_gguf_files
from colab_qlora.export.gguf_methods import METHODS, GgufMethod, Wanted, find_methods
from colab_qlora.export.gguf_tensors import GgufTensor, gguf_tensors
from colab_qlora.export.gguf_tokenizer import Vocabulary, read_vocabulary
from colab_qlora.export.llama_cpp_quantizer import load_llama_cpp, quantize_file
from colab_qlora.export.ollama import modelfile
from colab_qlora.export.options import MEMORY_SHARE, check_options, shard_bytes
from colab_qlora.models.embedded import EMBEDDED_NAME, FOLDER_NAME
from colab_qlora.models.loading import load_tokenizer
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.whole_files import whole_files

_MODELFILE = "Modelfile"
_METADATA_BYTES = 32 * 2**20
# what llama.cpp's quantizer starts from, best first
_SOURCES = ("f32", "f16", "bf16")


def save_pretrained_gguf(
    model: Any,
    save_directory: str | PathLike[str],
    tokenizer: Any = None,
    quantization_method: Wanted = None,
    *,
    quantization_type: Wanted = None,
    base_model: str | None = None,
    maximum_memory_usage: float = MEMORY_SHARE,
    push_to_hub: bool = False,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> list[Path]:
    """Write the trained model as GGUF files with a Modelfile for Ollama, all of them or none.

    The adapters are added to the 16-bit checkpoint in float32, tensor by tensor, and rounded once.

    Args:
        model: what `get_peft_model` gave, or a base without adapters; it stays as it is.
        save_directory: is made if it is not there; files of the same names are replaced when the
            new ones are whole. With push_to_hub, the repository's name as well.
        tokenizer: goes into the files with its chat template; None for the base model's.
        quantization_method: of `gguf_methods.METHODS`, or a list of several: f32, f16, bf16, q8_0
            (8.5 bits a weight), q5_1, q5_0, q4_1, q4_0 (4.5); with llama-cpp-python installed also
            q6_k, q5_k_m, q4_k_m (4.9), q3_k_m, q2_k and their kin. None for q8_0.
        quantization_type: another name of quantization_method.
        base_model: as of `save_pretrained_merged`.
        maximum_memory_usage: share of the free host memory, above 0 and at most 1; files are
            written one tensor at a time, which needs less in any case.
        push_to_hub: upload the folder too.
        token, private: as of `save_pretrained_merged`.
        **options: of tutorials; which of them have no effect is said.

    Returns:
        The GGUF files, in the order of the methods.

    Raises:
        UserError: an unknown method, one that needs llama.cpp without it, an architecture or
            tokenizer that cannot be written, or a disk that is too small. Nothing that was written
            remains then.

    Example:
        >>> save_pretrained_gguf(model, "model", tokenizer, quantization_method=["f16", "q8_0"])
    """
    methods = find_methods(quantization_method, quantization_type)
    repository = None
    if push_to_hub:
        from colab_qlora.export.hub import open_repository

        repository, options = open_repository(str(save_directory), token, private, options)
    check_options(options)
    # checked, as everywhere; one tensor at a time needs less than any share
    shard_bytes(maximum_memory_usage, None)
    foreign = [method for method in methods if not method.is_ours]
    llama_cpp = load_llama_cpp(foreign) if foreign else None
    _check_gguf()
    merge = merged_weights(model, base_model, token)
    content = _content(merge, _model_name(model), _tokenizer_of(model, tokenizer))
    names = content.save(save_directory, methods, llama_cpp)
    folder = Path(save_directory).expanduser()
    if repository is not None:
        repository.upload(folder, [*names, _MODELFILE])
    return [folder / name for name in names]


@dataclass(frozen=True)
class _Content:
    """What the files of one model hold, whatever their method."""

    name: str
    architecture: Architecture
    tensors: list[GgufTensor]
    vocabulary: Vocabulary
    tokenizer: Any

    def file_name(self, method: GgufMethod) -> str:
        return f"{self.name}.{method.label}.gguf"

    def bytes_in(self, methods: Sequence[GgufMethod]) -> int:
        """Of all files together."""
        sizes = (sum(tensor.bytes_in(method) for tensor in self.tensors) for method in methods)
        return sum(_METADATA_BYTES + size for size in sizes)

    def save(
        self, folder: str | PathLike[str], methods: Sequence[GgufMethod], llama_cpp: Any
    ) -> list[str]:
        """Write the files and the Modelfile, all or none; gives the files' names."""
        ours = [method for method in methods if method.is_ours]
        foreign = [method for method in methods if not method.is_ours]
        source = _source(ours)
        if foreign and source not in ours:
            ours.append(source)
        with whole_files(folder, self.bytes_in([*ours, *foreign])) as partial:
            self.write(partial, ours)
            for method in foreign:
                begun, made = (partial / self.file_name(which) for which in (source, method))
                quantize_file(llama_cpp, begun, made, method)
            if source not in methods:
                (partial / self.file_name(source)).unlink(missing_ok=True)
            text = modelfile(self.file_name(methods[0]), self.tokenizer)
            (partial / _MODELFILE).write_text(text, encoding="utf-8")
        return [self.file_name(method) for method in methods]

    def write(self, folder: Path, methods: Sequence[GgufMethod]) -> None:
        files = {folder / self.file_name(method): method for method in methods}
        write_gguf_files(files, self.tensors, self.architecture, self.vocabulary, self.name)


def _content(merge: MergedWeights, name: str, tokenizer: Any) -> _Content:
    """Everything that can be refused is refused here, before a byte is written."""
    # one rounding, to the file's own type
    merge.dtype = torch.float32
    tables = [m.shape[0] for m in merge.parts.matrices if m.name.endswith("embed_tokens")]
    rows = tables[0] if tables else merge.causal.config.vocab_size
    is_tied = merge.parts.is_tied(merge.causal) and merge.causal.config.tie_word_embeddings
    architecture = read_architecture(merge.causal.config, rows, is_tied)
    tensors = gguf_tensors(merge, architecture)
    generation = getattr(merge.causal, "generation_config", None)
    vocabulary = read_vocabulary(tokenizer, rows, generation)
    for note in architecture.notes:
        print(f"colab_qlora: {note}.")
    return _Content(name, architecture, tensors, vocabulary, tokenizer)


def _source(own: Sequence[GgufMethod]) -> GgufMethod:
    """What llama.cpp's quantizer starts from: a file that is wanted anyway, or f16."""
    for name in _SOURCES:
        if METHODS[name] in own:
            return METHODS[name]
    return METHODS["f16"]


def _tokenizer_of(model: Any, tokenizer: Any) -> Any:
    if tokenizer is not None:
        return tokenizer
    settings = settings_of(model)
    name = settings.model_name if settings is not None else model.config._name_or_path
    return load_tokenizer(name)


def _model_name(model: Any) -> str:
    """The last part of a hub id or a folder, without what was said about another quantisation."""
    settings = settings_of(model)
    name = settings.model_name if settings is not None else model.config._name_or_path
    if name == EMBEDDED_NAME:
        name = FOLDER_NAME
    return re.sub(r"[-_](unsloth-)?bnb-(4|8)bit$", "", Path(str(name)).name) or "model"


def _check_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            "GGUF files are written with the gguf package, which is not there",
            got=str(error),
            do="Run pip install gguf",
        ) from error
