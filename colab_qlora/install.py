"""Installs what is missing and moves nothing else: the stage behind notebook 01_install.

A hosted notebook comes with torch, its CUDA parts and a few hundred packages that fit each other. A
plain `pip install trl` there replaces datasets; `-U` replaces more. So everything that is installed
becomes a constraint, and pip may only add. The ladder, from the gentle end:

1. all missing packages in one resolve, everything installed held;
2. each alone, everything installed held;
3. where the constraints leave no version: held is only torch, CUDA, numpy and the notebook itself;
4. where the package index does not answer: from source by git.

What moved is measured afterwards and reported, and so is whether the kernel must restart.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from colab_qlora.environment import detect_platform
from colab_qlora.errors import UserError
from colab_qlora.install_report import InstallReport, measured_report, remaining_problems
from colab_qlora.pip_tools import (
    SOURCES,
    CommandResult,
    Runner,
    failure_kind,
    failure_line,
    pip_command,
    run_command,
    write_constraints,
)
from colab_qlora.requirements import (
    REQUIREMENTS,
    Requirement,
    canonical_name,
    installed_versions,
    is_older,
    missing_requirements,
    torch_cuda_build,
    torchao_minimum,
)
from colab_qlora.selftest import SelfTest, self_test

__all__ = [
    "REQUIREMENTS",
    "SOURCES",
    "CommandResult",
    "InstallReport",
    "Requirement",
    "Runner",
    "SelfTest",
    "install_missing",
    "missing_requirements",
    "run_command",
    "self_test",
    "write_constraints",
]


class _Session:
    """One run of the ladder: where output goes, how commands run, which ones did."""

    def __init__(self, run: Runner, on_line: Callable[[str], object], folder: Path) -> None:
        self.run, self.on_line, self.folder = run, on_line, folder
        self.commands: list[str] = []

    def pip(self, *arguments: str, environ: Mapping[str, str] | None = None) -> CommandResult:
        self.commands.append(shown(arguments))
        self.on_line(f"  {self.commands[-1]}")
        return self.run(pip_command(*arguments), environ)

    def constraints(self, free: Collection[str], core_only: bool = False) -> list[str]:
        # without this, metadata that pip has just written can stay unseen
        importlib.invalidate_caches()
        name = "core.txt" if core_only else "constraints.txt"
        path = write_constraints(self.folder / name, leave_free=free, core_only=core_only)
        return ["-c", str(path)]


def shown(arguments: Sequence[str]) -> str:
    """A pip command as a user types it, requirement strings quoted."""
    parts = [f'"{part}"' if re.search(r"[<>=@ ]", part) else part for part in arguments]
    return " ".join(["pip", *parts])


def install_missing(
    dry_run: bool = False,
    on_line: Callable[[str], object] = print,
    *,
    also: Sequence[str] = (),
    remove_torchao: bool | None = None,
    allow_torch: bool = False,
    run: Runner = run_command,
    versions: Callable[[], dict[str, str]] = installed_versions,
    platform: str | None = None,
    has_cuda_gpu: bool | None = None,
    modules: Collection[str] | None = None,
) -> InstallReport:
    """Installs what is missing or too old, and nothing else.

    Args:
        dry_run: say what would run and change nothing.
        on_line: takes each line of progress.
        also: further packages by name or "name>=minimum", such as "gguf>=0.17".
        remove_torchao: whether to remove a torchao that PEFT rejects. None: on Colab and Kaggle,
            where it comes preinstalled and nobody asked for it.
        allow_torch: install torch too where there is none. pip picks the build; on Linux that is
            one for CUDA, several GB with its libraries.
        run: runs a command; tests put a fake here.
        versions: canonical name -> installed version; tests put a fake here.
        platform: what `detect_platform` says; None asks it.
        has_cuda_gpu: whether triton is needed; None asks the driver.
        modules: names of imported modules; None takes sys.modules.

    Returns:
        What was done; `.ok` is False if something is still missing.

    Raises:
        UserError: there is no torch and `allow_torch` is False, or this Python has no pip.
    """
    platform = detect_platform() if platform is None else platform
    before = versions()
    if "torch" not in before and not allow_torch:
        raise _no_torch()
    wanted = _missing(before, has_cuda_gpu, also)
    with tempfile.TemporaryDirectory(prefix="colab_qlora_") as folder:
        session = _Session(_no_run if dry_run else run, on_line, Path(folder))
        on_line(f"missing: {', '.join(wanted) or 'nothing'}")
        _settle_torchao(session, before.get("torchao"), remove_torchao, platform)
        reasons = _climb(session, wanted) if wanted else {}
    if dry_run:
        return _would_run(before, wanted, session.commands)
    # the interpreter caches folder listings, so it would not see what pip has just written
    importlib.invalidate_caches()
    after = versions()
    # a package can fail alone and still come in with another one, and pip can succeed to no effect
    still = [_name(requirement) for requirement in _missing(after, has_cuda_gpu, also)]
    no_effect = "pip succeeded, but it is out of range"
    return measured_report(
        before,
        after,
        sys.modules if modules is None else modules,
        asked={canonical_name(_name(requirement)) for requirement in wanted} | {"torchao"},
        wanted=tuple(wanted),
        failed={name: reasons.get(name, no_effect) for name in still},
        commands=tuple(session.commands),
    )


def _no_torch() -> UserError:
    return UserError(
        "torch is not installed, and which build is right depends on the machine",
        do=f'Install torch first: pip install "{REQUIREMENTS[0].specifier}"',
    )


def _missing(versions: dict[str, str], has_cuda_gpu: bool | None, also: Sequence[str]) -> list[str]:
    """The table's and the caller's requirements that the installed versions do not meet."""
    missing = missing_requirements(versions, has_cuda_gpu=has_cuda_gpu)
    return missing + [name for name in also if _is_missing(name, versions)]


def _settle_torchao(
    session: _Session, torchao: str | None, remove: bool | None, platform: str
) -> None:
    """Remove a torchao that PEFT rejects, or say that it stays."""
    if torchao is None or not is_older(torchao, torchao_minimum()):
        return
    if remove or (remove is None and platform in ("colab", "kaggle")):
        session.pip("uninstall", "-y", "torchao")
    else:
        session.on_line(f"torchao {torchao} stays: removing it is not this kit's decision here")


def _would_run(
    before: Mapping[str, str], wanted: Sequence[str], commands: Sequence[str]
) -> InstallReport:
    return InstallReport(
        wanted=tuple(wanted),
        commands=tuple(commands),
        dry_run=True,
        notes=(*remaining_problems(before), *(f"would run: {line}" for line in commands)),
    )


def _climb(session: _Session, wanted: Sequence[str]) -> dict[str, str]:
    """Installs the wanted packages by the ladder; returns name -> reason for those that failed."""
    open_names = [_name(requirement) for requirement in wanted]
    together = session.pip("install", *session.constraints(open_names), *wanted)
    if together.returncode == 0:
        return {}
    if "No module named pip" in together.output:
        raise UserError(
            "this Python has no pip",
            do="Run `python -m ensurepip --upgrade`, or install these with your own tool: "
            + " ".join(f'"{requirement}"' for requirement in wanted),
        )
    session.on_line(f"failed: {failure_line(together.output)}")
    if len(wanted) > 1:
        session.on_line("now each package alone:")
    failed: dict[str, str] = {}
    for requirement in wanted:
        # one package alone has been tried already
        result = together if len(wanted) == 1 else None
        reason = _install_one(session, requirement, open_names, result)
        if reason is None:
            # held from now on at the version that it got
            open_names.remove(_name(requirement))
        else:
            failed[_name(requirement)] = reason
            session.on_line(f"failed: {_name(requirement)}: {reason}")
    return failed


def _install_one(
    session: _Session, requirement: str, open_names: Sequence[str], result: CommandResult | None
) -> str | None:
    """Steps 2 to 4 of the ladder for one package; returns why it failed, or None."""
    # constraints are written anew for each step: an earlier one may have moved what they hold
    limits = session.constraints(open_names)
    if result is None:
        result = session.pip("install", *limits, requirement)
    if result.returncode != 0 and failure_kind(result.output) == "conflict":
        session.on_line(f"no version fits beside what is installed: {failure_line(result.output)}")
        session.on_line("now holding only torch, CUDA, numpy and the notebook:")
        limits = session.constraints(open_names, core_only=True)
        result = session.pip("install", *limits, requirement)
    if result.returncode == 0:
        return None
    reason = failure_line(result.output)
    if failure_kind(result.output) == "index" and canonical_name(_name(requirement)) in SOURCES:
        session.on_line(f"the package index has no answer ({reason}); from source by git:")
        result = _from_source(session, requirement, limits)
        if result.returncode == 0:
            return None
        reason += f"; from source: {failure_line(result.output)}"
    return reason


def _from_source(session: _Session, requirement: str, limits: Sequence[str]) -> CommandResult:
    source = f"{_name(requirement)} @ {SOURCES[canonical_name(_name(requirement))]}"
    # a source build of bitsandbytes makes only its CPU library unless told otherwise
    needs_cuda = source.startswith("bitsandbytes") and torch_cuda_build() is not None
    environ = {"CMAKE_ARGS": "-DCOMPUTE_BACKEND=cuda"} if needs_cuda else None
    result = session.pip("install", *limits, source, environ=environ)
    no_clone = "fatal:" in result.output
    if result.returncode != 0 and failure_kind(result.output) == "index" and not no_clone:
        # the build tools come from the index too; a hosted notebook has them, and the dependencies
        result = session.pip(
            "install", "--no-build-isolation", "--no-deps", source, environ=environ
        )
    return result


def _no_run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> CommandResult:
    return CommandResult(0, "")


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    return match[0] if match else requirement


def _is_missing(requirement: str, versions: Mapping[str, str]) -> bool:
    version = versions.get(canonical_name(_name(requirement)))
    minimum = re.search(r">=\s*([\w.]+)", requirement)
    return version is None or (minimum is not None and is_older(version, minimum[1]))
