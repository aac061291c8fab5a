"""What machine is this: platform, memory, GPU, dtype and versions, and what is wrong with it.

    >>> from colab_qlora.environment import find_problems, inspect_environment
    >>> env = inspect_environment()
    >>> for problem in find_problems(env):
    ...     print(problem)

`inspect_environment` looks once and returns a frozen record; `find_problems` is pure over that
record, so each verdict can be tested without the machine it is about. Nothing here raises because
torch is missing or
broken: that is a finding.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from colab_qlora.dtypes import has_native_bfloat16, pick_compute_dtype, resolve_dtype
from colab_qlora.host import (
    GIB,
    cpu_has_native_bfloat16,
    disk_free_gib,
    driver_gpu_names,
    host_memory_gib,
)
from colab_qlora.problems import Problem, find_problems
from colab_qlora.requirements import (
    REPORTED,
    installed_version,
    torch_cuda_build,
    torchao_minimum,
)

__all__ = [
    "Environment",
    "Platform",
    "Problem",
    "cpu_has_native_bfloat16",
    "detect_platform",
    "find_problems",
    "has_native_bfloat16",
    "inspect_environment",
    "pick_compute_dtype",
    "resolve_dtype",
]

Platform = Literal["colab", "kaggle", "runpod", "lambda", "plain"]


@dataclass(frozen=True)
class Environment:
    """One look at the machine. Sizes are GiB; None means unknown or absent.

    Attributes:
        platform: "colab", "kaggle", "runpod", "lambda" or "plain".
        torch_version: from the package metadata, so it is there even when the import fails.
        torch_error: why `import torch` failed, one line.
        cuda_build: the CUDA version that torch was built for ("12.8"); None for a CPU build.
        cuda_error: why a CUDA build of torch sees no GPU, one line.
        driver_gpus: GPU names from the driver, asked only where torch sees no GPU.
        gpu_in_torch_build: whether torch holds code for this GPU's architecture.
        compute_dtype: what `pick_compute_dtype` chooses: "float16", "bfloat16" or "float32".
        has_native_bf16: of the GPU where there is one, else of the CPU.
        has_triton_matmul: compute capability 8.0 or later. Below, Triton since 3.3 makes no
            tensor-core code, so matrix products go to cuBLAS there.
        bitsandbytes_cuda: CUDA versions of the libraries that bitsandbytes ships: ("126", "128").
        versions: package -> version, or None where it is not installed.
    """

    platform: Platform = "plain"
    os: str = ""
    python: str = ""
    cpu_count: int = 1
    host_total_gib: float | None = None
    host_free_gib: float | None = None
    disk_free_gib: float | None = None
    torch_version: str | None = None
    torch_error: str | None = None
    cuda_build: str | None = None
    cuda_error: str | None = None
    cuda_visible_devices: str | None = None
    driver_gpus: tuple[str, ...] = ()
    gpu_count: int = 0
    gpu_name: str | None = None
    compute_capability: tuple[int, int] | None = None
    gpu_total_gib: float | None = None
    gpu_free_gib: float | None = None
    gpu_in_torch_build: bool = True
    compute_dtype: str | None = None
    has_native_bf16: bool = False
    has_triton_matmul: bool = False
    bitsandbytes_cuda: tuple[str, ...] = ()
    torchao_minimum: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)


def detect_platform(environ: Mapping[str, str] | None = None, root: str | Path = "/") -> Platform:
    """Where this runs: "colab", "kaggle", "runpod", "lambda" or "plain".

    Args:
        environ: environment variables; None takes this process's. With a mapping given, only it and
            `root` are looked at.
        root: the folder that stands for "/".
    """
    variables = os.environ if environ is None else environ
    # Kaggle before Colab: its image is derived from Colab's and carries some of Colab's packages
    if "KAGGLE_KERNEL_RUN_TYPE" in variables:
        return "kaggle"
    if "COLAB_RELEASE_TAG" in variables or "COLAB_GPU" in variables:
        return "colab"
    if environ is None and _is_importable("google.colab"):
        return "colab"
    if "RUNPOD_POD_ID" in variables:
        return "runpod"
    sources = Path(root, "etc/apt/sources.list.d")
    if any(sources.glob("lambda*.list")) or any(sources.glob("lambda*.sources")):
        return "lambda"
    return "plain"


def inspect_environment(
    *,
    torch_module: Any = None,
    environ: Mapping[str, str] | None = None,
    root: str | Path = "/",
    folder: str | Path = ".",
) -> Environment:
    """Looks at this machine once. Imports torch and, where there is a GPU, starts CUDA (1 to 10 s).

    Args:
        torch_module: stands in for torch in tests; None imports torch.
        environ: environment variables; None takes this process's.
        root: the folder that stands for "/".
        folder: whose disk's free space counts.
    """
    host_total, host_free = host_memory_gib(root)
    versions = {name: installed_version(name) for name in REPORTED}
    versions["colab_qlora"] = own_version()
    facts: dict[str, Any] = {"torch_version": versions["torch"]}
    torch, facts["torch_error"] = torch_module, None
    if torch is None:
        torch, facts["torch_error"] = _try_torch()
        facts["cuda_build"] = torch_cuda_build()
    if torch is not None:
        facts.update(_torch_facts(torch))
        # of two installed copies the imported one counts
        versions["torch"] = facts["torch_version"]
    if not facts.get("gpu_count"):
        facts["driver_gpus"] = driver_gpu_names()
    return Environment(
        platform=detect_platform(environ, root),
        os=f"{platform.system()} {platform.machine()}".strip(),
        python=platform.python_version(),
        cpu_count=_usable_cpus(),
        host_total_gib=host_total,
        host_free_gib=host_free,
        disk_free_gib=disk_free_gib(folder),
        cuda_visible_devices=(os.environ if environ is None else environ).get(
            "CUDA_VISIBLE_DEVICES"
        ),
        bitsandbytes_cuda=bitsandbytes_cuda_versions(),
        torchao_minimum=torchao_minimum(),
        versions=versions,
        **facts,
    )


def own_version() -> str | None:
    """The version of this package: its own `__version__`, else what pip installed."""
    package = sys.modules.get("colab_qlora")
    return getattr(package, "__version__", None) or installed_version("colab_qlora")


def bitsandbytes_cuda_versions() -> tuple[str, ...]:
    """CUDA versions that the installed bitsandbytes ships a library for: ("126", "128", "130").

    Read from the file names in its folder: importing bitsandbytes imports torch and starts CUDA.
    """
    try:
        spec = importlib.util.find_spec("bitsandbytes")
    except (ImportError, ValueError):
        return ()
    found: set[str] = set()
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in Path(place).glob("libbitsandbytes_cuda*"):
            match = re.match(r"libbitsandbytes_cuda(\d+)", path.name)
            if match:
                found.add(match[1])
    return tuple(sorted(found, key=int))


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _try_torch() -> tuple[Any, str | None]:
    try:
        import torch
    except ModuleNotFoundError as error:
        # no torch at all is no error of torch's; metadata without the package is
        absent = error.name == "torch" and installed_version("torch") is None
        return None, None if absent else _one_line(error)
    except Exception as error:  # a broken torch raises OSError, RuntimeError, AttributeError, ...
        return None, _one_line(error)
    if not hasattr(torch, "__version__"):
        # any folder with this name imports as an empty package
        return None, f"only a folder of that name was found: {list(torch.__path__)}"
    return torch, None


def _torch_facts(torch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "torch_version": str(torch.__version__),
        "cuda_build": getattr(torch.version, "cuda", None),
    }
    with warnings.catch_warnings():
        # a driver too old for torch is reported here as a problem, not as a warning in passing
        warnings.simplefilter("ignore")
        try:
            if torch.cuda.is_available():
                facts.update(_gpu_facts(torch))
            elif facts["cuda_build"]:
                torch.cuda.init()
        except Exception as error:  # CUDA's trouble is RuntimeError, AssertionError, OSError
            facts["cuda_error"] = _one_line(error)
    try:
        facts["compute_dtype"] = str(pick_compute_dtype(torch)).removeprefix("torch.")
    except Exception as error:
        facts.setdefault("cuda_error", _one_line(error))
    capability = facts.get("compute_capability")
    if capability is None:
        facts["has_native_bf16"] = cpu_has_native_bfloat16()
    else:
        facts["has_native_bf16"] = has_native_bfloat16(capability)
        facts["has_triton_matmul"] = capability >= (8, 0)
    return facts


def _gpu_facts(torch: Any) -> dict[str, Any]:
    index = torch.cuda.current_device()
    capability = tuple(torch.cuda.get_device_capability(index))
    facts: dict[str, Any] = {
        "gpu_count": int(torch.cuda.device_count()),
        "gpu_name": str(torch.cuda.get_device_name(index)),
        "compute_capability": capability,
        "gpu_in_torch_build": _is_in_build(capability, list(torch.cuda.get_arch_list())),
    }
    try:
        free, total = torch.cuda.mem_get_info(index)
        facts["gpu_free_gib"], facts["gpu_total_gib"] = free / GIB, total / GIB
    except Exception as error:  # another process can hold the GPU for itself
        facts["cuda_error"] = _one_line(error)
    return facts


def _is_in_build(capability: tuple[int, ...], architectures: list[str]) -> bool:
    """Whether a build for `architectures` ("sm_75", "compute_90") has code for this GPU."""
    if not architectures or any(name.startswith("gfx") for name in architectures):
        return True
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        built = divmod(int(number[0]), 10)
        # machine code runs on later minors of its major; PTX is compiled for anything later
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
