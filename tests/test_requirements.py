"""requirements.txt against pyproject.toml, the kit's own table and what Colab preinstalls.

The tests marked `network` ask pip what it would install, on a copy of Colab's set. Nothing is
installed, and torch and triton are stood in for by empty wheels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from colab_qlora.requirements import REQUIREMENTS

ROOT = Path(__file__).resolve().parent.parent
FREEZE = ROOT / "tests" / "constraints" / "colab-2026-08-19.txt"
COLAB_PYTHON = "3.13"
PIP_SECONDS = 170
# what Colab lacks: four packages that the kit asks for, and what they need themselves
ASKED_FOR = {"bitsandbytes", "trl", "gguf", "papermill"}
MAX_NEW_PACKAGES = 8
# torch's own needs, without the CUDA libraries, which are several GB
TORCH_NEEDS = (
    "triton==3.6.0; platform_system == 'Linux'",
    "filelock",
    "typing-extensions>=4.10.0",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
)


def _parse(lines: list[str]) -> dict[str, Requirement]:
    stripped = [line.strip() for line in lines]
    found = [Requirement(line) for line in stripped if line and not line.startswith("#")]
    names = [str(canonicalize_name(requirement.name)) for requirement in found]
    assert len(names) == len(set(names)), "a package is listed twice"
    return dict(zip(names, found, strict=True))


def _pyproject_lines() -> list[str]:
    # no tomllib in Python 3.10
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None, "no dependencies in pyproject.toml"
    return re.findall(r'^\s*"([^"]+)"', block[1], re.MULTILINE)


FILE = _parse((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
PROJECT = _parse(_pyproject_lines())
COLAB = {
    name: next(iter(requirement.specifier)).version
    for name, requirement in _parse(FREEZE.read_text(encoding="utf-8").splitlines()).items()
}
TABLE = {str(canonicalize_name(entry.name)): entry for entry in REQUIREMENTS}


def _bounds(requirement: Requirement) -> tuple[Version, Version | None]:
    """The version from ">=" and the one from "<" (None: no upper bound)."""
    by_operator = {specifier.operator: specifier.version for specifier in requirement.specifier}
    assert set(by_operator) <= {">=", "<"}, f"{requirement}: only >= and < can be compared"
    assert ">=" in by_operator, f"{requirement} has no lower bound"
    return Version(by_operator[">="]), Version(by_operator["<"]) if "<" in by_operator else None


def test_the_freeze_is_a_list_of_exact_pins() -> None:
    pins = _parse(FREEZE.read_text(encoding="utf-8").splitlines())
    assert len(pins) > 600
    assert [str(r) for r in pins.values() if not re.fullmatch(r"==[^,*]+", str(r.specifier))] == []
    assert COLAB["torch"] == "2.11.0+cu128"


def test_both_files_list_the_same_packages_for_the_same_machines() -> None:
    assert set(FILE) == set(PROJECT)
    assert {n: str(r.marker) for n, r in FILE.items()} == {
        n: str(r.marker) for n, r in PROJECT.items()
    }


@pytest.mark.parametrize("name", sorted(set(FILE) & set(PROJECT)))
def test_pyproject_admits_all_that_requirements_txt_admits(name: str) -> None:
    lowest, below = _bounds(FILE[name])
    project_lowest, project_below = _bounds(PROJECT[name])
    assert project_lowest <= lowest
    assert project_below is None or (below is not None and below <= project_below)


@pytest.mark.parametrize("name", sorted(set(FILE) & set(TABLE)))
def test_the_table_of_the_kit_asks_for_the_same_minimum(name: str) -> None:
    lowest, below = _bounds(FILE[name])
    assert Version(TABLE[name].minimum) == lowest
    if TABLE[name].below is not None:
        assert below == Version(str(TABLE[name].below))


def test_all_that_the_table_lists_is_in_requirements_txt() -> None:
    assert set(TABLE) - set(FILE) == set()


@pytest.mark.parametrize("name", sorted(set(FILE) & set(COLAB)))
def test_what_colab_preinstalls_is_admitted(name: str) -> None:
    assert FILE[name].specifier.contains(COLAB[name], prereleases=True), (
        f"{FILE[name]} would move Colab's {name} {COLAB[name]}"
    )


# ---- what pip would do


def _wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """An empty pure-Python wheel with that name, version and needs."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    wheel = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def _imitation(folder: Path, versions: dict[str, str]) -> Path:
    """The interpreter of a new environment in which pip believes these versions installed."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120
    )
    (packages,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    for name, version in versions.items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n", encoding="utf-8")
    (python,) = [*folder.glob("bin/python"), *folder.glob("Scripts/python.exe")]
    return python


def _pip(*arguments: str, seconds: int = PIP_SECONDS) -> subprocess.CompletedProcess[str]:
    # an environment that is active for the tests must not hide the one that pip is sent to
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        cwd=ROOT,
        env=environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def _would_install(report: Path, *arguments: str, python: Path | None = None) -> dict[str, str]:
    """Canonical name -> version of all that `pip install` would install; nothing is."""
    front = ["--python", str(python)] if python else []
    command = [*front, "install", "--dry-run", "--quiet", "--report", str(report), *arguments]
    done = _pip(*command)
    assert done.returncode == 0, f"pip {' '.join(command)}\n{done.stdout}\n{done.stderr}"
    items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"] for i in items}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips, with pip's own words, where the package index does not answer."""
    if sys.platform != "linux":
        pytest.skip(f"Colab's set is for Linux; this is {sys.platform}")
    target = tmp_path_factory.mktemp("probe")
    probe = ["install", "--dry-run", "--no-deps", "--retries", "1", "--timeout", "20"]
    probe += ["--no-cache-dir", "--ignore-installed", "--target", str(target), "papermill"]
    try:
        done = _pip(*probe, seconds=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index does not answer: pip gave up after 60 s")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
        pytest.skip(f"the package index does not answer: {lines[-1][-200:]}")


def _check_new_packages(new: set[str]) -> None:
    print(f"not preinstalled on Colab, {len(new)}: {', '.join(sorted(new))}")
    assert new >= ASKED_FOR - set(COLAB)
    assert len(new) <= MAX_NEW_PACKAGES, sorted(new)


@pytest.mark.network
@pytest.mark.usefixtures("index")
def test_everything_resolves_at_the_versions_that_colab_preinstalls(tmp_path: Path) -> None:
    links = tmp_path / "links"
    _wheel(links, "torch", COLAB["torch"], TORCH_NEEDS)
    _wheel(links, "triton", COLAB["triton"])
    resolved = _would_install(
        tmp_path / "report.json",
        *("--ignore-installed", "--target", str(tmp_path / "target")),
        *("--python-version", COLAB_PYTHON, "--only-binary=:all:"),
        *("--find-links", str(links), "-r", "requirements.txt", "-c", str(FREEZE)),
    )
    assert resolved.keys() >= FILE.keys()
    moved = {n: (COLAB[n], v) for n, v in resolved.items() if n in COLAB and v != COLAB[n]}
    assert moved == {}
    _check_new_packages(resolved.keys() - COLAB.keys())


@pytest.mark.network
@pytest.mark.usefixtures("index")
def test_without_constraints_nothing_preinstalled_is_touched(tmp_path: Path) -> None:
    python = _imitation(tmp_path / "colab", COLAB)
    resolved = _would_install(
        tmp_path / "report.json", "--only-binary=:all:", "-r", "requirements.txt", python=python
    )
    assert {n: (COLAB[n], v) for n, v in resolved.items() if n in COLAB} == {}
    _check_new_packages(set(resolved))


def test_the_imitation_shows_a_package_that_is_moved(tmp_path: Path) -> None:
    # the control of the test above: an empty list there must mean something
    python = _imitation(tmp_path / "colab", {"kept-one": "1.0", "moved-one": "1.0"})
    links = tmp_path / "links"
    _wheel(links, "new-one", "1.0", ("kept-one>=1.0", "moved-one>=2"))
    _wheel(links, "kept-one", "2.0")
    _wheel(links, "moved-one", "2.0")
    resolved = _would_install(
        tmp_path / "report.json", "--no-index", "--find-links", str(links), "new-one", python=python
    )
    assert resolved == {"new-one": "1.0", "moved-one": "2.0"}
