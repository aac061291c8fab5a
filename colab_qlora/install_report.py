"""What an install did, and what is still wrong after it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from colab_qlora.environment import bitsandbytes_cuda_versions
from colab_qlora.problems import has_cuda_library
from colab_qlora.requirements import (
    REQUIREMENTS,
    canonical_name,
    is_older,
    torch_cuda_build,
    torchao_minimum,
    version_state,
)


@dataclass(frozen=True)
class InstallReport:
    """What an install did.

    Attributes:
        wanted: requirement strings that were missing or too old.
        failed: package -> why pip could not install it.
        changes: package -> (version before, version after); None is "not installed".
        moved: packages among `changes` that were installed before and were not asked for.
        torch_kept: torch has the version that it had.
        restart_needed: a package that this process has imported changed on disk.
        restart_because: those packages.
        commands: what ran, or would run in a dry run.
        dry_run: nothing was changed.
        notes: what else the user should know, one line each.
    """

    wanted: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    torch_kept: bool = True
    restart_needed: bool = False
    restart_because: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Everything wanted is there and torch is what it was."""
        return not self.failed and self.torch_kept

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        said = [f"not installed: {name}: {why}" for name, why in self.failed.items()]
        for name, (before, after) in self.changes.items():
            said.append(f"{name}: {before or 'absent'} -> {after or 'removed'}")
        if self.moved:
            said.append("moved although not asked for: " + ", ".join(self.moved))
        if not self.torch_kept:
            said.append("torch was replaced: reinstall the version named above")
        said.extend(self.notes)
        if self.restart_needed:
            said.append("restart the kernel: already imported: " + ", ".join(self.restart_because))
        if not said:
            said.append("nothing to do" if not self.dry_run else "nothing would be installed")
        return said

    def __str__(self) -> str:
        return "\n".join(self.lines())


def measured_report(
    before: Mapping[str, str],
    after: Mapping[str, str],
    modules: Collection[str],
    *,
    asked: Collection[str],
    wanted: tuple[str, ...],
    failed: Mapping[str, str],
    commands: tuple[str, ...],
) -> InstallReport:
    """The report of an install, with what moved between two sets of installed versions.

    Args:
        before, after: canonical name -> installed version.
        modules: names of the modules that this process has imported.
        asked: canonical names of the packages that were meant to move.
        wanted, failed, commands: as in the report.
    """
    changes = {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
    because = _imported([name for name in changes if before.get(name)], modules)
    return InstallReport(
        wanted=wanted,
        failed=failed,
        changes=changes,
        moved=tuple(name for name in changes if before.get(name) and name not in asked),
        torch_kept=before.get("torch") in (None, after.get("torch")),
        restart_needed=bool(because),
        restart_because=because,
        commands=commands,
        notes=remaining_problems(after),
    )


def remaining_problems(versions: Mapping[str, str]) -> tuple[str, ...]:
    """What pip cannot know: packages that are installed and will fail all the same.

    Args:
        versions: canonical name -> installed version.

    Returns:
        One line each, with the command that mends it.
    """
    notes: list[str] = []
    torch, needed = versions.get("torch"), REQUIREMENTS[0]
    if torch is not None and version_state(torch, needed) == "too old":
        notes.append(f'torch {torch} is too old; run: pip install "{needed.specifier}"')
    torchao = versions.get("torchao")
    if torchao is not None and is_older(torchao, torchao_minimum()):
        notes.append(f"torchao {torchao} makes PEFT fail; run: pip uninstall -y torchao")
    version, cuda = versions.get("bitsandbytes"), torch_cuda_build()
    if version is not None and cuda is not None:
        libraries = bitsandbytes_cuda_versions()
        if not has_cuda_library(cuda, libraries, version):
            notes.append(
                f"bitsandbytes {version} has no library for torch's CUDA {cuda}; "
                "run: pip install -U bitsandbytes"
            )
    return tuple(notes)


def _imported(names: Sequence[str], modules: Collection[str]) -> tuple[str, ...]:
    """Those of the packages whose module is in `modules`."""
    if not names:
        return ()
    provides: dict[str, set[str]] = {name: {name.replace("-", "_")} for name in names}
    try:
        modules_of = importlib.metadata.packages_distributions()
    except Exception:  # one package with broken metadata: the names alone must do
        modules_of = {}
    for module, distributions in modules_of.items():
        for distribution in filter(None, distributions):
            if canonical_name(distribution) in provides:
                provides[canonical_name(distribution)].add(module)
    return tuple(name for name in names if any(module in modules for module in provides[name]))
