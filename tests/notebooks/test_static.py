"""The notebooks as texts: form, parameters, headings, announcements, links.

Nothing is executed. What is in the code cells is tested in test_static_code.py.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest
from notebook_files import NOTEBOOKS, REPOSITORY, ROOT, Notebook

nbformat = pytest.importorskip("nbformat")

MARKDOWN_LINES = 8
# 15 lines a cell is the aim; a call with many arguments may be longer, but not in every cell
LONG_CODE_LINES, MAX_CODE_LINES, MAX_LONG_CELLS = 16, 20, 2
FORMS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _first_line(cell: dict[str, Any]) -> str:
    return cell["source"].split("\n")[0]


def _filled(source: str) -> list[str]:
    return [line for line in source.split("\n") if line.strip()]


def _prose(source: str) -> str:
    """Markdown without its code blocks."""
    return re.sub(r"^```.*?^```", "", source, flags=re.MULTILINE | re.DOTALL)


# ---- the file


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02d}" for n in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 7


def test_valid_nbformat_4_5(notebook: Notebook) -> None:
    nbformat.validate(nbformat.reads(notebook.text, as_version=nbformat.NO_CONVERT))
    assert (notebook.content["nbformat"], notebook.content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(ids) == len(set(ids))


def test_no_trace_of_a_run_is_kept(notebook: Notebook) -> None:
    code = notebook.of_type("code")
    assert [c["id"] for c in code if c["outputs"] or c["execution_count"] is not None] == []
    assert "widgets" not in notebook.content["metadata"]
    assert [c["id"] for c in notebook.cells if "widgets" in c["metadata"]] == []
    assert "papermill" not in notebook.content["metadata"]
    assert [c["id"] for c in code if {"papermill", "execution"} & set(c["metadata"])] == []


def test_kernel_is_named_as_every_server_names_it(notebook: Notebook) -> None:
    assert notebook.content["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook.content["metadata"]["kernelspec"]["language"] == "python"


# ---- the parameters


def test_exactly_one_code_cell_holds_the_parameters(notebook: Notebook) -> None:
    tagged = [c for c in notebook.cells if "parameters" in c["metadata"].get("tags", [])]
    assert [cell["cell_type"] for cell in tagged] == ["code"]
    # papermill puts its values right below, so nothing may have been computed before
    assert tagged[0]["id"] == notebook.of_type("code")[0]["id"]


def test_every_parameter_is_one_annotated_line_with_a_form(notebook: Notebook) -> None:
    lines = notebook.parameters["source"].split("\n")
    assert lines and all(line.strip() for line in lines)
    names = [_check_parameter(line) for line in lines]
    assert len(names) == len(set(names))
    # the stages hand over through this folder
    assert "work_dir" in names


def _check_parameter(line: str) -> str:
    found = re.fullmatch(r"(\w+): (\w+) = (.+?)  # @param (\S.*)", line)
    assert found is not None, f"not `name: type = value  # @param form`: {line}"
    name, kind, text, form = found.groups()
    (node,) = ast.parse(line).body
    assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name), line
    assert kind in FORMS, f"{kind} is not one of {', '.join(FORMS)}: {line}"
    value = ast.literal_eval(text)
    assert type(value).__name__ == kind, f"{value!r} is not of type {kind}: {line}"
    if form.startswith("["):
        options = json.loads(form)
        assert value in options, f"the default is not among the options: {line}"
        assert {type(option).__name__ for option in options} == {kind}, line
    else:
        # Colab reads this as JavaScript, so the key has no quotes
        assert form == f'{{type:"{FORMS[kind]}"}}', f"the form does not fit {kind}: {line}"
    return name


def test_every_parameter_is_used(notebook: Notebook) -> None:
    used = {
        node.id
        for cell, tree in notebook.trees()
        if cell["id"] != notebook.parameters["id"]
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    names = [line.split(":")[0] for line in notebook.parameters["source"].split("\n")]
    assert [name for name in names if name not in used] == []


# ---- the text


def test_first_line_is_the_badge_of_this_notebook(notebook: Notebook) -> None:
    where = REPOSITORY.removeprefix("https://github.com/")
    picture = "https://colab.research.google.com/assets/colab-badge.svg"
    target = f"https://colab.research.google.com/github/{where}/blob/main/notebooks"
    assert notebook.cells[0]["cell_type"] == "markdown"
    expected = f"[![Open in Colab]({picture})]({target}/{notebook.path.name})"
    assert _first_line(notebook.cells[0]) == expected


def test_one_title_and_no_skipped_heading_level(notebook: Notebook) -> None:
    text = "\n\n".join(_prose(cell["source"]) for cell in notebook.of_type("markdown"))
    levels = [len(marks) for marks in re.findall(r"^(#+)\s+\S", text, re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert [pair for pair in zip(levels, levels[1:], strict=False) if pair[1] > pair[0] + 1] == []


def test_every_code_cell_is_announced(notebook: Notebook) -> None:
    missing = []
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell["cell_type"] != "code":
            continue
        assert before is not None and before["cell_type"] == "markdown", cell["source"]
        if cell["id"] == notebook.parameters["id"]:
            continue
        lacks = [words for words in ("Time:", "You should see") if words not in before["source"]]
        if lacks:
            missing.append((before["id"], lacks, _first_line(before)))
    assert missing == []


def test_the_parameters_are_explained(notebook: Notebook) -> None:
    before = notebook.cells[notebook.cells.index(notebook.parameters) - 1]["source"]
    assert [line for line in _filled(before) if not line.startswith("#")], "a heading, no text"


def test_no_cell_is_empty_or_long(notebook: Notebook) -> None:
    assert [cell["id"] for cell in notebook.cells if not cell["source"].strip()] == []
    markdown = {c["id"]: len(_filled(c["source"])) for c in notebook.of_type("markdown")}
    assert {k: lines for k, lines in markdown.items() if lines > MARKDOWN_LINES} == {}
    code = {c["id"]: len(_filled(c["source"])) for c in notebook.of_type("code")}
    assert {k: lines for k, lines in code.items() if lines > MAX_CODE_LINES} == {}
    long = {k: lines for k, lines in code.items() if lines > LONG_CODE_LINES}
    assert len(long) <= MAX_LONG_CELLS, long


def test_links_lead_somewhere(notebook: Notebook) -> None:
    text = "\n".join(cell["source"] for cell in notebook.of_type("markdown"))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    relative = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    missing = [t for t in relative if not (notebook.path.parent / t.split("#")[0]).is_file()]
    assert missing == []
    assert [target for target in targets if target.startswith("http:")] == []


def test_notebooks_named_in_the_text_exist(notebook: Notebook) -> None:
    names = {path.stem for path in NOTEBOOKS}
    text = "\n".join(cell["source"] for cell in notebook.cells)
    assert set(re.findall(r"\b0\d_[a-z0-9_]+", text)) - names == set()


def test_modules_named_in_the_text_exist(notebook: Notebook) -> None:
    text = "\n".join(cell["source"] for cell in notebook.of_type("markdown"))
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
