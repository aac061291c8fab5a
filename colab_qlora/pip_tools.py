"""Running pip without moving what is installed: constraints, sources, what a failure means."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from colab_qlora.requirements import canonical_name

# package -> where pip finds its source when the package index does not answer. The tags are the
# table's minimums: the main branches may need newer companions than a preinstalled set has.
SOURCES: dict[str, str] = {
    "trl": "git+https://github.com/huggingface/trl@v0.29.1",
    "peft": "git+https://github.com/huggingface/peft@v0.20.0",
    "transformers": "git+https://github.com/huggingface/transformers@v5.15.0",
    "datasets": "git+https://github.com/huggingface/datasets@4.0.0",
    "accelerate": "git+https://github.com/huggingface/accelerate@v1.10.0",
    "bitsandbytes": "git+https://github.com/bitsandbytes-foundation/bitsandbytes@0.49.0",
    "gguf": "git+https://github.com/ggml-org/llama.cpp#subdirectory=gguf-py",
}

# what a compiled neighbour breaks on, or what the running notebook itself stands on
_CORE = re.compile(
    r"torch|torchvision|torchaudio|triton|numpy|nvidia-.*|cuda-.*"
    r"|ipython|ipykernel|ipywidgets|jupyter-client|traitlets|pyzmq|tornado|google-colab"
)
# a version that pip can parse (PEP 440); one odd line would make pip refuse the whole constraints
# file
_PEP440 = re.compile(
    r"v?(\d+!)?\d+(\.\d+)*([-_.]?(a|b|c|rc|alpha|beta|pre|preview)[-_.]?\d*)?"
    r"(-\d+|[-_.]?(post|rev|r)[-_.]?\d*)?([-_.]?dev[-_.]?\d*)?(\+[a-z0-9]+([-_.][a-z0-9]+)*)?",
    re.IGNORECASE,
)
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies", re.IGNORECASE)
_INDEX = re.compile(
    r"No matching distribution found|Could not find a version|name resolution|Could not resolve"
    r"|Network is unreachable|new connection|Connection(Error| aborted| reset| refused)|timed out"
    r"|Max retries exceeded|ProxyError|SSLError|HTTPSConnectionPool|HTTP error"
    r"|\b[45]\d\d (Client|Server) Error",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: its exit status, and stdout and stderr together."""

    returncode: int
    output: str


class Runner(Protocol):
    """Runs one command; tests put a fake here."""

    def __call__(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> CommandResult: ...


def run_command(command: Sequence[str], environ: Mapping[str, str] | None = None) -> CommandResult:
    """Runs a command to its end and keeps what it printed.

    Args:
        command: program and arguments; no shell is involved.
        environ: variables to add to this process's.
    """
    try:
        done = subprocess.run(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environ or {})},
            check=False,
        )
    except OSError as error:
        return CommandResult(127, str(error))
    return CommandResult(done.returncode, done.stdout)


def pip_command(*arguments: str) -> list[str]:
    """A pip command for the Python that runs this, asking nothing and drawing no progress bar."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def failure_kind(output: str) -> Literal["conflict", "index", "other"]:
    """What pip's output says about why it failed.

    "conflict": the constraints leave no version; "index": the package index has none or does not
    answer.
    """
    # a conflict comes first: pip ends it with "No matching distribution found" too
    if _CONFLICT.search(output):
        return "conflict"
    return "index" if _INDEX.search(output) else "other"


def failure_line(output: str) -> str:
    """The cause that pip's output names, in one line of at most 300 characters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "The conflict is caused by:" in lines:
        # pip lists every version that it tried; the first line and the constraint tell the story
        cause = lines[lines.index("The conflict is caused by:") + 1 :]
        held = [line for line in cause if line.startswith("The user requested")]
        return "; ".join([*cause[:1], *held[-1:]])[:300]
    errors = [line for line in lines if re.match(r"ERROR:|fatal:", line)]
    return re.sub(r"^ERROR:\s*", "", (errors or lines or ["no output"])[-1])[:300]


def write_constraints(
    path: str | Path,
    *,
    leave_free: Collection[str] = (),
    core_only: bool = False,
    distributions: Callable[[], Iterable[importlib.metadata.Distribution]] | None = None,
) -> Path:
    """Writes `name==version` for everything installed, so that pip cannot move it.

    Left out: what was installed from a local file, a folder or a URL (its version may be on no
    index; torch is kept even then, for pip accepts the installed one), and versions that pip cannot
    parse.

    Args:
        path: the file to write.
        leave_free: packages that pip may replace.
        core_only: pin only torch and its CUDA parts, numpy, triton and the notebook's own packages.
        distributions: stands in for importlib.metadata.distributions in tests.

    Returns:
        The path written.
    """
    free = {canonical_name(name) for name in leave_free}
    pins: dict[str, str] = {}
    for distribution in (distributions or importlib.metadata.distributions)():
        try:
            name, version = distribution.metadata["Name"], distribution.version
            from_url = distribution.read_text("direct_url.json") is not None
        except Exception:  # a folder of metadata without its file: pip ignores it as well
            continue
        if not name or not version or canonical_name(name) in pins:
            continue
        key = canonical_name(name)
        if key in free or not _PEP440.fullmatch(version) or (from_url and key != "torch"):
            continue
        if core_only and not _CORE.fullmatch(key):
            continue
        pins[key] = f"{name}=={version}"
    path = Path(path)
    path.write_text("".join(f"{pins[key]}\n" for key in sorted(pins)), encoding="utf-8")
    return path
