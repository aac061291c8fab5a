"""Milliseconds a token of decoding: transformers' generate, and the CUDA graph of `decoding/`.

    python -m benchmarks.decoding MODEL [--tokens 128] [--prompt 64] [--batches 1,4]
    python -m benchmarks.decoding --dry

The model is NF4 with LoRA of rank 16 on the seven linears of a layer; the prompts are random words
of one length, decoding is greedy and never ends early. Time of the prompt is not counted: a token
is the difference between an answer of `--tokens` and one of a single token, over the tokens
between. "generate" runs the model unfused over transformers' dynamic cache.

The floor is the time in which the GPU's memory delivers the weights that a token reads, at the rate
of a large copy. Greedy tokens of two programs part at the first near tie, and stay apart: what
agrees is what comes before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu_timing import Timer, pick_device, synchronize
from benchmarks.table import format_table, number

FIRST_WORD, WORDS = 5, 900
RUNS = 3
DRY = {"tokens": 12, "prompt": 6}


def main() -> None:
    """Measure both at each batch size, print the table and write the JSON."""
    options = _options()
    device = pick_device("benchmarks.decoding", is_dry=options.dry)
    with contextlib.ExitStack() as stack:
        if options.dry:
            from benchmarks.random_model import write_checkpoint
            from colab_qlora.decoding import eager_on_cpu

            options.model = stack.enter_context(tempfile.TemporaryDirectory())
            write_checkpoint(Path(options.model), "tiny")
            stack.enter_context(eager_on_cpu())
        rows = _measure_all(options, device)
    print(_table(rows))
    model = "dry" if options.dry else Path(options.model).name
    about = {"model": model, "tokens": options.tokens, "prompt": options.prompt}
    print(f"wrote {record.write(options.name or f'decoding_{model}', rows, **about)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a checkpoint")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--prompt", type=int, default=64, help="length of a prompt, in tokens")
    parser.add_argument("--batches", default="1,4", help="prompts that are decoded together")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    if options.dry == bool(options.model):
        parser.error("name one model, or pass --dry")
    for name, value in DRY.items() if options.dry else ():
        setattr(options, name, value)
    if options.tokens < 8:
        parser.error("--tokens is less than 8: nothing would be captured")
    return options


def _measure_all(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    from colab_qlora.decoding import free_decoding, why_not_graphed
    from colab_qlora.models.fuse import unfused

    model = _model(options, device)
    if reason := why_not_graphed(model):
        raise SystemExit(f"nothing to measure: {reason}")
    rate = Timer(device).copy_gb_s()
    floor_ms = weight_bytes(model) / rate / 1e6
    rows = []
    for batch in map(int, options.batches.split(",")):
        inputs = _prompts(batch, options.prompt, device)
        sides: dict[str, tuple[Callable[[int], torch.Tensor], Any]] = {
            "generate": (lambda n, given=inputs: _generate(model, given, n), unfused(model)),
            "graph": (lambda n, given=inputs: _decode(model, given, n), contextlib.nullcontext()),
        }
        expected = None
        for name, (write, context) in sides.items():
            free_decoding(model)
            with context:
                found, tokens = _measure(write, batch, options.tokens, device)
            expected = tokens if expected is None else expected
            row = {"implementation": name, "batch": batch, "floor_ms": floor_ms}
            rows.append(row | found | {"agreeing_share": agreement(expected, tokens)})
            print(rows[-1], flush=True)
    return rows


def _model(options: argparse.Namespace, device: torch.device) -> Any:
    """With adapters that say something, in the mode for inference."""
    from colab_qlora import FastLanguageModel

    dtype = "float32" if device.type == "cpu" else None
    model, _ = FastLanguageModel.from_pretrained(options.model, 2048, dtype=dtype)
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return FastLanguageModel.for_inference(model)


def _prompts(batch: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(
        FIRST_WORD, WORDS, (batch, length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _request(tokens: int) -> dict[str, Any]:
    """Greedy, whatever the model's own settings are, and past every end."""
    free = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
    ends = {"eos_token_id": None, "pad_token_id": 0}
    return {"max_new_tokens": tokens, "do_sample": False} | free | ends


def _generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    with torch.inference_mode(), _endless(model):
        output = model.generate(**inputs, **_request(tokens))
    return output[:, inputs["input_ids"].shape[1] :].cpu()


def _decode(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    from colab_qlora.decoding import decode, why_not_graphed

    with _endless(model):
        found = decode(model, inputs, _request(tokens))
    assert found is not None, why_not_graphed(model) or "the options were refused"
    return found


@contextlib.contextmanager
def _endless(model: Any) -> Any:
    """An option of None leaves the model's own end token in force, so that goes too."""
    config = model.generation_config
    found = config.eos_token_id
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = found


def _measure(
    write: Callable[[int], torch.Tensor], batch: int, tokens: int, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, written = _seconds(write, tokens, device)
    assert written.shape == (batch, tokens), written.shape
    longer = statistics.median(_seconds(write, tokens, device)[0] for _ in range(RUNS))
    shorter = statistics.median(_seconds(write, 1, device)[0] for _ in range(RUNS))
    ms = 1e3 * (longer - shorter) / (tokens - 1)
    found = {
        "ms_per_token": ms,
        "tokens_per_s": 1e3 * batch / ms,
        "first_token_ms": 1e3 * shorter,
        "first_answer_more_s": first - longer,
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found, written


def _seconds(
    write: Callable[[int], torch.Tensor], tokens: int, device: torch.device
) -> tuple[float, torch.Tensor]:
    synchronize(device)
    began = time.perf_counter()
    written = write(tokens)
    synchronize(device)
    return time.perf_counter() - began, written


def agreement(expected: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of the tokens, (rows, tokens), that come before a row's first difference."""
    same = (expected == tokens).long().cumprod(dim=1)
    return float(same.float().mean())


def weight_bytes(model: Any) -> int:
    """Bytes of all weights that a token's pass reads: all but the rows of an embedding table."""
    from colab_qlora.models.fuse import causal_model

    causal = causal_model(model)
    head = causal.get_output_embeddings().weight
    table = causal.get_input_embeddings().weight
    found = 0
    for parameter in causal.parameters():
        if parameter is table and table is not head:
            continue
        found += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            found += sum(scale.numel() * scale.element_size() for scale in scales)
    scales = [buffer for name, buffer in causal.named_buffers() if name.endswith("SCB")]
    return found + sum(scale.numel() * scale.element_size() for scale in scales)


def _table(rows: list[dict[str, Any]]) -> str:
    first = {row["batch"]: row["ms_per_token"] for row in rows if row["implementation"] != "graph"}
    head = ("implementation", "batch", "ms/token", "tokens/s", "times", "floor ms", "1st token ms")
    cells = [
        [
            row["implementation"],
            str(row["batch"]),
            number(row["ms_per_token"], 4),
            number(row["tokens_per_s"], 4),
            f"{first[row['batch']] / row['ms_per_token']:.2f}",
            number(row["floor_ms"], 3),
            number(row["first_token_ms"], 4),
            f"{row['first_answer_more_s']:.2f}",
            f"{row['agreeing_share']:.0%}",
            number(row["peak_gib"], 4) if row.get("peak_gib") else "-",
        ]
        for row in rows
    ]
    head = (*head, "1st answer +s", "agree", "GiB")
    return format_table(list(head), cells)


if __name__ == "__main__":
    main()
