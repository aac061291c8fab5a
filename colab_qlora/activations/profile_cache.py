"""Measured rates, kept for this process and on disk, so that a machine is measured once.

A file is named by all that the rates depend on: the GPU, its host's processor, the versions, the
model's shape, the sizes rounded up to powers of two, and which attention kernels are switched on.
Files of another `FORMAT` have other names. What is not sound (`measure_profile.Measured`) is kept
in this process only. Processes measure one after another, since they would slow each other down;
who waited finds what the other one wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from colab_qlora import __version__
from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.measure_profile import LEAST_TOKENS, measure_or_recorded
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.cache import cache_folder
from colab_qlora.kernels.attention_choice import enabled_backends
from colab_qlora.kernels.backend import triton

# of what is kept on disk: another number wherever a rate is measured otherwise
FORMAT = 5
# more tokens than this and rates do not change
MOST_TOKENS = 8192
# another process measures for about 2 s, and may have kernels to compile
LONGEST_WAIT_S, WAIT_STEP_S = 30.0, 0.05

_TYPES: dict[str, Any] = {"str": str, "int": int, "float": int | float, "bool": bool}
_known: dict[Path, GpuProfile] = {}


def cached_profile(shape: ModelShape, tokens: int, seq_length: int) -> GpuProfile:
    """The current GPU's rates at these sizes, rounded up to powers of two; measured if need be."""
    tokens, seq_length = (_next_power(min(n, MOST_TOKENS)) for n in (tokens, seq_length))
    tokens = max(tokens, LEAST_TOKENS)
    path = profile_path(shape, tokens, seq_length)
    found = _known.get(path) or read_profile(path)
    if found is None:
        with _alone(path.parent):
            found = read_profile(path)
            if found is None:
                measured = measure_or_recorded(shape, tokens, seq_length)
                found = measured.profile
                if measured.is_sound:
                    write_profile(path, found)
    _known[path] = found
    return found


def profile_path(shape: ModelShape, tokens: int, seq_length: int) -> Path:
    """Where the current GPU's rates at these sizes are kept."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    key = (
        FORMAT,
        (properties.name, properties.total_memory),
        _processor(),
        (__version__, torch.__version__, torch.version.cuda, getattr(triton, "__version__", None)),
        dataclasses.astuple(shape),
        (tokens, seq_length),
        sorted(enabled_backends().items()),
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder() / "gpu_profiles" / f"{digest}.json"


def read_profile(path: Path) -> GpuProfile | None:
    """A profile from disk; None if there is none, or it is not whole."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["capability"] = tuple(fields["capability"])
        found = GpuProfile(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if _is_whole(found) else None


def write_profile(path: Path, profile: GpuProfile) -> None:
    """Keep a profile for the next time; a folder that cannot be written to costs 2 s then."""
    text = json.dumps(dataclasses.asdict(profile), indent=1) + "\n"
    # a name of its own: two writers of one file would mix their lines
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait while another process measures: not for ever, and not where files cannot be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            # not on Windows
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            # the lock goes with the file, or with the process
            file = stack.enter_context((folder / "measuring.lock").open("w"))
            end = time.monotonic() + LONGEST_WAIT_S
            while time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(WAIT_STEP_S)
        yield


def _is_whole(profile: GpuProfile) -> bool:
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if field.name == "capability":
            if not (len(value) == 2 and all(isinstance(part, int) for part in value)):
                return False
        elif not isinstance(value, _TYPES[str(field.type)]):
            return False
        # only copies may be impossible, and only launches take no time
        elif field.name.endswith("_per_s"):
            least = 0 if field.name.startswith("copy_") else 1
            if not least <= value < math.inf:
                return False
        elif field.name.endswith("_s") and not 0 <= value < math.inf:
            return False
    return True


def _processor() -> tuple[str, int | None]:
    """The host's processor, as copies and launches depend on it; a folder may serve many hosts."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = next(line for line in text.splitlines() if line.startswith("model name"))
    return name, os.cpu_count()


def _next_power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
