"""What is wrong with this machine, and for each finding the one command that mends it.

Severities: "error" - the kit cannot train; "warning" - it can, but something will bite; "info" -
nothing is wrong, but it explains what the kit does here. Pure: the same `Environment` always gives
the same list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from colab_qlora.requirements import (
    REQUIREMENTS,
    TORCHAO_MINIMUM,
    Requirement,
    is_older,
    release,
    version_state,
)

if TYPE_CHECKING:
    from colab_qlora.environment import Environment

Severity = Literal["error", "warning", "info"]

INSTALL = "python -m colab_qlora install"
# a 7B checkpoint that is already in 4 bit is a download of about 4 GiB, one in 16 bit of about 14
# GiB
DISK_GIB = 5.0
# a rule of thumb, not a measurement: Python with torch and CUDA, and one shard of a 7B checkpoint
HOST_GIB = 6.0
_ORDER = {"error": 0, "warning": 1, "info": 2}
_FRESH_RUNTIME = "Runtime > Disconnect and delete runtime"
_NO_GPU = {
    "colab": "Runtime > Change runtime type > T4 GPU",
    "kaggle": "Settings > Accelerator > GPU T4 x2",
    "runpod": "start a pod that has a GPU",
    "lambda": "start an instance that has a GPU",
}


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        severity: "error", "warning" or "info".
        what: what is the matter and what follows from it, one line.
        command: the command or the menu entry that mends it; "" where there is nothing to mend.
    """

    severity: Severity
    what: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}" + (
            f"\n    -> {self.command}" if self.command else ""
        )


def find_problems(env: Environment) -> list[Problem]:
    """All findings about an environment, errors first.

    Args:
        env: what `inspect_environment` returned.
    """
    found = [
        *_python(env),
        *_torch(env),
        *_gpu(env),
        *_packages(env),
        *_torchao(env),
        *_bitsandbytes(env),
        *_room(env),
    ]
    return sorted(found, key=lambda problem: _ORDER[problem.severity])


def _requirement(name: str) -> Requirement:
    return next(requirement for requirement in REQUIREMENTS if requirement.name == name)


def _reinstall_torch() -> str:
    # never --force-reinstall, which would reinstall numpy and everything else below torch as well
    return f'pip uninstall -y torch && pip install "{_requirement("torch").specifier}"'


def _python(env: Environment) -> Iterator[Problem]:
    if env.python and not (3, 10) <= release(env.python)[:2] <= (3, 13):
        yield Problem(
            "warning",
            f"Python {env.python} is not tested; 3.10 to 3.13 are",
            "python3.12 -m venv .venv",
        )


def _torch(env: Environment) -> Iterator[Problem]:
    needed = _requirement("torch")
    install = f'pip install "{needed.specifier}"'
    if env.torch_error is not None:
        yield Problem(
            "error",
            f"torch {env.torch_version or ''} cannot be imported: {env.torch_error}".replace(
                "  ", " "
            ),
            _FRESH_RUNTIME if env.platform == "colab" else _reinstall_torch(),
        )
        return
    state = version_state(env.torch_version, needed)
    if state == "missing":
        yield Problem("error", "torch is not installed", install)
    elif state == "too old":
        yield Problem(
            "error", f"torch {env.torch_version} is too old: {needed.range} is needed", install
        )
    elif state == "too new":
        yield Problem(
            "warning", f"torch {env.torch_version} is not tested: {needed.range} is", install
        )


def _gpu(env: Environment) -> Iterator[Problem]:
    if env.torch_version is None or env.torch_error is not None:
        return
    if env.gpu_count == 0:
        yield from _without_gpu(env)
        return
    capability = env.compute_capability or (0, 0)
    sm = f"sm_{capability[0]}{capability[1]}"
    if not env.gpu_in_torch_build:
        yield Problem(
            "error",
            f"torch {env.torch_version} holds no code for this {env.gpu_name} ({sm}): "
            "every GPU operation fails",
            _NO_GPU.get(env.platform, "use a GPU of compute capability 7.5 or later"),
        )
    elif env.cuda_error is not None:
        yield Problem("error", f"the GPU does not answer: {env.cuda_error}", "nvidia-smi")
    if capability < (8, 0):
        yield Problem(
            "info",
            f"{env.gpu_name} ({sm}) has no bfloat16: the kit computes in float16 with loss scaling,"
            " leaves matrix products to cuBLAS and attention to SDPA; Triton kernels do the rest",
        )
    if env.gpu_count > 1:
        yield Problem(
            "info",
            f"{env.gpu_count} GPUs; the kit trains on one. Hide the others before importing torch",
            # an export inside a notebook's ! line ends with that line
            ("%env " if env.platform in ("colab", "kaggle") else "export ")
            + "CUDA_VISIBLE_DEVICES=0",
        )
    free, total = env.gpu_free_gib, env.gpu_total_gib
    # the look itself costs a CUDA context of a few tenths of a GiB, so small use says nothing
    if free is not None and total is not None and total - free > max(1.0, 0.05 * total):
        yield Problem(
            "info",
            f"{total - free:.1f} of {total:.1f} GiB of GPU memory is in use, by this notebook or "
            "another program",
            "Runtime > Restart session" if env.platform == "colab" else "nvidia-smi",
        )


