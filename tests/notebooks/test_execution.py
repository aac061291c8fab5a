"""The notebooks as a user runs them: all in order through run_all.py, and stages alone.

Everything happens in subprocesses, on the embedded model, with a few rows and two steps. Nothing is
installed: pip is told to only pretend.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from notebook_files import NOTEBOOKS, ROOT, Notebook

pytest.importorskip("papermill")
pytest.importorskip("trl")

pytestmark = [pytest.mark.notebook, pytest.mark.model]

NAMES = [path.stem for path in NOTEBOOKS]
TRAIN_ROWS, EVAL_ROWS, STEPS = 8, 4, 2
NEW_TOKENS = 8
ALL_SECONDS = 800
STAGE_SECONDS = 240
UNCHANGED_SECONDS = 15


@dataclass(frozen=True)
class Run:
    """A finished run_all.py: its folder, exit status, output and duration."""

    out: Path
    status: int
    text: str
    seconds: float

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A JSON lines file of the folder."""
        lines = (self.out / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder."""
        return json.loads((self.out / name).read_text(encoding="utf-8"))

    def notebook(self, name: str) -> Notebook:
        """An executed notebook."""
        return Notebook(self.out / "notebooks" / f"{name}.ipynb")

    def printed(self, name: str) -> str:
        """All that the cells of an executed notebook printed or showed as text."""
        outputs = [o for c in self.notebook(name).of_type("code") for o in c["outputs"]]
        texts = [o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs]
        return "\n".join("".join(text) for text in texts)


def _run_all(out: Path, *arguments: str, seconds: float) -> Run:
    """Run the script to its end, or kill it; the output so far is in the failure message."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    environ = os.environ | {
        # a test must not change the environment that it runs in
        "PIP_DRY_RUN": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(ROOT / "notebooks" / "run_all.py"), "--out", str(out)]
    log = out.parent / f"{out.name}.log"
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=out.parent,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"run_all.py took more than {seconds:.0f} s\n{_tail(log)}")
        finally:
            if process.poll() is None:
                _kill(process)
    return Run(out, status, _read(log), time.monotonic() - began)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # the script and what it started; a kernel ends by itself when its parent is gone
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait(timeout=30)


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _tail(log: Path, characters: int = 6000) -> str:
    return _read(log)[-characters:]


def _error_outputs(notebook: Notebook) -> list[tuple[int, str]]:
    """(number of the execution, name of the error) of each cell that failed."""
    return [
        (cell["execution_count"], output["ename"])
        for cell in notebook.of_type("code")
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]


def _assert_complete(run: Run, names: list[str]) -> None:
    assert run.status == 0, run.text[-6000:]
    assert sorted(p.stem for p in (run.out / "notebooks").glob("*.ipynb")) == names
    for name in names:
        notebook = run.notebook(name)
        assert _error_outputs(notebook) == []
        code = notebook.of_type("code")
        assert [cell["id"] for cell in code if cell["execution_count"] is None] == []
        # its own cells, and one with the parameters that were passed
        assert len(code) == len(Notebook(ROOT / "notebooks" / f"{name}.ipynb").of_type("code")) + 1


# ---- all of them


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Data files with the first rows of the samples, and the smallest parameters that train."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        sample = ROOT / "data_samples" / f"{name}.jsonl"
        lines = sample.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    parameters = {
        "train_file": folder / "train.jsonl",
        "eval_file": folder / "eval.jsonl",
        "rows": TRAIN_ROWS,
        "max_steps": STEPS,
        "evals_per_run": 1,
        "max_new_tokens": NEW_TOKENS,
        "dry_run": "true",
    }
    return [word for key, value in parameters.items() for word in ("-p", key, str(value))]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, embedded_folder: Path, arguments: list[str]
) -> Run:
    """All notebooks, once for this module."""
    out = tmp_path_factory.mktemp("all") / "out"
    done = _run_all(out, *arguments, seconds=ALL_SECONDS)
    assert done.status == 0, done.text[-6000:]
    return done


def test_the_parameters_of_this_file_exist(arguments: list[str]) -> None:
    # run_all.py drops a name that no notebook knows, so a slip here would go unnoticed
    sources = "\n" + "\n".join(Notebook(path).parameters["source"] for path in NOTEBOOKS)
    names = arguments[1::3]
    assert [name for name in names if f"\n{name}: " not in sources] == []


