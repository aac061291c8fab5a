"""Logits of a GGUF file in llama.cpp, asked in a process of its own: it may end with a signal.

    python -m benchmarks.llama_cpp_logits < asked.json

The binding is `llama-cpp-python`, in the environment that runs this.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800
# llama.cpp's number of the type float32: of keys and values, so that what differs is the weights
_F32 = 0
_SHORTEST_CONTEXT = 64


class NoLogits(Exception):
    """llama.cpp is not there, or it failed; the message is the reason."""


def version() -> str | None:
    """Of llama-cpp-python; None if it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    return importlib.metadata.version("llama_cpp_python")


def llama_cpp_logits(
    file: Path, prompts: Sequence[Sequence[int]], first: int, threads: int = 1
) -> list[np.ndarray]:
    """Logits of every position from `first` on, float32, by prompt (positions, vocabulary).

    Args:
        file: a GGUF file.
        prompts: token ids, each with more than `first` of them.
        first: positions before it are left out.
        threads: of the CPU.

    Raises:
        NoLogits: the binding is not installed, or its process ended otherwise than well.
    """
    if version() is None:
        raise NoLogits("llama-cpp-python is not installed")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "logits.npz"
        asked = {"file": str(file), "target": str(target), "first": first, "threads": threads}
        asked["prompts"] = [list(ids) for ids in prompts]
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.llama_cpp_logits"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            errors="replace",
            cwd=ROOT,
            timeout=TIMEOUT_S,
            check=False,
        )
        if ran.returncode:
            last = "; ".join(line.strip() for line in ran.stderr.splitlines()[-2:])
            raise NoLogits(f"llama.cpp ended with {ran.returncode}: {last}")
        with np.load(target) as found:
            return [found[str(number)] for number in range(len(prompts))]


def _answer(asked: dict[str, Any]) -> None:
    import llama_cpp

    longest = max(_SHORTEST_CONTEXT, *map(len, asked["prompts"]))
    llama = llama_cpp.Llama(
        asked["file"],
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        n_threads=asked["threads"],
        logits_all=True,
        verbose=False,
        type_k=_F32,
        type_v=_F32,
    )
    found = {}
    for number, ids in enumerate(asked["prompts"]):
        llama.reset()
        llama.eval(ids)
        found[str(number)] = np.array(llama.scores[asked["first"] : len(ids)], dtype=np.float32)
    np.savez(asked["target"], **found)


if __name__ == "__main__":
    _answer(json.load(sys.stdin))
