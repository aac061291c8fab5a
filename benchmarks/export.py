"""How near exported models are to the trained one: merged folders, and GGUF files.

    python -m benchmarks.export [--model embedded] [--prompts 50] [--methods f32,q8_0] [--dry]

Adapters are trained over NF4 for a few steps. Every model is computed in float32, whatever its
weights are held in, at the same positions: of prompts that were not trained on, those behind what
all prompts have in common. The truth is the adapters beside the 16-bit checkpoint, by stock
transformers and PEFT; merged models are also held against the adapters beside NF4, as trained.

A GGUF file is read by llama.cpp where llama-cpp-python is installed, whose products on a CPU round
what comes in to 16 or 8 bits too, and by transformers, which decodes it: the file's weights alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.export_logits import Logits, Prompts, compare, load_float32, model_logits
from benchmarks.llama_cpp_logits import NoLogits, llama_cpp_logits, version
from benchmarks.quantization import LENGTH, train
from benchmarks.quantization_methods import METHODS, Built, Request
from benchmarks.table import exponent, format_table, number
from colab_qlora import FastLanguageModel, UserError
from colab_qlora.data import format_chat, read_records
from colab_qlora.models.embedded import EMBEDDED_NAME, embedded_model_path
from colab_qlora.samples import sample_path

MERGES = ("merged_16bit", "merged_4bit")
GGUF = "f32,f16,bf16,q8_0,q6_k,q5_1,q5_0,q5_k_m,q4_1,q4_k_m,q4_0,q2_k"
# of the training sample; the others are asked
TRAINED_ROWS = 200
_MEGABYTE = 1e6


def main() -> None:
    """Train, export, compare; print both tables and write the JSON."""
    options = _options()
    merged, gguf, about = measure(options)
    print(_merge_table(merged))
    print(_gguf_table(gguf))
    name = "dry" if options.dry else Path(options.model).name
    path = record.write(f"export_{name}", gguf, merged=merged, options=vars(options), **about)
    print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_NAME)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--methods", default=GGUF, help="of GGUF files, with commas between")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", help="what a merged folder is rounded to")
    parser.add_argument("--dry", action="store_true", help="three steps and three prompts")
    options = parser.parse_args()
    if options.dry:
        # the first step's rate is 0, and an adapter that adds nothing would show nothing
        options.steps, options.batch, options.prompts = 3, 2, 3
    most = len(_records_to_ask())
    if not 2 <= options.prompts <= most:
        parser.error(f"--prompts is {options.prompts}; there are {most}, and it takes two")
    return options


def measure(
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Rows of the merge table, rows of the GGUF table, and what both depend on."""
    rows = format_chat(read_records(sample_path("train.jsonl"))[:TRAINED_ROWS])
    built = METHODS["nf4"](Request(options.model, LENGTH, options.dtype, rows, 1))
    prompts = Prompts.of(built.tokenizer, format_chat(_records_to_ask()[: options.prompts]))
    train(built, rows, options, seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        built.model.save_pretrained(str(adapter))
        unmerged = _beside_16_bit(options.model, adapter)
        truth = model_logits(unmerged, prompts)
        with unmerged.disable_adapter():
            base = model_logits(unmerged, prompts)
        del unmerged
        trained, _ = FastLanguageModel.from_pretrained(str(adapter), LENGTH, "float32")
        as_trained = model_logits(trained, prompts)
        del trained
        # where a form is as far away as this, training might as well not have been
        merged = [_unmerged("without adapters", base, truth, as_trained)]
        merged.append(_unmerged("over NF4, as trained", as_trained, truth, None))
        for method in MERGES:
            merged.append(_merge(built, method, Path(scratch), prompts, (truth, as_trained)))
    gguf = []
    for method in options.methods.split(","):
        gguf += _gguf(built, method, prompts, truth)
    return merged, gguf, {"positions": prompts.positions, "llama_cpp_python": version()}


def _records_to_ask() -> list[dict[str, Any]]:
    records = read_records(sample_path("eval.jsonl"))
    return [*records, *read_records(sample_path("train.jsonl"))[TRAINED_ROWS:]]


def _beside_16_bit(name: str, adapter: Path) -> Any:
    """The unmerged model: adapters beside the checkpoint's weights, without our layers."""
    from peft import PeftModel

    base = str(embedded_model_path()) if name == EMBEDDED_NAME else name
    return PeftModel.from_pretrained(load_float32(base), str(adapter))


def _unmerged(name: str, found: Logits, truth: Logits, trained: Logits | None) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "to_16_bit": compare(truth, found)}
    return row if trained is None else row | {"to_as_trained": compare(trained, found)}