def test_all_notebooks_run_to_their_end(run: Run) -> None:
    _assert_complete(run, NAMES)
    assert [name for name in NAMES if f"{name}: done in" not in run.text] == []
    assert set(run.json("notebooks/done.json")) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_values_that_were_passed_were_used(run: Run, name: str) -> None:
    tagged = [
        cell
        for cell in run.notebook(name).of_type("code")
        if "injected-parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    assert f'work_dir = "{run.out}"' in tagged[0]["source"]


def test_nothing_was_missing_or_installed(run: Run) -> None:
    printed = "\n".join(run.printed(name) for name in NAMES)
    assert printed.count("missing: nothing") == len(NAMES)
    assert "Would install" not in printed


def test_each_stage_left_its_file(run: Run) -> None:
    environment = run.json("environment.json")
    assert environment["python"] == platform.python_version()
    assert environment["torch_version"]
    model = run.json("model.json")
    assert model["model_name"] == "embedded"
    assert model["max_seq_length"] > 0
    lora = run.json("lora.json")
    assert (lora["r"], lora["lora_alpha"]) == (16, 32)


def test_the_data_are_the_rows_that_were_given(run: Run) -> None:
    train, evaluation = run.rows("data/train.jsonl"), run.rows("data/eval.jsonl")
    assert (len(train), len(evaluation)) == (TRAIN_ROWS, EVAL_ROWS)
    assert all({"prompt", "completion"} <= row.keys() for row in train + evaluation)


@pytest.mark.parametrize("folder", ["adapter", "quickstart/adapter"])
def test_the_adapter_loads_with_stock_peft(run: Run, folder: str) -> None:
    import torch
    from peft import LoraConfig, PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(run.out / folder))
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha) == (16, 32)
    assert len(config.target_modules or ()) == 7
    weights = load_file(run.out / folder / "adapter_model.safetensors")
    layers = {key.split(".lora_")[0] for key in weights}
    # seven adapted layers in each of 30 blocks, two matrices each
    assert (len(layers), len(weights)) == (7 * 30, 2 * 7 * 30)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    ranks = {k: w.shape[0 if "lora_A" in k else 1] for k, w in weights.items()}
    assert set(ranks.values()) == {config.r}
    if not torch.cuda.is_available():
        # in float16 on a GPU the first steps may be skipped; here the second step must train
        assert any(weight.any() for key, weight in weights.items() if "lora_B" in key)


def test_the_loss_log_has_every_step(run: Run) -> None:
    header, *records = run.rows("loss_log.jsonl")
    assert header["format"].startswith("colab_qlora.loss_log/")
    assert header["run"]["max_steps"] == STEPS
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    evals = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    # an evaluation before the first step and one at the end
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert sorted(evals) == [0, STEPS]
    # and a last record, which says that the run is over
    assert len(records) == len(losses) + len(evals) + 1
    assert (records[-1]["step"], records[-1]["is_end"]) == (STEPS, True)
    values = [*losses.values(), *evals.values()]
    assert [value for value in values if not math.isfinite(float(value))] == []


def test_the_curve_is_a_picture(run: Run) -> None:
    from matplotlib.image import imread

    path = run.out / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = imread(path)
    height, width = picture.shape[:2]
    assert 200 <= height <= 3000
    assert 300 <= width <= 4000
    assert picture.std() > 0.01, "the picture is empty"