def _without_gpu(env: Environment) -> Iterator[Problem]:
    if env.cuda_visible_devices is not None and env.cuda_visible_devices.strip() in ("", "-1"):
        yield Problem(
            "info",
            "CUDA_VISIBLE_DEVICES hides every GPU: the embedded model runs on the CPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
        return
    if env.driver_gpus and env.cuda_build is None:
        yield Problem(
            "error",
            f"there is a {env.driver_gpus[0]}, but torch {env.torch_version} is a CPU build",
            _FRESH_RUNTIME if env.platform == "colab" else _reinstall_torch(),
        )
        return
    if env.driver_gpus:
        yield Problem(
            "error",
            f"there is a {env.driver_gpus[0]}, but torch {env.torch_version}"
            f" (CUDA {env.cuda_build}) cannot use it"
            + (f": {env.cuda_error}" if env.cuda_error else "")
            + "; most often the driver is older than this CUDA needs",
            _FRESH_RUNTIME
            if env.platform == "colab"
            else "nvidia-smi  # its CUDA version must reach torch's: update the driver",
        )
        return
    yield Problem(
        "warning" if env.platform in _NO_GPU else "info",
        "no GPU: the embedded small model runs on the CPU, a 7B model does not",
        _NO_GPU.get(env.platform, ""),
    )


def _packages(env: Environment) -> Iterator[Problem]:
    for requirement in REQUIREMENTS:
        if requirement.name == "torch":
            continue
        if requirement.gpu_only and (env.gpu_count == 0 or not env.os.startswith("Linux")):
            continue
        version = env.versions.get(requirement.name)
        state = version_state(version, requirement)
        severity: Severity = "error" if requirement.needed else "warning"
        if state == "missing":
            yield Problem(severity, f"{requirement.name} is not installed", INSTALL)
        elif state == "too old":
            yield Problem(
                severity,
                f"{requirement.name} {version} is too old: {requirement.range} is needed",
                INSTALL,
            )
        elif state == "too new":
            yield Problem(
                "warning",
                f"{requirement.name} {version} is not tested: {requirement.range} is",
                f'pip install "{requirement.specifier}"',
            )


def _torchao(env: Environment) -> Iterator[Problem]:
    version, minimum = env.versions.get("torchao"), env.torchao_minimum or TORCHAO_MINIMUM
    if version is not None and is_older(version, minimum):
        yield Problem(
            "error",
            f"torchao {version} makes PEFT raise ImportError; {minimum} or later, or none, is fine",
            "pip uninstall -y torchao",
        )


def _bitsandbytes(env: Environment) -> Iterator[Problem]:
    version = env.versions.get("bitsandbytes")
    if version is None or env.cuda_build is None or not (env.gpu_count or env.driver_gpus):
        return
    if not has_cuda_library(env.cuda_build, env.bitsandbytes_cuda, version):
        have = ", ".join(env.bitsandbytes_cuda) or "none"
        yield Problem(
            "error",
            f"bitsandbytes {version} has no library for torch's CUDA {env.cuda_build}"
            f" (it has: {have})",
            "pip install -U bitsandbytes",
        )


def has_cuda_library(cuda_build: str, libraries: tuple[str, ...], version: str) -> bool:
    """Whether this bitsandbytes finds a library for torch's CUDA.

    Args:
        cuda_build: torch's CUDA version, such as "12.8".
        libraries: what bitsandbytes ships, such as ("126", "128").
        version: of bitsandbytes. From 0.50 on it falls back to another minor of the same CUDA
            major; before, it takes the exact version only.
    """
    major, minor = (*release(cuda_build), 0)[:2]
    if f"{major}{minor}" in libraries:
        return True
    return not is_older(version, "0.50") and any(name[:2] == str(major) for name in libraries)


def _room(env: Environment) -> Iterator[Problem]:
    if env.disk_free_gib is not None and env.disk_free_gib < DISK_GIB:
        yield Problem(
            "warning",
            f"{env.disk_free_gib:.1f} GiB of disk is free; a 7B model in 4 bit takes about "
            f"{DISK_GIB:.0f}",
            "hf cache ls  # then: hf cache rm model/NAME for each model that is not needed",
        )
    if env.host_free_gib is not None and env.host_free_gib < HOST_GIB:
        yield Problem(
            "warning",
            f"{env.host_free_gib:.1f} GiB of host memory is free; loading a 7B model takes about "
            f"{HOST_GIB:.0f}",
            "Runtime > Restart session" if env.platform == "colab" else "close other notebooks",
        )
