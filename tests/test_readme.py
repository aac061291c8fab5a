"""README, docs/ and CONTRIBUTING say nothing that is not so: links, badges, commands, notebooks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/"
# an absolute path of one machine is of no use to readers; addresses have their own slashes
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|work|Users|mnt|opt)/")

pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")


@pytest.fixture(scope="module", params=DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prose(document: Path) -> str:
    return _prose(document)


@pytest.fixture(scope="module")
def readme() -> str:
    """The README's prose."""
    return _prose(README)


def _prose(path: Path) -> str:
    """The text without its code blocks, in which brackets and # mean something else."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _repository() -> str:
    found = re.search(
        r'^Repository = "(https://github\.com/[^"]+)"',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert found is not None
    return found[1]


def _links(prose: str) -> list[str]:
    """Targets of Markdown links and pictures, of reference definitions, and of HTML tags."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", prose, re.MULTILINE)
    return targets + re.findall(r"""<[^>]*\b(?:href|src)=["']([^"']+)""", prose)


def _anchors(prose: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    titles = re.findall(r"^#+\s+(.*?)\s*#*$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _commands(text: str) -> list[str]:
    """The lines of code blocks, and each piece of inline code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", outside)


def test_relative_links_and_pictures_resolve(prose: str, document: Path) -> None:
    relative = [t for t in _links(prose) if not re.match(r"[a-z]+:|#", t)]
    folder = document.parent
    missing = [t for t in relative if not (folder / unquote(t.split("#")[0])).exists()]
    assert missing == []
    outside = [t for t in relative if not (folder / t).resolve().is_relative_to(ROOT)]
    assert outside == []


def test_links_to_headings_resolve(prose: str, document: Path) -> None:
    missing = []
    for target in _links(prose):
        name, _, anchor = target.partition("#")
        if not anchor or re.match(r"[a-z]+:", target):
            continue
        path = document.parent / name if name else document
        if path.suffix == ".md" and anchor not in _anchors(_prose(path)):
            missing.append(target)
    assert missing == []


def test_every_document_is_linked_from_the_readme(readme: str, document: Path) -> None:
    links = {target.split("#")[0] for target in _links(readme)}
    assert document == README or document.relative_to(ROOT).as_posix() in links


def test_badges_open_notebooks_of_this_repository(readme: str) -> None:
    badges = [t for t in _links(readme) if t.startswith(COLAB)]
    assert badges, "no Open in Colab badge"
    front = COLAB + _repository().removeprefix("https://github.com/") + "/blob/main/"
    assert [t for t in badges if not t.startswith(front)] == []
    assert [t for t in badges if not (ROOT / t.removeprefix(front)).is_file()] == []


def test_references_are_defined_once_and_used(prose: str) -> None:
    defined = re.findall(r"^\s*\[([^\]]+)\]:\s", prose, re.MULTILINE)
    used = set(re.findall(r"\]\[([^\]]+)\]", prose))
    assert len(defined) == len(set(defined))
    assert used == set(defined)


def test_links_into_the_repository_resolve(prose: str) -> None:
    front = f"{_repository()}/(?:blob|tree|raw)/main/"
    inside = [re.sub(front, "", t) for t in _links(prose) if re.match(front, t)]
    assert [path for path in inside if not (ROOT / path.split("#")[0]).exists()] == []


def test_other_repositories_of_the_same_host_name_are_not_ours(text: str) -> None:
    # a clone or install address with a slip in it would fetch something else
    name = _repository().rsplit("/", 1)[1]
    pattern = rf"(?:git\+)?https://github\.com/[\w.-]+/{name}\b"
    addresses = {address.removeprefix("git+") for address in re.findall(pattern, text)}
    assert addresses <= {_repository()}


def test_every_make_target_exists(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    named = {
        word
        for command in _commands(text)
        # what is in quotes is the value of a variable, such as ARGS="..."
        for words in re.findall(
            r"(?:^\s*|[;&|$]\s*)make((?:\s+[\w=./-]+)+)", re.sub(r"=([\"']).*?\1", "=", command)
        )
        for word in words.split()
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    assert named - targets == set()


def test_every_module_that_is_run_exists(text: str) -> None:
    modules = {
        module for c in _commands(text) for module in re.findall(r"python[\d.]* -m ([\w.]+)", c)
    }
    missing = []
    for module in sorted(modules):
        path = ROOT.joinpath(*module.split("."))
        is_here = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        # a tool such as pip or pytest
        if not is_here and ((ROOT / module.split(".")[0]).exists() or not _is_installed(module)):
            missing.append(module)
    assert missing == []


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_every_script_that_is_run_exists(text: str) -> None:
    scripts = {
        path for c in _commands(text) for path in re.findall(r"python[\d.]* ([\w./-]+\.py)\b", c)
    }
    assert [path for path in sorted(scripts) if not (ROOT / path).is_file()] == []


def test_every_name_that_is_imported_exists(text: str) -> None:
    pytest.importorskip("torch")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    missing = []
    for module, names in re.findall(
        r"from (colab_qlora[\w.]*) import ([\w, ]+)", "\n".join(blocks)
    ):
        found = importlib.import_module(module)
        missing += [f"{module}.{n}" for n in re.split(r",\s*", names) if not hasattr(found, n)]
    assert missing == []


def test_code_blocks_in_python_compile(text: str, document: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        compile(block, document.name, "exec")


def test_no_placeholder_is_left(text: str) -> None:
    pattern = r"@[A-Z][A-Z0-9_]+@|\b(?:TODO|FIXME|TBD|XXX+)\b|\{\{.*?\}\}|<(?:YOUR|INSERT)[^>]*>"
    assert re.findall(pattern, text) == []


def test_no_path_of_one_machine(text: str) -> None:
    assert MACHINE_PATH.findall(text) == []
    assert MACHINE_PATH.search("see /home/someone/file")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_in_the_table_with_its_own_badge(readme: str, notebook: Path) -> None:
    link = f"](notebooks/{notebook.name})"
    rows = [line for line in readme.splitlines() if line.startswith("|") and link in line]
    assert len(rows) == 1
    references = dict(re.findall(r"^\[([^\]]+)\]:\s*(\S+)", readme, re.MULTILINE))
    targets = [references.get(label, "") for label in re.findall(r"\]\[([^\]]+)\]", rows[0])]
    badges = [target for target in [*targets, *_links(rows[0])] if target.startswith(COLAB)]
    assert [target.rsplit("/", 1)[1] for target in badges] == [notebook.name]


def test_parameters_in_commands_exist(text: str) -> None:
    # papermill only warns about a name that it does not know, and run_all.py drops it
    missing = []
    for command in _commands(text):
        names = re.findall(r"\b(0\d_\w+)(?=\.ipynb|[\s\"'])", command)
        content = "".join(_source(ROOT / "notebooks" / f"{name}.ipynb") for name in names)
        for parameter in re.findall(r"\s-p (\w+)", command) if names else []:
            if not re.search(rf"^{parameter}: \w+ = .*# @param", content, re.MULTILINE):
                missing.append(f"{parameter} of {', '.join(names)}")
    assert missing == []


def _source(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)
