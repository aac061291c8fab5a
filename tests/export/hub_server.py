"""A stand-in for a model hub: the requests that an upload makes, over HTTP on this machine.

Endpoints as in https://huggingface.co/docs/hub/api and, for large files, the batch API of Git LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_right"
READ_ONLY = "hf_read_only"
USER = "ada"
LARGE = (".safetensors", ".gguf")


class Hub:
    """What it was asked and what it holds.

    Attributes:
        repositories: name -> {branch -> {file -> bytes}}.
        private: names of those that were made private.
        requests: (method, path, token) of each request.
        breaks_at: a part of a path; a request with it gets no answer.
        fails_at: path part -> status with which it is refused.
    """

    def __init__(self):
        self.repositories, self.private, self.messages = {}, set(), []
        self.requests, self.objects = [], {}
        self.breaks_at, self.fails_at, self.on_create = None, {}, None
        self.endpoint = ""

    def files(self, name, branch="main"):
        return self.repositories[name][branch]


@contextmanager
def running_hub():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self._answer()

        def do_PUT(self):
            self._answer()

        def do_POST(self):
            self._answer()

        def _answer(self):
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunked()
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path, token))
            if hub.breaks_at and hub.breaks_at in path:
                self.close_connection = True
                self.connection.close()
                return
            status, answer = _reply(hub, self.command, path, token, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _chunked(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

    return Handler


def _reply(hub, command, path, token, body):
    if path.startswith("/objects/"):
        # where large files go has an address that is its own permission
        hub.objects[path.removeprefix("/objects/")] = body
        return 200, {}
    if token not in (TOKEN, READ_ONLY):
        return 401, {"error": "Invalid credentials in Authorization header"}
    for part, status in hub.fails_at.items():
        if part in path:
            return status, {"error": "out of order"}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        return _create(hub, token, json.loads(body))
    if path.endswith("/info/lfs/objects/batch"):
        return 200, {"transfer": "basic", "objects": _places(hub, json.loads(body)["objects"])}
    name, _, rest = path.removeprefix("/api/models/").partition("/")
    repository, _, rest = rest.partition("/")
    name, (action, _, branch) = f"{name}/{repository}", rest.partition("/")
    if action == "auth-check":
        if token == READ_ONLY:
            return 403, {"error": "You have no write access to this repository"}
        return 200, {}
    if action == "branch":
        hub.repositories[name].setdefault(branch, {})
        return 200, {}
    if action == "preupload":
        asked = json.loads(body)["files"]
        kinds = ["lfs" if file["path"].endswith(LARGE) else "regular" for file in asked]
        return 200, {
            "files": [
                {"path": file["path"], "uploadMode": kind, "shouldIgnore": False, "oid": None}
                for file, kind in zip(asked, kinds, strict=True)
            ]
        }
    if action == "commit":
        return _commit(hub, name, branch, body)
    if not action and name in hub.repositories:
        return 200, {"id": name, "sha": "0" * 40, "siblings": []}
    return 404, {"error": f"{command} {path} is not imitated"}


def _create(hub, token, asked):
    if token == READ_ONLY:
        return 403, {"error": "You don't have the rights to create a model under this namespace"}
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    if name in hub.repositories:
        return 409, {
            "error": "You already created this model repo",
            "url": f"{hub.endpoint}/{name}",
        }
    hub.repositories[name] = {"main": {}}
    if asked.get("private") or asked.get("visibility") == "private":
        hub.private.add(name)
    if hub.on_create:
        hub.on_create()
    return 200, {"url": f"{hub.endpoint}/{name}", "name": name}


def _places(hub, objects):
    return [
        {**one, "actions": {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}}
        for one in objects
    ]


def _commit(hub, name, branch, body):
    # all of it is looked at before anything is taken
    files = {}
    for line in body.decode().splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "header":
            hub.messages.append(value["summary"])
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        if key == "lfsFile":
            content = hub.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            files[value["path"]] = content
    hub.repositories[name][branch].update(files)
    return 200, {
        "success": True,
        "commitOid": "1" * 40,
        "commitUrl": f"{hub.endpoint}/{name}/commit/1",
    }
