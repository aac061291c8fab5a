"""What the kit needs installed, in one table, and how an installed version compares with it.

`environment.py` reads the table to find problems and `install.py` reads it to mend them, so the two
cannot disagree. Versions come from package metadata: nothing is imported, which takes milliseconds
and works when a package is broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colab_qlora.host import driver_gpu_names

# PEFT raises ImportError from inside get_peft_model for an older torchao, although this kit never
# uses torchao. Colab preinstalls 0.10.0. The number stands in for PEFT's own where PEFT is not
# installed yet.
TORCHAO_MINIMUM = "0.16.0"

State = Literal["ok", "missing", "too old", "too new"]


@dataclass(frozen=True)
class Requirement:
    """One package and the versions that the kit works with.

    Attributes:
        name: the name that pip knows.
        minimum: the oldest version that works.
        below: the first version that is not tested, or None for no upper bound.
        gpu_only: needed only on Linux with a CUDA GPU (triton has no other wheels).
        needed: True if nothing trains without it; False if only a notebook's comfort depends on it.
    """

    name: str
    minimum: str
    below: str | None = None
    gpu_only: bool = False
    needed: bool = True

    @property
    def range(self) -> str:
        """The versions as pip writes them, such as ">=5.15,<6"."""
        return f">={self.minimum}" + (f",<{self.below}" if self.below else "")

    @property
    def specifier(self) -> str:
        """Name and versions as pip takes them, such as "transformers>=5.15,<6"."""
        return self.name + self.range


# The minimums are what Colab preinstalls (image of 2026-08-19) or the oldest that the tests run on.
REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("torch", "2.11", "2.14"),
    Requirement("triton", "3.6", gpu_only=True),
    Requirement("numpy", "2.0"),
    Requirement("safetensors", "0.4.3"),
    Requirement("transformers", "5.15", "6"),
    Requirement("accelerate", "1.10"),
    Requirement("peft", "0.20"),
    Requirement("bitsandbytes", "0.49"),
    Requirement("datasets", "4.0"),
    # with datasets 4.0 held, pip picks trl 0.29.1 by itself: trl 1.x needs datasets 4.7
    Requirement("trl", "0.29.1"),
    Requirement("matplotlib", "3.10"),
    Requirement("ipywidgets", "7.7.1", needed=False),
)

# what the doctor shows the version of: the table above and what explains a bug report
REPORTED: tuple[str, ...] = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "ipywidgets",
    "IPython",
    "ipykernel",
    "matplotlib",
    "papermill",
    "gguf",
    "torchao",
)


def canonical_name(name: str) -> str:
    """The spelling under which pip treats two package names as one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "2.11.0+cu128" gives (2, 11, 0).

    Pre-release and local parts are dropped on purpose: a source build "0.30.0.dev0" has what 0.30
    has, and "2.14.0a0" is as untested as 2.14.
    """
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else (0,)


def is_older(version: str, than: str) -> bool:
    """Whether `version` comes before `than`; 2.11 and 2.11.0 are the same."""
    a, b = release(version), release(than)
    length = max(len(a), len(b))
    return a + (0,) * (length - len(a)) < b + (0,) * (length - len(b))


def version_state(version: str | None, requirement: Requirement) -> State:
    """How an installed version (None: not installed) stands to a requirement."""
    if version is None:
        return "missing"
    if is_older(version, requirement.minimum):
        return "too old"
    if requirement.below is not None and not is_older(version, requirement.below):
        return "too new"
    return "ok"


def installed_version(name: str) -> str | None:
    """The installed version of one package, or None. Imports nothing."""
    try:
        return importlib.metadata.version(name) or None
    except Exception:  # a half-removed package can raise more than PackageNotFoundError
        return None


def installed_versions() -> dict[str, str]:
    """Canonical name -> version of every installed package. Imports nothing."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # a folder of metadata without its file: pip ignores it as well
            continue
        if name and version:
            # the first on the path is the one that an import finds
            found.setdefault(canonical_name(name), version)
    return found


def missing_requirements(
    versions: Mapping[str, str] | None = None, *, has_cuda_gpu: bool | None = None
) -> list[str]:
    """Requirement strings for what is missing or too old, in the table's order.

    Whatever is installed in range or newer is left out, and torch is left out whenever any torch is
    installed: replacing torch is the user's decision, never this kit's.

    Args:
        versions: canonical name -> version; None reads what is installed.
        has_cuda_gpu: whether triton is needed; None asks the driver.
    """
    versions = installed_versions() if versions is None else versions
    wanted: list[str] = []
    for requirement in REQUIREMENTS:
        version = versions.get(canonical_name(requirement.name))
        state = version_state(version, requirement)
        if state not in ("missing", "too old"):
            continue
        if requirement.name == "torch" and state != "missing":
            continue
        if requirement.gpu_only:
            if sys.platform != "linux":
                continue
            if has_cuda_gpu is None:
                has_cuda_gpu = bool(driver_gpu_names())
            if not has_cuda_gpu:
                continue
        wanted.append(_pinned_by_torch(requirement) or requirement.specifier)
    return wanted


def _pinned_by_torch(requirement: Requirement) -> str | None:
    # each torch is built against one triton: 2.11 against 3.6.0, 2.13 against 3.7.1
    if requirement.name != "triton":
        return None
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for need in needs:
        match = re.match(r"triton\s*\(?(==[\w.]+)", need)
        if match:
            return "triton" + match[1]
    return None


def torch_cuda_build() -> str | None:
    """The CUDA version that torch was built for ("12.8"), or None. Imports nothing."""
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*[\"']([\d.]+)[\"']", text, re.MULTILINE)
    return match[1] if match else None


def torchao_minimum() -> str:
    """The oldest torchao that PEFT accepts, read from PEFT's source. Imports nothing."""
    try:
        spec = importlib.util.find_spec("peft")
        if spec is None or spec.origin is None:
            return TORCHAO_MINIMUM
        text = (Path(spec.origin).parent / "import_utils.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return TORCHAO_MINIMUM
    match = re.search(r"TORCHAO_MINIMUM_VERSION\s*=\s*[\w.]+\(\s*[\"']([\d.]+)[\"']", text)
    return match[1] if match else TORCHAO_MINIMUM
