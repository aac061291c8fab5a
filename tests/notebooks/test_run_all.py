"""notebooks/run_all.py without a kernel: order, parameters, and what it does not run again."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from notebook_files import NOTEBOOKS, ROOT, Notebook

RUN_ALL = ROOT / "notebooks" / "run_all.py"
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture
def run_all() -> ModuleType:
    """A fresh copy of the script as a module."""
    spec = importlib.util.spec_from_file_location("run_all_under_test", RUN_ALL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _options(*parameters: tuple[str, str], model: str = "embedded") -> argparse.Namespace:
    return argparse.Namespace(model=model, parameters=[list(pair) for pair in parameters])


def _parameter_types(name: str) -> dict[str, str]:
    """Name -> type of each parameter, read from the syntax tree of the cell."""
    tree = ast.parse(Notebook(RUN_ALL.with_name(f"{name}.ipynb")).parameters["source"])
    return {
        ast.unparse(node.target): ast.unparse(node.annotation)
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
    }


def test_the_order_is_that_of_the_files(run_all: ModuleType) -> None:
    assert list(run_all.ORDER) == sorted(NAMES)


# ---- parameters


@pytest.mark.parametrize("name", NAMES)
def test_what_is_passed_by_itself_exists_and_has_the_right_type(
    run_all: ModuleType, name: str
) -> None:
    known = _parameter_types(name)
    passed = run_all._parameters(name, Path("/somewhere/out"), _options())
    assert {key: type(value).__name__ for key, value in passed.items()} == {
        key: known[key] for key in passed
    }
    assert passed["work_dir"] == "/somewhere/out"
    assert passed.get("model_name", "embedded") == "embedded"
    assert ("model_name" in passed) == ("model_name" in known)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_notebook_can_be_passed(run_all: ModuleType, name: str) -> None:
    given = {"str": "some text", "int": "3", "float": "0.25", "bool": "true"}
    known = _parameter_types(name)
    pairs = [(key, given[kind]) for key, kind in known.items()]
    passed = run_all._parameters(name, Path("out"), _options(*pairs, ("no_such_name", "1")))
    assert {key: type(value).__name__ for key, value in passed.items()} == known


def test_values_are_json_or_text(run_all: ModuleType) -> None:
    pairs = [("learning_rate", "3e-4"), ("resume", "false"), ("question", "Why 4 bits?")]
    passed = run_all._parameters("05_train", Path("out"), _options(*pairs, ("max_steps", "2")))
    assert passed["learning_rate"] == 3e-4
    assert passed["resume"] is False
    assert passed["question"] == "Why 4 bits?"
    assert passed["max_steps"] == 2


def test_the_last_of_two_values_counts(run_all: ModuleType) -> None:
    options = _options(("max_steps", "2"), ("max_steps", "5"), ("work_dir", "elsewhere"))
    passed = run_all._parameters("05_train", Path("out"), options)
    assert (passed["max_steps"], passed["work_dir"]) == (5, "elsewhere")


def test_a_notebook_without_the_parameter_does_not_get_it(run_all: ModuleType) -> None:
    options = _options(("eval_share", "0.5"))
    assert "eval_share" not in run_all._parameters("05_train", Path("out"), options)
    assert run_all._parameters("04_format_data", Path("out"), options)["eval_share"] == 0.5


# ---- hashes


def test_hash_follows_content_order_and_start(run_all: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    before = run_all._hash_files([first, second])
    assert run_all._hash_files([first, second]) == before
    assert run_all._hash_files([second, first]) != before
    assert run_all._hash_files([first, second], "start") != before
    assert run_all._hash_files([first]) != before
    second.write_bytes(b"two.")
    assert run_all._hash_files([first, second]) != before


# ---- what is run again


@pytest.fixture
def house(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """`house(*arguments, fail=NAME)` runs main() on a copy and gives what it would execute."""
    folder = tmp_path / "house"
    shutil.copytree(
        ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("colab_qlora", "data_samples"):
        (folder / name).mkdir()
    (folder / "colab_qlora" / "errors.py").write_text("A = 1\n")
    (folder / "data_samples" / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    monkeypatch.setattr(run_all, "HERE", folder / "notebooks")

    resumed: dict[str, bool | None] = {}

    def run(*arguments: str, fail: str | None = None) -> list[str]:
        executed: list[str] = []

        def execute(name: str, parameters: dict[str, Any], out: Path) -> float | None:
            executed.append(name)
            resumed[name] = parameters.get("resume")
            (out / "notebooks" / f"{name}.ipynb").touch()
            return None if name == fail else 1.0

        monkeypatch.setattr(run_all, "_execute", execute)
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path / "out"), *arguments])
        assert run_all.main() == (0 if fail is None else 1)
        return executed

    run.resumed = resumed  # type: ignore[attr-defined]
    return run


def test_a_second_run_executes_nothing(
    house: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert house() == NAMES
    capsys.readouterr()
    assert house() == []
    printed = capsys.readouterr().out
    assert [name for name in NAMES if f"{name}: unchanged" not in printed] == []


def test_force_executes_everything_again(house: Callable[..., list[str]]) -> None:
    house()
    assert house("--force") == NAMES


def test_named_notebooks_only(house: Callable[..., list[str]]) -> None:
    assert house("04_format_data", "06_read_loss_curves") == [NAMES[4], NAMES[6]]


def test_a_changed_notebook_is_run_again_with_those_that_follow(
    house: Callable[..., list[str]], tmp_path: Path
) -> None:
    house()
    path = tmp_path / "house" / "notebooks" / "04_format_data.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][-1]["source"] = ["print('changed')"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert house() == NAMES[4:]
    assert house() == []


def test_a_changed_parameter_reaches_those_that_have_it_and_what_follows(
    house: Callable[..., list[str]],
) -> None:
    house()
    assert house("-p", "evals_per_run", "1") == NAMES[5:]
    assert house("-p", "evals_per_run", "1") == []
    assert house() == NAMES[5:]


def test_another_model_is_a_change(house: Callable[..., list[str]]) -> None:
    house()
    assert house("--model", "some/model") == NAMES


def test_a_changed_kit_is_a_change(house: Callable[..., list[str]], tmp_path: Path) -> None:
    house()
    (tmp_path / "house" / "colab_qlora" / "errors.py").write_text("A = 2\n")
    assert house() == NAMES


def test_changed_sample_data_are_a_change(house: Callable[..., list[str]], tmp_path: Path) -> None:
    # data_samples is part of the kit: it is installed as colab_qlora.samples
    house()
    (tmp_path / "house" / "data_samples" / "train.jsonl").write_text('{"instruction": "c"}\n')
    again = house()
    assert again[-len(NAMES[4:]) :] == NAMES[4:]


def test_a_changed_data_file_of_ones_own_is_a_change(
    house: Callable[..., list[str]], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"instruction": "a", "output": "b"}\n')
    house("-p", "train_file", str(mine))
    mine.write_text('{"instruction": "a", "output": "a better answer"}\n')
    again = house("-p", "train_file", str(mine))
    assert again[-len(NAMES[4:]) :] == NAMES[4:]


def test_a_failure_ends_the_run_and_the_next_one_goes_on_from_there(
    house: Callable[..., list[str]],
) -> None:
    assert house(fail="03_attach_lora") == NAMES[:4]
    assert house() == NAMES[3:]


def test_a_forced_run_that_fails_is_not_taken_for_a_complete_one(
    house: Callable[..., list[str]],
) -> None:
    house()
    assert house("--force", fail="05_train") == NAMES[:6]
    assert house()[:1] == ["05_train"]


def test_only_a_training_that_this_run_left_unfinished_is_resumed(
    house: Callable[..., list[str]],
) -> None:
    resumed = house.resumed  # type: ignore[attr-defined]
    house(fail="05_train")
    assert resumed["05_train"] is False
    house()
    assert resumed["05_train"] is True
    house("--force")
    assert resumed["05_train"] is False
    house("-p", "learning_rate", "0.1", fail="05_train")
    house("-p", "learning_rate", "0.2")
    assert resumed["05_train"] is False
    assert resumed["04_format_data"] is None


def test_a_deleted_result_is_made_again(house: Callable[..., list[str]], tmp_path: Path) -> None:
    house()
    (tmp_path / "out" / "notebooks" / "04_format_data.ipynb").unlink()
    assert house() == ["04_format_data"]


def test_what_is_printed_piece_by_piece_is_one_output(
    run_all: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("papermill")
    import nbformat

    cell = (
        "import time\nfor word in 'abc':\n    print(word, end='', flush=True)\n    time.sleep(0.3)"
    )
    parameters = nbformat.v4.new_code_cell("seed = 1", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(cell)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "pieces.ipynb")
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    assert run_all._execute("pieces", {}, tmp_path) is not None
    executed = nbformat.read(tmp_path / "notebooks" / "pieces.ipynb", 4)
    assert [output["text"] for output in executed.cells[-1].outputs] == ["abc"]
