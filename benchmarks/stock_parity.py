"""The tutorial script, run by the kit and by stock transformers + PEFT + TRL: are the losses the
same?

    python -m benchmarks.stock_parity [--model embedded] [--rows 64] [--steps -1] [--dtype float32]

Same 4-bit model, same adapters at the start, same rows in the same order, same AdamW in 8 bits.
Each side runs in a process of its own. Prints both losses at every step and the largest difference.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile

from benchmarks import record
from benchmarks.tutorial import ROOT

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 2048


def _arguments(out: str, steps: int) -> dict:
    return {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "num_train_epochs": 3,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "output_dir": out,
        "save_strategy": "no",
        "report_to": "none",
    }


def prompt_template() -> str:
    """The template of the tutorial script, which is parsed: an import would train."""
    script = ROOT / "tests" / "tutorial_script.py"
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "alpaca_prompt":
            return ast.literal_eval(node.value)
    raise ValueError(f"{script} assigns no alpaca_prompt")


def _dataset(rows: int, eos: str):
    from datasets import load_dataset

    path = ROOT / "data_samples" / "train.jsonl"
    data = load_dataset("json", data_files=str(path), split="train").select(range(rows))
    template = prompt_template()
    return data.map(
        lambda batch: {
            "text": [
                template.format(i, o) + eos
                for i, o in zip(batch["instruction"], batch["output"], strict=True)
            ]
        },
        batched=True,
    )


def run_ours(options: argparse.Namespace, out: str) -> list[float]:
    """The tutorial's way, through the kit."""
    from transformers import TrainingArguments

    from colab_qlora import FastLanguageModel, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=LENGTH, dtype=options.dtype
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=32, random_state=42
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=_dataset(options.rows, tokenizer.eos_token),
        dataset_text_field="text",
        max_seq_length=LENGTH,
        args=TrainingArguments(fp16=True, **_arguments(out, options.steps)),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_stock(options: argparse.Namespace, out: str) -> list[float]:
    """The same run without the kit; only the embedded model's folder comes from it."""
    import torch
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _stock_model(options)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=_dataset(options.rows, tokenizer.eos_token),
        args=SFTConfig(
            dataset_text_field="text",
            max_length=LENGTH,
            bf16=options.dtype == "bfloat16",
            fp16=options.dtype == "float16",
            use_cpu=not torch.cuda.is_available(),
            **_arguments(out, options.steps),
        ),
    )
    if options.stock_adapters == "float32":
        # TRL casts a quantised model's adapters to bfloat16; PEFT made them float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _stock_model(options: argparse.Namespace):
    """The 4-bit model with adapters, as transformers and PEFT make them, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from colab_qlora.models.embedded import embedded_model_path

    source = str(embedded_model_path()) if options.model == "embedded" else options.model
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(42)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config), tokenizer


def main() -> None:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=-1, help="-1: three epochs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--stock-adapters",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="bfloat16 is what TRL does by itself",
    )
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as out:
            losses = (run_ours if options.side == "ours" else run_stock)(options, out)
        print("LOSSES " + json.dumps(losses))
        return
    sides = {side: _run_side(side) for side in ("ours", "stock")}
    rows = [
        {"step": step, "ours": a, "stock": b, "difference": abs(a - b)}
        for step, (a, b) in enumerate(zip(sides["ours"], sides["stock"], strict=True), 1)
    ]
    for row in rows:
        print(f"{row['step']:4d}  {row['ours']:.5f}  {row['stock']:.5f}  {row['difference']:.1e}")
    worst = max(row["difference"] for row in rows)
    print(f"largest difference over {len(rows)} steps: {worst:.1e} nat")
    name = f"stock_parity_{options.dtype}_stock_adapters_{options.stock_adapters}"
    path = record.write(name, rows, options=vars(options), largest_difference=worst)
    print(f"wrote {path}")


def _run_side(side: str) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.stock_parity", "--side", side, *sys.argv[1:]]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    for line in result.stdout.splitlines():
        if line.startswith("LOSSES "):
            return json.loads(line.removeprefix("LOSSES "))
    raise SystemExit(f"the {side} side failed:\n{result.stdout[-2000:]}")


if __name__ == "__main__":
    main()