def _merge(
    built: Built, method: str, scratch: Path, prompts: Prompts, references: tuple[Logits, Logits]
) -> dict[str, Any]:
    """One row of the merge table."""
    began = time.perf_counter()
    folder = built.model.save_pretrained_merged(scratch / method, built.tokenizer, method)
    seconds = time.perf_counter() - began
    model = load_float32(folder)
    found = model_logits(model, prompts)
    del model
    gc.collect()
    return {
        "model": method,
        "to_16_bit": compare(references[0], found),
        "to_as_trained": compare(references[1], found),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "export_s": round(seconds, 2),
    }


def _gguf(built: Built, method: str, prompts: Prompts, truth: Logits) -> list[dict[str, Any]]:
    """The rows of one method: a row for each program that reads the file."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try:
            [file] = built.model.save_pretrained_gguf(folder, built.tokenizer, method)
        except UserError as error:
            return [{"method": method, "read_by": "-", "skipped": str(error)}]
        seconds = time.perf_counter() - began
        about = {"method": method, "bytes": file.stat().st_size, "export_s": round(seconds, 2)}
        rows = []
        for reader, read in (("llama.cpp", _by_llama_cpp), ("transformers", _by_transformers)):
            row = {**about, "read_by": reader}
            try:
                row |= compare(truth, read(file, prompts))
            except NoLogits as error:
                row["skipped"] = str(error)
            rows.append(row)
            print(row, flush=True)
        return rows


def _by_llama_cpp(file: Path, prompts: Prompts) -> Logits:
    return llama_cpp_logits(file, prompts.ids, prompts.first, torch.get_num_threads())


def _by_transformers(file: Path, prompts: Prompts) -> Logits:
    try:
        model = load_float32(file.parent, gguf_file=file.name)
    # which types and architectures its reader knows depends on the release
    except (ValueError, NotImplementedError, KeyError) as error:
        raise NoLogits(f"transformers cannot read it: {error}") from error
    return model_logits(model, prompts)


def _merge_table(rows: list[dict[str, Any]]) -> str:
    further = ["worst prompt", "largest", "same first"]
    head = ["model", "KL to 16 bit", *further, "KL to as trained", *further, "MB", "s"]
    cells = []
    for row in rows:
        line = [row["model"]]
        for name in ("to_16_bit", "to_as_trained"):
            line += _divergence(row.get(name))
        line += [number(row["bytes"] / _MEGABYTE, 4) if "bytes" in row else "-"]
        cells.append([*line, number(row.get("export_s"))])
    return format_table(head, cells)


def _divergence(found: dict[str, float] | None) -> list[str]:
    if found is None:
        return ["-"] * 4
    kls = [exponent(found[name]) for name in ("mean_kl", "prompt_kl", "max_kl")]
    return [*kls, f"{found['same_first']:.1%}"]


def _gguf_table(rows: list[dict[str, Any]]) -> str:
    head = ["method", "read by", "mean KL", "largest", "mean logit", "largest"]
    head += ["same first", "MB", "s"]
    cells, reasons = [], []
    for row in rows:
        line = [row["method"], row["read_by"]]
        if "skipped" in row:
            line += ["-"] * 5
            reasons.append(f"{row['method']}, read by {row['read_by']}: skipped: {row['skipped']}")
        else:
            names = ("mean_kl", "max_kl", "mean_logit", "max_logit")
            line += [*(exponent(row[name]) for name in names), f"{row['same_first']:.1%}"]
        line += [number(row["bytes"] / _MEGABYTE, 4) if "bytes" in row else "-"]
        cells.append([*line, number(row.get("export_s"))])
    return "\n".join([format_table(head, cells, left=("read by",)), *reasons])


if __name__ == "__main__":
    main()
