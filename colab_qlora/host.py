"""What the host has: memory, disk, CPU instructions, and the GPUs that the driver names.

All of it is read from files and from `nvidia-smi`, without torch, so it also answers on a machine
whose torch is missing or broken. Every function that reads a file takes `root`, so that tests can
imitate a machine with a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

GIB = 1024**3


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_has_native_bfloat16(root: str | Path = "/") -> bool:
    """Whether this CPU has bfloat16 instructions (x86 avx512_bf16 or amx_bf16, ARM bf16).

    Reads /proc/cpuinfo, so it is False on macOS and Windows, where float32 is the safe answer.
    """
    for line in _read(Path(root, "proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(value.split())
    return False


def host_memory_gib(root: str | Path = "/") -> tuple[float | None, float | None]:
    """Total and available host memory in GiB, inside the container's limit; None where unknown."""
    total, free = _meminfo_bytes(Path(root))
    if total is None and str(root) == "/":
        total, free = _fallback_bytes()
    if total is None:
        return None, None
    for limit, used in _cgroup_limits(Path(root)):
        # cgroup v1 writes about 2**63 for "no limit", hence the comparison with the machine's own
        if limit < total:
            total = limit
        if limit - used < (free if free is not None else total):
            free = max(0, limit - used)
    return total / GIB, None if free is None else free / GIB


def _meminfo_bytes(root: Path) -> tuple[int | None, int | None]:
    sizes: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        parts = value.split()
        if parts and parts[0].isdigit():
            sizes[key] = int(parts[0]) * 1024
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _fallback_bytes() -> tuple[int | None, int | None]:
    try:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    except Exception:  # psutil is optional, and refuses on some platforms
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes for this process's control group and every group above it."""
    found: list[tuple[int, int]] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # in a container the path can be the host's, absent here: then the mount's root counts
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = base.joinpath(*parts[:depth])
            limit, used = _read(folder / names[0]).strip(), _read(folder / names[1]).strip()
            if limit.isdigit():
                # the file cache counts as used, but the kernel gives it back on demand
                cache = _stat_bytes(folder / "memory.stat", names[2])
                found.append((int(limit), max(0, int(used or 0) - cache)))
    return found


def _stat_bytes(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def disk_free_gib(folder: str | Path = ".") -> float | None:
    """Free space in GiB of the disk that holds `folder`; None where it cannot be read."""
    try:
        return shutil.disk_usage(folder).free / GIB
    except OSError:
        return None


def driver_gpu_names(program: str = "nvidia-smi") -> tuple[str, ...]:
    """Names of the GPUs that NVIDIA's driver lists; empty without a driver. Takes up to 20 s."""
    path = shutil.which(program)
    if path is None:
        return ()
    try:
        answer = subprocess.run(
            [path, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode != 0:
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())
