"""Starts a real notebook server on this machine, and says why where that cannot be done."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
_START_SECONDS = 90


@dataclass(frozen=True)
class FrontEnd:
    """A notebook application.

    Attributes:
        name: "lab" or "classic".
        variable: the environment variable that names the interpreter which has it.
        module: what that interpreter imports to have it.
        least, below: major versions, the first that will do and the first that will not.
        settings: class whose `token`, `root` and so on the command line sets.
    """

    name: str
    variable: str
    module: str
    least: int
    below: int
    settings: str
    root_setting: str

    @property
    def python(self) -> str:
        return os.environ.get(self.variable, sys.executable)

    def missing(self) -> str | None:
        """Why it cannot be started, or None."""
        if shutil.which(self.python) is None:
            return f"{self.variable}={self.python} is no interpreter"
        code = f"import {self.module} as m, ipywidgets, matplotlib; print(m.__version__)"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        if found.returncode:
            reason = found.stderr.strip().splitlines()[-1]
            return (
                f"{self.python} has no {self.module} with widgets ({reason}); set {self.variable}"
            )
        version = found.stdout.strip()
        if not self.least <= int(version.split(".")[0]) < self.below:
            return (
                f"{self.python} has {self.module} {version}, not {self.least}; set {self.variable}"
            )
        return None

    def address(self, server: Server, notebook: str) -> str:
        """The address at which a notebook opens, alone in its window."""
        # a workspace of its own, because JupyterLab opens again what was open in the one before
        place = f"lab/workspaces/{Path(notebook).stem}/tree" if self.name == "lab" else "notebooks"
        page = f"{place}/{notebook}"
        return f"{server.url}{page}?token={server.token}"


FRONT_ENDS = {
    "lab": FrontEnd(
        "lab",
        "COLAB_QLORA_LAB_PYTHON",
        "jupyterlab",
        4,
        9,
        "IdentityProvider",
        "ServerApp.root_dir",
    ),
    "classic": FrontEnd(
        "classic",
        "COLAB_QLORA_CLASSIC_PYTHON",
        "notebook",
        6,
        7,
        "NotebookApp",
        "NotebookApp.notebook_dir",
    ),
}


@dataclass
class Server:
    """A running server, its address, and the folder that it serves."""

    process: subprocess.Popen[bytes]
    url: str
    token: str
    folder: Path

    def stop_kernels(self) -> None:
        """End the kernels of the notebooks that were open."""
        for kernel in json.loads(self.ask("GET", "api/kernels")):
            self.ask("DELETE", f"api/kernels/{kernel['id']}")

    def ask(self, method: str, path: str) -> bytes:
        """Send a request to the server, and give the answer."""
        request = urllib.request.Request(f"{self.url}{path}?token={self.token}", method=method)
        # a machine may have a proxy set, which knows nothing of this address
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return bytes(answer.read())

    def stop(self) -> None:
        """End the server and its kernels."""
        # the first signal asks, the group is ours because it was started in a session of its own
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def start_server(front_end: FrontEnd, folder: Path) -> Server:
    """Start a server for `folder` on a free port of 127.0.0.1, and wait until it answers."""
    port, token = _free_port(), secrets.token_hex(16)
    ours = {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        # settings and histories of whoever runs the tests stay out of it
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "JUPYTER_DATA_DIR": str(folder / ".data"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    app = "ServerApp" if front_end.name == "lab" else "NotebookApp"
    command = [
        front_end.python,
        "-m",
        "jupyterlab" if front_end.name == "lab" else "notebook",
        "--no-browser",
        "--allow-root",
        f"--{app}.ip=127.0.0.1",
        f"--{app}.port={port}",
        f"--{app}.port_retries=0",
        f"--{front_end.settings}.token={token}",
        f"--{front_end.root_setting}={folder}",
    ]
    if front_end.name == "lab":
        command.append("--LabApp.expose_app_in_browser=True")  # tells when the kernel is there
        # no question about news, which would cover the notebook
        asked = folder / ".settings" / "@jupyterlab" / "apputils-extension"
        asked.mkdir(parents=True)
        answers = '{"fetchNews": "false", "checkForUpdates": false}'
        (asked / "notification.jupyterlab-settings").write_text(answers)
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **ours},
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Server(process, f"http://127.0.0.1:{port}/", token, folder)
    _wait_for(server)
    return server


def _wait_for(server: Server) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        try:
            server.ask("GET", "api/status")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    said = (server.folder / "server.log").read_text(errors="replace")[-2000:]
    if server.process.poll() is None:
        server.stop()
    pytest.fail(f"the server did not start:\n{said}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
