"""A small stand-in for the hub's HTTP interface, on this machine: repositories are folders of files.

It answers huggingface_hub's requests, so that access checks, downloads and resuming run through the real library.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """folder: repositories, org/name/files. asked: all requests so far.

    Faults: gated repositories, whose licence nobody has accepted; torn files, of which half is sent; swapped files,
    which arrive with other bytes; sizes, which are claimed instead of the true ones.
    """

    folder: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    torn: set[str] = field(default_factory=set)
    swapped: set[str] = field(default_factory=set)
    claimed: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and len(words) > 3:
            return self._ask("/".join(words[2:4]), words[4:])
        if len(words) > 4 and words[2] == "resolve":
            return self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        return self._send(404, b"{}")

    def _ask(self, repo: str, what: list[str]) -> None:
        folder = self.hub.folder / repo
        if not folder.is_dir():
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if what[:1] == ["auth-check"]:
            return self._send(200, b"{}")
        if what[:1] == ["tree"]:
            return self._send(200, json.dumps([self._entry(folder, path) for path in files]).encode())
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
        return self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _entry(self, folder: Path, path: Path) -> dict:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if path.suffix == ".safetensors" else {}
        return {"type": "file", "path": str(path.relative_to(folder)), "size": size, "oid": digest[:40], **lfs}

    def _file(self, repo: str, revision: str, name: str) -> None:
        path = self.hub.folder / repo / name
        if repo in self.hub.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        tag = digest if path.suffix == ".safetensors" else digest[:40]
        commit, size = COMMIT if revision == "main" else revision, self.hub.claimed.get(name, len(data))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "X-Linked-Size": size, "Accept-Ranges": "bytes"}
        if name in self.hub.swapped:
            data = data[::-1]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(206 if first else 200, data[first:], headers, torn=name in self.hub.torn)

    def _send(self, code: int, data: bytes, headers: dict | None = None, *, torn: bool = False) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": len(data), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if torn else data)


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve the repositories below `folder` while the block runs."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
