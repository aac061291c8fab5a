"""A killed run resumes with the same losses and weights as an unbroken one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from colab_qlora import UserError, read_log  # noqa: E402
from colab_qlora.training.resume import (  # noqa: E402
    check_checkpoint,
    last_complete_checkpoint,
    what_is_missing,
)

pytestmark = pytest.mark.model
ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 6

RUN = """
import os, signal, sys
import torch
from transformers import TrainerCallback
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer

folder, out, kill_at, kill_in = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
rows = [{"prompt": f"Say {i}:\\n", "completion": f"{i} " * (1 + i % 7)} for i in range(20)]
model, tokenizer = FastLanguageModel.from_pretrained(folder, 64, dtype="float32")
# dropout, so that a resume that forgets the random state shows
model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.2, random_state=1)
trainer = SFTTrainer(
    model=model, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows[:4],
    args=SFTConfig(out, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        learning_rate=1e-2, warmup_steps=2, logging_steps=1, save_steps=2, save_total_limit=2,
        eval_strategy="steps", eval_steps=3, optim="adamw_8bit", seed=5))

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if kill_in == "step" and state.global_step == kill_at:
            die()
    def on_substep_end(self, args, state, control, **kwargs):
        if kill_in == "accumulation" and state.global_step + 1 == kill_at:
            die()

trainer.add_callback(Kill())
if kill_in == "save":
    stock = torch.save
    def half(content, target, *args, **kwargs):
        if trainer.state.global_step == kill_at and "optimizer" in str(target):
            stock(content, target, *args, **kwargs)
            size = os.path.getsize(target)
            os.truncate(target, size // 2)
            die()
        stock(content, target, *args, **kwargs)
    torch.save = half
trainer.train(resume_from_checkpoint=True)
weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
stock_save = stock if kill_in == "save" else torch.save
stock_save({"weights": weights}, os.path.join(out, "end.pt"))
"""


def _run(
    folder: Path, out: Path, kill_at: int = -1, kill_in: str = "step", going_on_from: int = 0
) -> int:
    command = [sys.executable, "-c", RUN, str(folder), str(out), str(kill_at), kill_in]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stdout + done.stderr)
    if going_on_from:
        assert f"going on from {out}/checkpoint-{going_on_from}\n" in done.stdout
    return done.returncode


def _without_clock(path: Path) -> list[dict]:
    # peak memory and time are the process's own; everything else must be the same
    return [
        {k: v for k, v in r.items() if k not in {"seconds", "peak_memory_gib"}}
        for r in read_log(path).records
    ]


@pytest.fixture(scope="module")
def unbroken(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert _run(tiny_model_folder, out) == 0
    return out


@pytest.mark.parametrize(
    ("kill_at", "kill_in"),
    [(1, "step"), (3, "step"), (4, "accumulation"), (4, "save"), (5, "step")],
)
def test_killed_run_ends_as_the_unbroken_one(
    tiny_model_folder: Path, unbroken: Path, tmp_path: Path, kill_at: int, kill_in: str
) -> None:
    out = tmp_path / "out"
    assert _run(tiny_model_folder, out, kill_at, kill_in) == -signal.SIGKILL
    assert not (out / "end.pt").exists()
    saved = 0 if kill_at < 2 else 4 if kill_at == 5 else 2
    assert _run(tiny_model_folder, out, going_on_from=saved) == 0
    assert (out / "earlier-1").exists() == (saved == 0)
    assert _without_clock(out / "loss_log.jsonl") == _without_clock(unbroken / "loss_log.jsonl")
    ours = torch.load(out / "end.pt")["weights"]
    theirs = torch.load(unbroken / "end.pt")["weights"]
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_log_counts_every_step_once(unbroken: Path) -> None:
    records = read_log(unbroken / "loss_log.jsonl").records
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 3, 6]


@pytest.fixture
def checkpoint(unbroken: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "out"
    shutil.copytree(unbroken, copy)
    assert {p.name for p in copy.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    return copy / "checkpoint-6"


def test_whole_checkpoint_is_recognised(checkpoint: Path) -> None:
    assert what_is_missing(checkpoint) is None
    assert last_complete_checkpoint(checkpoint.parent) == checkpoint
    assert check_checkpoint(checkpoint) == str(checkpoint)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trainer_state.json", "trainer_state.json is missing or cut off"),
        ("adapter_model.safetensors", "adapter_model.safetensors is cut off"),
        ("optimizer.pt", "optimizer.pt is missing or cut off"),
        ("scheduler.pt", "scheduler.pt is missing or cut off"),
    ],
)
def test_cut_off_file_is_noticed(checkpoint: Path, name: str, reason: str) -> None:
    size = (checkpoint / name).stat().st_size
    for length in (size - 2, size // 2, 4, 0):  # the last byte may be a line end
        os.truncate(checkpoint / name, length)
        assert what_is_missing(checkpoint) == reason, length
    earlier = checkpoint.with_name("checkpoint-4")
    assert last_complete_checkpoint(checkpoint.parent) == earlier
    with pytest.raises(UserError) as caught:
        check_checkpoint(checkpoint)
    assert reason in str(caught.value)
    assert str(earlier) in str(caught.value)


def test_missing_weights_are_noticed(checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").unlink()
    assert what_is_missing(checkpoint) == "it holds no weights (adapter_model.safetensors)"


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="it is not a folder. Start again without"):
        check_checkpoint(tmp_path / "checkpoint-3")


def test_state_is_readable_json(unbroken: Path) -> None:
    state = json.loads((unbroken / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
