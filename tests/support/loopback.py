"""A small Hub on loopback, with the endpoints that the real client uses.

Each commit of a repository is a dict of its files. The answers follow the Hub's own HTTP behaviour:
refs, revision info, trees, files with their commit and ETag headers, organisations, and the error
codes by which the client distinguishes refusals. A test adds a `Fault` to make the Hub misbehave.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from typing import TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

Answer: TypeAlias = tuple[int, dict[str, str], bytes]
"""The status, the headers and the body of an answer."""


@dataclass
class Repository:
    """A repository: its commits, and the commits of its branches and tags."""

    repo_id: str
    repo_type: str = "kernel"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    moved_to: str | None = None
    """The new id, after the repository was renamed; the old one still works."""

    def commit(
        self, files: Mapping[str, bytes] | Path, *, branch: str = "main", tag: str | None = None
    ) -> str:
        """Commit ``files``, or those in a directory, to a branch; return the commit's hash."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        state = [self.repo_id, len(self.commits), sorted(files.items())]
        commit = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        if tag is not None:
            self.tags[tag] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit hash."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


def is_lfs(path: str) -> bool:
    """Whether the Hub has a file in git's large file storage."""
    return path.endswith((".so", ".bin"))


def etag(path: str, content: bytes) -> str:
    """The ETag of a file's content: git's hash, or for a large file its sha256."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """A failure of the requests whose path contains ``path``.

    Args:
        kind: ``drop`` closes the connection unanswered; ``stall`` never answers; ``status``
            answers with ``status`` and ``headers`` alone; ``cut`` ends the body half way;
            ``corrupt`` changes a byte of it; ``portal`` answers a web page, as a hotel's network
            does.
        path: A part of the path.
        times: The number of requests that fail; by default all from now on.
        status: The status of the kind ``status``.
        method: The HTTP method of the requests that fail; by default any.
        headers: The headers of the kind ``status``.
    """

    kind: str
    path: str = ""
    times: int = 1 << 30
    status: int = 503
    method: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class LoopbackHub:
    """A Hub that runs from its creation on; as a context manager it stops at the end."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.organisations: dict[str, dict[str, object]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hooks: list[Callable[[str, str], None]] = []
        """Called with each request's method and path, before it is answered."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._address = ("127.0.0.1", 0)
        self.start()
        self.endpoint = f"http://127.0.0.1:{self._address[1]}"

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve, at the same address as before."""
        self._stopping.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(self._address, handler)
        self._address = ("127.0.0.1", self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def repository(self, repo_id: str, repo_type: str = "kernel") -> Repository:
        """Return the repository of this id and type, and add it if there is none."""
        found = self.repositories.get((repo_type, repo_id))
        if found is None:
            found = self.repositories[repo_type, repo_id] = Repository(repo_id, repo_type)
        return found

    def organisation(self, name: str, *, trusted: bool) -> None:
        """Add an organisation, which is a trusted publisher or not."""
        self.organisations[name] = {"name": name, "trustedKernelPublisher": trusted}

    def fault(
        self,
        kind: str,
        path: str = "",
        *,
        times: int = 1 << 30,
        status: int = 503,
        method: str | None = None,
    ) -> None:
        """Add a `Fault`."""
        self.faults.append(Fault(kind, path, times, status, method))

    def asked(self) -> list[str]:
        """Return the requests since the last call of this method."""
        with self._lock:
            asked, self.requests = self.requests, []
        return asked

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Record a request, and return the fault that it meets."""
        if path == "/api/agent-harnesses":  # the client sends this once in each process
            return None
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.path in path and fault.times and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None

    def wait_for_the_end(self) -> None:
        """Wait until the Hub is stopped."""
        self._stopping.wait()

    # --- the answers ------------------------------------------------------------------------------

    def answer(self, url: str) -> Answer:
        """Answer a request without faults."""
        parts = urlsplit(url)
        steps = [unquote(step) for step in parts.path.strip("/").split("/")]
        match steps:
            case ["api", "organizations", name, "overview"]:
                if name not in self.organisations:
                    return _error(404, "", "This organization does not exist")
                return _json(self.organisations[name])
            case ["api", "kernels" | "models" as kind, owner, name, *rest]:
                return self._api(kind[:-1], f"{owner}/{name}", rest, parse_qs(parts.query))
            case ["kernels", owner, name, "resolve", revision, *path]:
                return self._file("kernel", f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                return self._file("model", f"{owner}/{name}", revision, "/".join(path))
        return _error(404, "", "no such page")

    def _api(
        self, repo_type: str, repo_id: str, rest: list[str], query: dict[str, list[str]]
    ) -> Answer:
        repository = self.repositories.get((repo_type, repo_id))
        if repository is None:
            return _error(401, "RepoNotFound", "Invalid username or password.")
        if rest == ["refs"]:
            return _json(
                {
                    "branches": _refs("heads", repository.branches),
                    "tags": _refs("tags", repository.tags),
                    "converts": [],
                }
            )
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.find(revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not rest or rest[0] == "revision":
            return _json({"id": repository.moved_to or repo_id, "sha": commit, "siblings": []})
        if rest[0] == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return _tree(repository.commits[commit], "/".join(rest[2:]), recursive)
        return _error(404, "", "no such page")

    def _file(self, repo_type: str, repo_id: str, revision: str, path: str) -> Answer:
        repository = self.repositories.get((repo_type, repo_id))
        if repository is None:
            return _error(401, "RepoNotFound", "Invalid username or password.")
        commit = repository.find(revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(path)
        if content is None:
            status, error, body = _error(404, "EntryNotFound", "Entry not found")
            return status, error | headers, body
        tag = f'"{etag(path, content)}"'
        headers |= {"ETag": tag, "Content-Type": "application/octet-stream"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
        return 200, headers, content


def _refs(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
        for name, commit in refs.items()
    ]


def _tree(files: Mapping[str, bytes], under: str, recursive: bool) -> Answer:
    prefix = f"{under}/" if under else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    if under and not inside:
        return _error(404, "EntryNotFound", f"{under} does not exist")
    entries: dict[str, dict[str, object]] = {}
    for path, content in inside.items():
        steps = path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps)) if recursive else [1][: len(steps) - 1]:
            folder = prefix + "/".join(steps[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if recursive or len(steps) == 1:
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_lfs(path):
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 127,
                }
            entries[path] = entry
    return _json(list(entries.values()))


def _json(content: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str, message: str) -> Answer:
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return status, headers, json.dumps({"error": message}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """Print nothing: clients of these tests close connections."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, *args: object) -> None:
        """The requests are recorded in `LoopbackHub.requests`."""

    def _serve(self) -> None:
        for hook in self.hub.hooks:
            hook(self.command, self.path)
        fault = self.hub.take_fault(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind == "stall":
            self.hub.wait_for_the_end()
        if kind in ("stall", "drop"):
            self.close_connection = True
            return
        status, headers, body = self.hub.answer(self.path)
        if fault and kind == "status":
            status, headers, body = fault.status, dict(fault.headers), b"{}"
        if kind == "portal":
            status, headers, body = 200, {"Content-Type": "text/html"}, b"<html>Log in</html>"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if kind == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
