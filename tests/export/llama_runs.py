"""What llama.cpp makes of GGUF files, asked in a process of its own: it may end with a signal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama-cpp-python, which is not installed",
)

# float32 keys and values, so that what differs is the file's weights
_PROGRAM = """
import json, sys
import numpy as np
import llama_cpp

asked = json.load(sys.stdin)
found, tokens = {}, {}
for file in asked["files"]:
    llama = llama_cpp.Llama(
        file, n_ctx=asked["context"], n_batch=256, n_ubatch=256, n_threads=1, logits_all=True,
        verbose=False, type_k=0, type_v=0, vocab_only=not asked["ids"],
    )
    tokens[file] = [llama.tokenize(text.encode(), True, True) for text in asked["texts"]]
    for number, ids in enumerate(asked["ids"]):
        llama.reset()
        llama.eval(ids)
        found[f"{number}:{file}"] = np.array(llama.scores[: len(ids)])
    llama.close()
np.savez(asked["target"], **found)
print(json.dumps(tokens))
"""


def run_llama_cpp(files, target, ids=(), texts=(), context=256):
    """Evaluate and tokenise.

    Args:
        files: GGUF files.
        target: an npz file to write.
        ids: token ids of prompts.
        texts: to be cut into tokens, with the tokenizer's own bos.
        context: length that llama.cpp prepares for, in tokens.

    Returns:
        (logits, tokens): by file, a list for each prompt of (tokens, vocabulary), and for each text
        of its ids.
    """
    names = [str(file) for file in files]
    asked = {"files": names, "ids": list(ids), "texts": list(texts), "target": str(target)}
    asked["context"] = context
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"llama.cpp ended with {ran.returncode}: {ran.stderr[-2000:]}"
    tokens = json.loads(ran.stdout.splitlines()[-1])
    with np.load(target) as found:
        logits = {
            name: [found[f"{number}:{name}"] for number in range(len(asked["ids"]))]
            for name in names
        }
    return list(logits.values()), [tokens[name] for name in names]
