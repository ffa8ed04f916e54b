"""A loopback Hub: enough of the Hub's HTTP interface for `huggingface_hub` and `datasets`, with faults on demand.

    with LoopbackHub() as hub:
        hub.add("datasets", "org/text", folder)
        subprocess.run(..., env=hub.environment(home))

Only on 127.0.0.1; `push_to_hub` works too (`hub_uploads.py`). A fault is taken by the next requests whose path
contains its `match`, `count` times.
"""

import hashlib
import json
import re
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.hub_uploads import Uploads, body_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """`kind`: status (an error code), cut (the connection drops in mid-body), stall, truncate (half as if all)."""

    match: str
    kind: str
    count: int = 1
    status: int = 500
    retry_after: float | None = None
    seconds: float = 0.0
    after: str = ""  # not before a path that contains this was asked for
    method: str = ""  # of this kind of request alone


class LoopbackHub:
    """Serves folders as Hub repositories on a free port; records every request as (method, path, range)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Path] = {}
        self.heads: dict[tuple[str, str], str] = {}  # commits of those that were pushed to
        self.earlier: dict[tuple[str, str, str], Path] = {}  # what they were before, by their commit
        self.gated: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()
        self.temporary = tempfile.TemporaryDirectory()
        self.uploads = Path(self.temporary.name)  # repositories made by clients
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.temporary.cleanup()

    def add(self, kind: str, name: str, folder: Path, *, gated: bool = False) -> None:
        """Serve `folder` as the repository `name` of `kind` (datasets or models)."""
        self.repositories[kind, name] = folder
        if gated:
            self.gated.add(name)

    def push(self, kind: str, name: str, folder: Path, commit: str) -> None:
        """Let a repository's head be `folder`; what it was before can still be asked for by its commit."""
        self.earlier[kind, name, self.heads.get((kind, name), COMMIT)] = self.repositories[kind, name]
        self.repositories[kind, name], self.heads[kind, name] = folder, commit

    def fail(self, match: str, kind: str, **options: Any) -> None:
        """Arrange a fault for the next requests whose path contains `match`."""
        self.faults.append(Fault(match, kind, **options))

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a client process: this endpoint, caches of its own, no Xet, no telemetry."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "NO_PROXY": "127.0.0.1",
        }

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                begun = any(fault.after in asked for _, asked, _ in self.requests)
                if fault.match in path and fault.method in ("", method) and fault.count > 0 and begun:
                    fault.count -= 1
                    return fault
        return None


class _Handler(Uploads, BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet: requests are recorded in the hub."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = body_of(self)
        self._answer()

    do_PUT = do_POST

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.fault = self.hub.take_fault(self.command, path)
        if self.fault is not None and self.fault.kind == "status":
            extra = {} if self.fault.retry_after is None else {"Retry-After": f"{self.fault.retry_after:g}"}
            return self._json({"error": "fault"}, self.fault.status, extra)
        if self.answer_upload(self.command, path):
            return None
        api = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path
        )
        if api:
            return self._api(api, urllib.parse.parse_qs(url.query))
        file = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self._file(file[1] or "models", file[2], file[3], file[4])
        return self._json({"error": "not found"}, 404)

    def _folder(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The repository's folder at a revision, whose commit is then in `self.commit`.

        Answers 401 or 404 itself where there is none to be had.
        """
        if name in self.hub.gated and not self.headers.get("Authorization"):
            message = f"Access to {name} is restricted. You must have access to it and be authenticated."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self._json({"error": message}, 401, headers)
            return None
        folder = self.hub.earlier.get((kind, name, revision or ""))
        self.commit = revision if folder and revision else self.hub.heads.get((kind, name), COMMIT)
        folder = folder or self.hub.repositories.get((kind, name))
        if folder is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return folder

    def _api(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        kind, name, verb, revision, rest = match.groups()
        folder = self._folder(kind, name, revision)
        if folder is None:
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if verb == "tree":
            below = (rest or "/").strip("/")
            root = folder / below
            if not root.exists():
                return self._json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            found = root.rglob("*") if recursive else root.iterdir()
            return self._json([self._entry(folder, path) for path in sorted(found)])
        if verb == "paths-info":
            form = urllib.parse.parse_qs(self.body.decode())
            wanted = form.get("paths") or json.loads(self.body or b"{}").get("paths", [])
            there = [folder / path for path in wanted if (folder / path).exists()]
            return self._json([self._entry(folder, path) for path in there])
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
        info = {"id": name, "sha": self.commit, "private": False, "gated": False, "disabled": False, "tags": []}
        return self._json({**info, "siblings": siblings, "downloads": 0, "likes": 0, "lastModified": DATE})

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": digest(name.encode())[:40], "size": 0}
        content = path.read_bytes()
        entry = {"type": "file", "path": name, "size": len(content), "oid": digest(content)[:40]}
        if path.suffix in (".parquet", ".safetensors"):
            entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
        return entry

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        folder = self._folder(kind, name, revision)
        if folder is None:
            return None
        if not (folder / path).is_file():
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = (folder / path).read_bytes()
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"], headers["X-Linked-ETag"] = str(len(content)), f'"{digest(content)}"'
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if first >= len(content):
                return self._json({"error": "range"}, 416)
            last = min(last, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        return self._send(status, content, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        fault = self.fault.kind if self.fault is not None else ""
        if fault == "truncate":
            content = content[: len(content) // 2]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall" and self.fault is not None:
                time.sleep(self.fault.seconds)
            self.close_connection = True
            return
        self.wfile.write(content)


DATE = "2026-01-01T00:00:00.000Z"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
