"""The code cells of the notebooks: they compile, import what exists, and run no stray command.

Nothing is executed; calls of the kit are checked against its signatures.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from notebook_files import NOTEBOOKS, REPOSITORY, ROOT, Notebook, transform

# characters outside ASCII that a source file may hold: none so far
ALLOWED_CHARACTERS = ""
TOKENS = re.compile(
    r"\b(?:hf|ghp|gho|ghs|sk|pk|wandb|xox[abp])[_-][A-Za-z0-9_-]{16,}|github_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|-----BEGIN|\b[0-9a-f]{40,}\b"
)
MACHINE_PATHS = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|Users|mnt|tmp|work|content|workspace|opt|usr|var|data|kaggle)/"
    r"|\b[A-Za-z]:\\\\?\w|file://"
)


def test_code_compiles(notebook: Notebook) -> None:
    for cell, tree in notebook.trees():
        compile(tree, f"{notebook.name} {cell['id']}", "exec")


def test_names_are_bound_before_they_are_used(notebook: Notebook) -> None:
    """Cells run from top to bottom: a name of a later cell or of nowhere is a NameError."""
    known = set(dir(builtins)) | {"get_ipython", "__name__"}
    for _, tree in notebook.trees():
        bound, used = _names(tree)
        assert used - bound - known == set()
        known |= bound


def _names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a cell binds anywhere, and names that it reads."""
    bound: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return bound, used


def _imports(notebook: Notebook) -> Iterator[tuple[str, str | None, str]]:
    """(module, name or None, the name that it is bound to) of each import."""
    for _, tree in notebook.trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None
                for alias in node.names:
                    yield node.module, alias.name, alias.asname or alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, None, alias.asname or alias.name.split(".")[0]


def test_what_is_imported_from_the_kit_exists(notebook: Notebook) -> None:
    pytest.importorskip("torch")
    missing = []
    for module, name, _ in _imports(notebook):
        if module.split(".")[0] == "colab_qlora":
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                missing.append(f"{module}.{name}")
    assert missing == []


def test_what_else_is_imported_is_required(notebook: Notebook) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[^\w-]", line)[0] for line in lines if line and line[0] != "#"}
    # ipykernel, which is required, brings IPython
    allowed = required | {"colab_qlora", "IPython"} | set(sys.stdlib_module_names)
    assert {module.split(".")[0] for module, _, _ in _imports(notebook)} - allowed == set()


def test_calls_of_the_kit_fit_its_signatures(notebook: Notebook) -> None:
    pytest.importorskip("trl")
    kit = {
        bound: getattr(importlib.import_module(module), name)
        for module, name, bound in _imports(notebook)
        if name is not None and module.split(".")[0] == "colab_qlora"
    }
    made: dict[str, type] = {}
    wrong = []
    for _, tree in notebook.trees():
        made |= _made_by(tree, kit)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                wrong += _misfits(node, kit, made)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = made.get(node.value.id)
                if owner is not None and node.attr not in _attributes(owner):
                    wrong.append(f"{ast.unparse(node)}: {owner.__name__} has no such attribute")
    assert wrong == []


def _made_by(tree: ast.Module, kit: dict[str, Any]) -> dict[str, type]:
    """Variable -> class, where the value is made by a class or a typed function of the kit."""
    made = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        target, call = node.targets[0], node.value.func
        if isinstance(target, ast.Name) and isinstance(call, ast.Name) and call.id in kit:
            maker = kit[call.id]
            kind = maker if inspect.isclass(maker) else _hints(maker).get("return")
            if inspect.isclass(kind) and kind.__module__.startswith("colab_qlora"):
                made[target.id] = kind
    return made


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a type that is imported for type checkers only
        return {}


def _attributes(kind: type) -> set[str]:
    """Names that an instance has: of the class, its fields, and what its methods set."""
    fields = {name for base in kind.__mro__ for name in base.__dict__.get("__annotations__", ())}
    return set(dir(kind)) | fields | set(re.findall(r"self\.(\w+)", inspect.getsource(kind)))


