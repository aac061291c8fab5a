"""TRL's DPO, ORPO and GRPO over fused layers and over the model's own code: are the losses equal?

    python -m benchmarks.preference [--model embedded] [--trainers dpo,orpo,grpo] [--steps 3]
    python -m benchmarks.preference --dry

Both sides have the same float32 weights, adapters, rows and seed, and GRPO draws its own answers.
The pairs are rows of the training sample, with another row's answer as the rejected one. What is
left over is rounding, which Adam makes larger where a gradient is small.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.random_model import write_checkpoint
from benchmarks.table import exponent, format_table
from colab_qlora import FastLanguageModel
from colab_qlora.data import read_records
from colab_qlora.models.embedded import EMBEDDED_NAME
from colab_qlora.models.fuse import fused_layers, state_of
from colab_qlora.samples import sample_path

LENGTH = 256
PAIRS = 24
# how the fused side recomputes; the other side keeps everything
MODES: tuple[bool | str, ...] = (False, True, "smart")
ANSWERS, ANSWER_TOKENS = 4, 8


def main() -> None:
    """Run each trainer on both sides, print the table and write the JSON."""
    options = _options()
    if options.dry:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), "tiny")
            rows = measure(folder, options, word_pairs())
    else:
        rows = measure(options.model, options, sample_pairs())
    print(_table(rows))
    name = f"preference_{'dry' if options.dry else Path(options.model).name}"
    print(f"wrote {record.write(name, rows, options=vars(options))}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_NAME)
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="a random model of two layers")
    options = parser.parse_args()
    unknown = set(options.trainers.split(",")) - TRAINERS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TRAINERS)}")
    return options


def sample_pairs() -> list[dict[str, str]]:
    """Prompts with the answer of their own row, and that of another."""
    records = read_records(sample_path("train.jsonl"))[: PAIRS + 1]
    return [
        {"prompt": row["instruction"], "chosen": " " + row["output"], "rejected": " " + other}
        for row, other in zip(records, [r["output"] for r in records[1:]], strict=False)
    ]


def word_pairs() -> list[dict[str, str]]:
    """The same for the vocabulary of `benchmarks.random_model`."""
    return [
        {
            "prompt": f"t{10 + i} t{40 + i} t{70 + i}",
            "chosen": f" t{100 + i} t{101 + i}",
            "rejected": f" t{200 + i} t{90 - i} t{300 + i}",
        }
        for i in range(PAIRS)
    ]


def measure(
    model: str, options: argparse.Namespace, pairs: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """A row for each trainer and way to recompute; one alone for a trainer that TRL has not."""
    rows = []
    for name in options.trainers.split(","):
        run = functools.partial(_run, model, name, pairs, options.steps)
        try:
            stock = run(is_fused=False)
        except ImportError as error:
            rows.append({"trainer": name, "skipped": str(error)})
            continue
        for mode in MODES:
            row = {"trainer": name, "checkpointing": mode}
            rows.append(row | _difference(run(is_fused=True, mode=mode), stock))
            print(rows[-1], flush=True)
    return rows


def _run(
    name: str,
    kind: str,
    pairs: list[dict[str, str]],
    steps: int,
    *,
    is_fused: bool,
    mode: bool | str = False,
) -> dict[str, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        name, LENGTH, "float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, random_state=1, use_gradient_checkpointing=mode, use_fused_layers=is_fused
    )
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = TRAINERS[kind](model, tokenizer, pairs, _arguments(out, steps, bool(mode)))
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = state_of(model)
    trained = [p.detach().float().flatten() for p in model.parameters() if p.requires_grad]
    return {
        "losses": [entry["loss"] for entry in history],
        "norms": [float(entry["grad_norm"]) for entry in history],
        "weights": torch.cat(trained).cpu(),
        "fused_layers": len(fused_layers(model)),
        # forward passes of a fused layer by the model's own code, by reason
        "stock_passes": dict(state.stock_passes) if state is not None else {},
    }


def _difference(ours: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Both sides' losses, and the largest difference of loss, gradient norm and weights."""
    pairs = zip(ours["losses"], stock["losses"], strict=True)
    norms = zip(ours["norms"], stock["norms"], strict=True)
    moved = (ours["weights"] - stock["weights"]).norm() / stock["weights"].norm()
    return {
        "losses": ours["losses"],
        "stock_losses": stock["losses"],
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "norm_difference": max(abs(a - b) / b for a, b in norms),
        "weight_difference": float(moved),
        "fused_layers": ours["fused_layers"],
        "stock_passes": ours["stock_passes"],
    }


def _arguments(out: str, steps: int, checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": out,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": checkpointing,
    }


def _dpo(model: Any, tokenizer: Any, pairs: list[dict[str, str]], given: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(max_length=LENGTH, **given),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def _orpo(model: Any, tokenizer: Any, pairs: list[dict[str, str]], given: dict[str, Any]) -> Any:
    from datasets import Dataset

    orpo = importlib.import_module("trl.experimental.orpo")
    return orpo.ORPOTrainer(
        model=model,
        args=orpo.ORPOConfig(max_length=LENGTH, **given),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def _grpo(model: Any, tokenizer: Any, pairs: list[dict[str, str]], given: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    given = {**given, "per_device_train_batch_size": ANSWERS}
    return trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(
            num_generations=ANSWERS, max_completion_length=ANSWER_TOKENS, beta=0.1, **given
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in pairs]),
        reward_funcs=_letters,
        processing_class=tokenizer,
    )


def _letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between the answers to a prompt."""
    return [len(set(text)) + 0.1 * number for number, text in enumerate(completions)]


TRAINERS: dict[str, Callable[..., Any]] = {"dpo": _dpo, "orpo": _orpo, "grpo": _grpo}


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["trainer", "checkpointing", "first loss", "last loss", "largest difference"]
    head += ["gradient norm", "weights", "fused layers"]
    cells = []
    for row in rows:
        if "skipped" in row:
            cells.append([row["trainer"], f"skipped: {row['skipped']}", *["-"] * (len(head) - 2)])
            continue
        names = ("loss_difference", "norm_difference", "weight_difference")
        cells.append(
            [
                row["trainer"],
                str(row["checkpointing"]),
                *(f"{row['losses'][place]:.6f}" for place in (0, -1)),
                *(exponent(row[name]) for name in names),
                str(row["fused_layers"]),
            ]
        )
    return format_table(head, cells, left=("checkpointing",))


if __name__ == "__main__":
    main()
