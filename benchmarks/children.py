"""Run a part of a benchmark in a process of its own, and take its rows over as they come.

Some peers patch transformers when they are imported, and memory that one implementation holds is
missing for the next; so each has its own process. A row is a line of its output, "ROW {json}": what
was measured before a crash or a time-out is not lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Unsloth reports to a hub when it loads a model, and waits for an answer
OFFLINE = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
_MARK = "ROW "
_LINES_OF_A_FAILURE = 15


def emit(row: dict[str, Any]) -> None:
    """Hand a row over to the parent process."""
    print(_MARK + json.dumps(row), flush=True)


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    timeout_s: float,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> tuple[list[dict[str, Any]], str]:
    """Run `python -m module arguments`, in an empty folder, since some peers write files.

    Args:
        module, arguments: the module calls `emit`.
        timeout_s: after so many seconds it is stopped.
        on_row: called with each row as soon as it is there.

    Returns:
        The rows, and what went wrong: the end of the output, or "" if nothing did.
    """
    rows: list[dict[str, Any]] = []
    others: list[str] = []
    was_stopped = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        child = _start([sys.executable, "-m", module, *arguments], folder)
        alarm = threading.Timer(timeout_s, lambda: (was_stopped.set(), child.kill()))
        alarm.start()
        with child:
            try:
                for line in child.stdout or ():
                    if line.startswith(_MARK):
                        rows.append(json.loads(line.removeprefix(_MARK)))
                        on_row(rows[-1])
                    else:
                        others.append(line.rstrip())
                code = child.wait()
            finally:
                alarm.cancel()
                child.kill()
    if code == 0:
        return rows, ""
    reason = f"stopped after {timeout_s:.0f} s" if was_stopped.is_set() else f"exit status {code}"
    return rows, "\n".join([reason, *others[-_LINES_OF_A_FAILURE:]])


def _start(command: list[str], folder: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env={**OFFLINE, **os.environ, "PYTHONPATH": path},
    )
