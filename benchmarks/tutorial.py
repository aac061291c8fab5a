"""Run the tutorial script (tests/tutorial_script.py) as it stands on a model of your choice.

    python -m benchmarks.tutorial [--model embedded] [--rows 64] [--repeat-text 1] [--dtype None]

The script's text is executed unchanged but for the model's name (and, if asked for, its dtype), in
a scratch folder with a train.jsonl of sample rows. Prints the losses, peak memory and tokens a
second.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).resolve().parent.parent
HUB_NAME = "unsloth/llama-3-8b-Instruct-bnb-4bit"


def script_for(model_name: str, dtype: str = "None") -> str:
    """The script with the model's name replaced, and its dtype where one is asked for."""
    text = (ROOT / "tests" / "tutorial_script.py").read_text(encoding="utf-8")
    assert text.count(f'"{HUB_NAME}"') == 1 and text.count("dtype=None") == 1
    return text.replace(f'"{HUB_NAME}"', repr(model_name)).replace("dtype=None", f"dtype={dtype}")


def run(model_name: str, rows: int, repeat_text: int = 1, dtype: str = "None") -> dict[str, Any]:
    """Execute the script; returns what it measured and its `trainer` under "trainer"."""
    import torch

    samples = (ROOT / "data_samples" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in samples[:rows]]
    for row in chosen:
        row["output"] = " ".join([row["output"]] * repeat_text)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            lines = [json.dumps(row) + "\n" for row in chosen]
            Path("train.jsonl").write_text("".join(lines), encoding="utf-8")
            names: dict[str, Any] = {"__name__": "__main__"}
            began = time.monotonic()
            exec(compile(script_for(model_name, dtype), "tutorial_script.py", "exec"), names)
        finally:
            os.chdir(before)
    trainer = names["trainer"]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # the last entry sums up the run; it counts the tokens of all steps
    tokens = max(int(e.get("num_tokens") or 0) for e in trainer.state.log_history)
    seconds = names["trainer_stats"].metrics["train_runtime"]
    scaler = trainer.accelerator.scaler
    return {
        "trainer": trainer,
        "model": Path(model_name).name,
        "rows": rows,
        "steps": trainer.state.global_step,
        "losses": [entry["loss"] for entry in log],
        "mean_loss": names["trainer_stats"].training_loss,
        "grad_norms": [float(entry["grad_norm"]) for entry in log],
        "train_seconds": seconds,
        "total_seconds": time.monotonic() - began,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
        if torch.cuda.is_available()
        else None,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "loss_scale_at_the_end": scaler.get_scale() if scaler is not None else None,
        "notes": trainer.notes,
    }


def main() -> None:
    """Run once and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat-text", type=int, default=1, help="lengthen the answers")
    parser.add_argument("--dtype", default="None", help='None or e.g. "float16"')
    parser.add_argument("--name", default="tutorial", help="name of the result file")
    options = parser.parse_args()
    dtype = "None" if options.dtype == "None" else repr(options.dtype)
    row = run(options.model, options.rows, options.repeat_text, dtype)
    row.pop("trainer")
    for key, value in row.items():
        print(f"{key:>22}: {value}")
    print(f"wrote {record.write(options.name, [row])}")


if __name__ == "__main__":
    main()
