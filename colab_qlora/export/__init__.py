"""What a trained model is saved as: an adapter, merged weights, GGUF files; and where to.

As a folder
    merged.py               save_pretrained_merged: lora, merged_16bit, merged_4bit
    merged_4bit.py          the last of these, matrix after matrix
    base_weights.py         which 16-bit weights adapters are added to
For llama.cpp and Ollama
    save_gguf.py            save_pretrained_gguf
    gguf_methods.py         names of the quantisations; llama_cpp_quantizer.py makes some of them
    gguf_architecture.py    what a file says about a model; gguf_rope.py about its positions
    gguf_tensors.py         its tensors
    gguf_tokenizer.py       what it says about a tokenizer, pre_tokenizers.py how that splits a text
    gguf_file.py            writing it
    ollama.py               the Modelfile; chat_pieces.py takes chat templates apart for it
To a model hub
    hub.py                  push_to_hub, push_to_hub_merged, push_to_hub_gguf
    hub_token.py            where the token comes from; hub_errors.py what a refusal means
For all of them
    options.py              keyword arguments of tutorials
    methods.py              the functions as methods of one model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

if TYPE_CHECKING:
    from colab_qlora.export.hub import push_to_hub, push_to_hub_gguf, push_to_hub_merged
    from colab_qlora.export.merged import save_pretrained_merged
    from colab_qlora.export.methods import bind_methods
    from colab_qlora.export.save_gguf import save_pretrained_gguf

# public name -> the module that defines it
_EXPORTS = {
    "bind_methods": "methods",
    "push_to_hub": "hub",
    "push_to_hub_gguf": "hub",
    "push_to_hub_merged": "hub",
    "save_pretrained_gguf": "save_gguf",
    "save_pretrained_merged": "merged",
}

__all__ = [
    "bind_methods",
    "push_to_hub",
    "push_to_hub_gguf",
    "push_to_hub_merged",
    "save_pretrained_gguf",
    "save_pretrained_merged",
]

__getattr__, __dir__ = lazy_names(__name__, _EXPORTS, __all__)