def _misfits(call: ast.Call, kit: dict[str, Any], made: dict[str, type]) -> list[str]:
    """Why the arguments of a call of the kit do not bind. Starred ones are taken to be right."""
    node, itself = call.func, []
    if isinstance(node, ast.Name):
        target = kit.get(node.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        name = node.value.id
        if name in made:
            target, itself = getattr(made[name], node.attr, None), [None]
        else:
            target = getattr(kit[name], node.attr) if name in kit else None
    else:
        target = None
    if target is None:
        return []
    is_open = any(isinstance(a, ast.Starred) for a in call.args)
    is_open |= any(keyword.arg is None for keyword in call.keywords)
    signature = inspect.signature(target)
    try:
        bind = signature.bind_partial if is_open else signature.bind
        positional = [a for a in call.args if not isinstance(a, ast.Starred)]
        bind(*itself, *positional, **{k.arg: k.value for k in call.keywords if k.arg is not None})
    except TypeError as error:
        return [f"{ast.unparse(node)}: {error}"]
    return []


# ---- what a participant on Colab meets


def test_what_an_install_could_not_do_is_said(notebook: Notebook) -> None:
    """The report names packages that failed and asks for a restart; unprinted, nobody sees it."""
    (cell,) = [c for c in notebook.of_type("code") if "install_missing(" in c["source"]]
    printed = [call for call in _calls(cell["source"], "print") if call.args]
    shown = {ast.unparse(call.args[0]) for call in printed}
    assert "report" in shown or any(text.startswith("install_missing(") for text in shown)


def test_models_are_not_exported_to_drive() -> None:
    """A free Drive holds 15 GB, a merged 8B takes 16: with use_drive, too, the disk is local."""
    (path,) = [path for path in NOTEBOOKS if path.stem == "07_chat_and_export"]
    source = "\n".join(cell["source"] for cell in Notebook(path).of_type("code"))
    (made,) = re.findall(r"^disk = (.+)$", source, re.MULTILINE)
    assert made == "WorkFolder(work_dir)"
    calls = [
        call
        for name in ("save_pretrained_merged", "save_pretrained_gguf")
        for call in _calls(source, name)
    ]
    assert [ast.unparse(call.args[0]) for call in calls] == ["disk / 'merged'", "disk / 'gguf'"]


def _calls(source: str, name: str) -> list[ast.Call]:
    """The calls of a function or a method of that name."""
    return [
        node
        for node in ast.walk(ast.parse(transform(source)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name
    ]


# ---- what must not be there


def test_nothing_that_can_replace_torch_is_run(notebook: Notebook) -> None:
    allowed = f"%pip install -q --no-deps git+{REPOSITORY}"
    lines = [line for c in notebook.of_type("code") for line in c["source"].split("\n")]
    install = re.compile(r"\b(?:pip3?|uv|conda|mamba|apt(?:-get)?)\b.*\binstall\b")
    shell = re.compile(r"^\s*(?:!|%%bash|%%sh\b|%%script|%system)|os\.system|subprocess")
    found = [line.strip() for line in lines if install.search(line) or shell.search(line)]
    assert found == [allowed]


def test_no_secret_and_no_path_of_a_machine(notebook: Notebook) -> None:
    texts = [cell["source"] for cell in notebook.cells]
    texts += [json.dumps(cell["metadata"]) for cell in notebook.cells]
    texts.append(json.dumps(notebook.content["metadata"]))
    assert [m[0] for text in texts for m in TOKENS.finditer(text)] == []
    assert [m[0] for text in texts for m in MACHINE_PATHS.finditer(text)] == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("token='hf_abcdefghijklmnopqrstuvwx'", True),
        ("key = 'ghp_0123456789abcdefghijABCDEFGHIJ012345'", True),
        ("0123456789abcdef0123456789abcdef01234567", True),
        ("git+https://github.com/colab-qlora/colab_qlora", False),
        ("lora_alpha, hf_home, sk-learn", False),
    ],
)
def test_the_search_for_secrets_finds_them(text: str, is_found: bool) -> None:
    assert bool(TOKENS.search(text)) is is_found


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ('open("/home/someone/train.jsonl")', True),
        ("/content/drive/x", True),
        (r"C:\Users\someone", True),
        ("https://host/data/x and work/data/train.jsonl and a/b", False),
    ],
)
def test_the_search_for_machine_paths_finds_them(text: str, is_found: bool) -> None:
    assert bool(MACHINE_PATHS.search(text)) is is_found


def test_sources_are_ascii() -> None:
    found = []
    for path in _tracked():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            # JSON can hide a character behind an escape
            text = _flat(json.loads(text))
        odd = sorted({c for c in text if ord(c) > 126 or (ord(c) < 32 and c not in "\n\t")})
        odd = [c for c in odd if c not in ALLOWED_CHARACTERS]
        if odd:
            found.append(f"{path.relative_to(ROOT)}: {' '.join(f'U+{ord(c):04X}' for c in odd)}")
    assert found == []


def _flat(value: Any) -> str:
    """All texts in a JSON value, one after the other."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return "".join(map(_flat, value)) if isinstance(value, list) else str(value)


def _tracked() -> list[Path]:
    """Source files that git tracks or would take, and without git those of the known folders."""
    suffixes = {".py", ".ipynb", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("colab_qlora", "notebooks", "tests", "benchmarks", "docs")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(p for p in paths if p.suffix in suffixes and p.is_file())


def test_notebooks_are_tracked_by_git() -> None:
    command = ["git", "ls-files", "notebooks"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    assert {f"notebooks/{path.name}" for path in NOTEBOOKS} <= set(done.stdout.split("\n"))
