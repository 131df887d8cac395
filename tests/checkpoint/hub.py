"""A Hub on 127.0.0.1: the parts of the Hub's HTTP interface that huggingface_hub downloads a model through."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".model", ".model.v3", "tekken.json", "tokenizer.json")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(LFS)


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit, move the branch to it, and return its id."""
        parent = self.branches.get(branch, "")
        tree = "".join(f"{name} {sha256(data)}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{parent}\n{tree}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    corrupted: set[str] = field(default_factory=set)
    url: str = ""

    def requested(self, suffix: str) -> list[str]:
        return [path for _, path in self.requests if path.endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            return self._content(parts[1])
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self._error(401, "RepoNotFound")
        verb, revision, *file = rest or ["revision", "main"]
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._error(404, "RevisionNotFound")
        if not api:
            return self._file(repository, commit, "/".join(file))
        return self._json(self._tree(repository, commit) if verb == "tree" else self._info(repository, commit, path))

    def _info(self, repository: Repository, commit: str, path: str) -> object:
        siblings = []
        for name, data in repository.commits[commit].items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if is_lfs(name):
                sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": "/".join(path.split("/")[3:5]), "sha": commit, "siblings": siblings, "tags": []}

    def _tree(self, repository: Repository, commit: str) -> object:
        entries = []
        for name, data in repository.commits[commit].items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
            if is_lfs(name):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _file(self, repository: Repository, commit: str, name: str) -> None:
        if repository.gated:
            return self._error(401, "GatedRepo")
        data = repository.commits[commit].get(name)
        if data is None:
            return self._error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(data)}"'}
        if not is_lfs(name):
            return self._send(200, data, headers, name)
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # a redirect within one host would be followed
        return self._send(302, b"", headers | {"Location": f"{elsewhere}/cdn/{sha256(data)}"})

    def _content(self, digest: str) -> None:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for name, data in files.items():
                    if sha256(data) == digest:
                        return self._send(200, data, {"ETag": f'"{digest}"'}, name)
        return self._error(404, "EntryNotFound")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        if name in self.hub.corrupted:
            body = bytes(reversed(body))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    """Serve the hub until the block ends; `hub.url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
