"""Seconds and memory of saving a trained model: adapter, merged folders, GGUF files.

    python -m benchmarks.export_cost MODEL_FOLDER [--methods q8_0,q4_0] [--out FOLDER] [--dry]

The model is loaded in NF4 and given fresh adapters whose second halves are filled, so that merging
has something to add, and a tokenizer of single bytes, since GGUF has no word for the one of random
checkpoints. Host memory is what the process holds of its own beyond what it held before
the save (RssAnon of /proc/self/status, seen every 20 ms): pages of mapped files, which the system
takes back when it wants them, do not count.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.random_model import write_checkpoint
from benchmarks.table import format_table, number
from colab_qlora import FastLanguageModel

_WAIT_S = 0.02
_GIGABYTE = 1e9


def main() -> None:
    """Save in every form; print the table and write the JSON."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        folder = options.model
        if options.dry:
            folder = Path(scratch) / "tiny"
            write_checkpoint(folder, "tiny")
        rows = measure(folder, options.methods.split(","), Path(scratch))
    head = ["saved as", "s", "GB on disk", "GB of host memory", "GB of GPU memory"]
    keys = ("seconds", "disk_gb", "host_gb", "gpu_gb")
    print(format_table(head, [[r["form"], *(number(r[key], 3) for key in keys)] for r in rows]))
    name = f"export_cost_{'dry' if options.dry else options.model.name}"
    print(f"wrote {record.write(name, rows, model=str(folder.name))}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="folder of a 16-bit checkpoint")
    parser.add_argument("--methods", default="q8_0,q4_0", help="of GGUF files")
    parser.add_argument("--out", help="a folder on the disk to write to; default: the system's")
    parser.add_argument("--dry", action="store_true", help="a tiny model")
    options = parser.parse_args()
    if options.dry == bool(options.model):
        parser.error("name one model, or pass --dry")
    return options


def measure(model_folder: Path, methods: list[str], scratch: Path) -> list[dict[str, Any]]:
    """A row for each form; what was saved is removed before the next."""
    model, _ = FastLanguageModel.from_pretrained(str(model_folder), max_seq_length=512)
    tokenizer = _byte_tokenizer()
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    forms: dict[str, Callable[[str], Any]] = {
        "adapter": lambda out: model.save_pretrained(out),
        "merged_16bit": lambda out: model.save_pretrained_merged(out, tokenizer),
        "merged_4bit": lambda out: model.save_pretrained_merged(
            out, tokenizer, save_method="merged_4bit"
        ),
    }
    for method in methods:
        forms[f"GGUF {method}"] = lambda out, method=method: model.save_pretrained_gguf(
            out, tokenizer, quantization_method=method
        )
    rows = []
    for form, save in forms.items():
        row = _cost(form, save, scratch / "saved")
        print(row, flush=True)
        rows.append(row)
    return rows


def _byte_tokenizer() -> Any:
    """Byte-level BPE without a merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    roles = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def _cost(form: str, save: Callable[[str], Any], out: Path) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    before_gpu = 0
    if has_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_gpu = torch.cuda.memory_allocated()
    began = time.monotonic()
    with _watched_memory() as peak:
        save(str(out))
    seconds = time.monotonic() - began
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {
        "form": form,
        "seconds": seconds,
        "disk_gb": disk / _GIGABYTE,
        "host_gb": peak[0] / _GIGABYTE,
        "gpu_gb": (torch.cuda.max_memory_allocated() - before_gpu) / _GIGABYTE if has_gpu else None,
    }


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """Yields one number, there when the block has ended: most bytes beyond those at its start."""
    start, peak, stop = _own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(_WAIT_S):
            peak[0] = max(peak[0], _own_bytes() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system's /proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