@pytest.mark.parametrize("name", NAMES[2:])
def test_pictures_say_in_words_what_they_show(run: Run, name: str) -> None:
    outputs = [o for c in run.notebook(name).of_type("code") for o in c["outputs"]]
    pictures = [o["data"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures or name == "07_chat_and_export", "no picture"
    sentences = ["".join(data.get("text/plain", "")) for data in pictures]
    assert [s for s in sentences if len(s.split()) < 4 or s.startswith("<")] == []


def test_the_question_was_answered_before_and_after(run: Run) -> None:
    answers = run.json("answers.json")
    assert answers["question"].endswith("?")
    assert answers["before"].strip()
    assert answers["after"].strip()
    # the summary shows them
    assert answers["question"] in run.text
    assert answers["after"].splitlines()[0] in run.text


def test_the_model_was_saved_in_forms_that_others_read(run: Run) -> None:
    from gguf import GGUFReader
    from safetensors import safe_open

    shards = sorted((run.out / "merged").glob("*.safetensors"))
    with safe_open(shards[0], "pt") as weights:
        names = set(weights.keys())
        # the adapter is in the weights, and nothing is quantised
        assert not [name for name in names if "lora" in name or "absmax" in name]
        assert "BF16" in str(weights.get_slice("model.embed_tokens.weight").get_dtype())
    (path,) = (run.out / "gguf").glob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert path.name in (run.out / "gguf" / "Modelfile").read_text(encoding="utf-8")


def test_the_chat_is_in_the_saved_notebook(run: Run) -> None:
    printed = run.printed("07_chat_and_export")
    assert "You: What is QLoRA?" in printed
    assert re.search(r"Model: \S", printed)


def test_a_second_run_changes_nothing(run: Run, arguments: list[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.out.rglob("*") if p.is_file()}
    again = _run_all(run.out, *arguments, seconds=STAGE_SECONDS)
    assert again.status == 0, again.text[-6000:]
    assert [name for name in NAMES if f"{name}: unchanged" not in again.text] == []
    assert again.seconds < UNCHANGED_SECONDS
    assert {p: p.stat().st_mtime_ns for p in run.out.rglob("*") if p.is_file()} == before


def test_another_learning_rate_trains_again(run: Run, arguments: list[str], tmp_path: Path) -> None:
    # `resume` is on by default, and a finished run's checkpoint lies in the folder
    out = tmp_path / "out"
    shutil.copytree(run.out, out)
    changed = ("05_train", *arguments, "-p", "learning_rate", "5e-4")
    again = _run_all(out, *changed, seconds=STAGE_SECONDS)
    assert again.status == 0, again.text[-6000:]
    assert again.rows("loss_log.jsonl")[0]["run"]["learning_rate"] == 5e-4
    rates = [r["learning_rate"] for r in again.rows("loss_log.jsonl")[1:] if "loss" in r]
    assert len(rates) == STEPS
    assert max(rates) <= 5e-4, "the records are those of the run before"
    first, second = (r.out / "adapter/adapter_model.safetensors" for r in (run, again))
    assert first.read_bytes() != second.read_bytes(), "the adapter is that of the run before"


# ---- one alone


def test_04_alone_works_with_defaults(tmp_path: Path, embedded_folder: Path) -> None:
    run = _run_all(tmp_path / "out", "04_format_data", seconds=STAGE_SECONDS)
    _assert_complete(run, ["04_format_data"])
    printed = run.printed("04_format_data")
    assert "02_load_4bit_model has not run in" in printed
    assert re.search(r"broken\.jsonl:\d+: ", printed), "the broken sample was not reported"
    assert re.search(r"\d+ of \d+ tokens trained", printed)
    samples = [(ROOT / "data_samples" / f"{n}.jsonl").read_text("utf-8") for n in ("train", "eval")]
    written = [len(run.rows(f"data/{n}.jsonl")) for n in ("train", "eval")]
    assert written == [len(text.splitlines()) for text in samples]


def test_06_alone_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    run = _run_all(tmp_path / "out", "06_read_loss_curves", seconds=STAGE_SECONDS)
    _assert_complete(run, ["06_read_loss_curves"])
    assert "run 05_train first" in run.printed("06_read_loss_curves")


def test_a_failing_notebook_gives_status_1_and_names_the_cell(tmp_path: Path) -> None:
    bad = ("-p", "train_file", "/nonexistent.jsonl")
    run = _run_all(
        tmp_path / "out", "04_format_data", "06_read_loss_curves", *bad, seconds=STAGE_SECONDS
    )
    assert run.status == 1, run.text[-6000:]
    found = re.search(r"^04_format_data failed in cell (\d+): (\w+): (.*)$", run.text, re.MULTILINE)
    assert found is not None, run.text[-6000:]
    assert found[2] == "UserError"
    assert "/nonexistent.jsonl" in found[3]
    # the number is the one that the notebook shows beside the cell
    assert _error_outputs(run.notebook("04_format_data")) == [(int(found[1]), "UserError")]
    assert str(run.out / "notebooks" / "04_format_data.ipynb") in run.text
    # what follows is not run, and the failure is not taken for done
    assert not (run.out / "notebooks" / "06_read_loss_curves.ipynb").exists()
    done = run.out / "notebooks" / "done.json"
    assert not done.exists() or "04_format_data" not in run.json("notebooks/done.json")
