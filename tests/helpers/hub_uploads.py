"""The loopback Hub's other half: what `push_to_hub` and `hf upload` need to create a repository and commit to it.

Small text files come inside the commit, all others beforehand through the LFS protocol (batch, then a PUT each).
"""

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from typing import Any

REGULAR = (".json", ".md", ".py", ".jinja", ".txt")
KINDS = {"model": "models", "dataset": "datasets"}


class Uploads:
    """Routes of a handler that has `hub`, `body` and `_json`; `answer_upload` passes over what is not its own."""

    hub: Any
    body: bytes
    _json: Any

    def answer_upload(self, method: str, path: str) -> bool:
        routes = {
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": lambda: self._json({"errors": [], "warnings": []}),
            r"POST /api/(datasets|models)/([^/]+/[^/]+)/preupload/[^/]+": self._preupload,
            r"POST /(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /lfs/([0-9a-f]{64})": self._put,
            r"POST /api/(datasets|models)/([^/]+/[^/]+)/commit/[^/]+": self._commit,
        }
        for pattern, route in routes.items():
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                route(*match.groups())
                return True
        return False

    def _create(self) -> None:
        wanted = json.loads(self.body)
        kind, name = KINDS[wanted.get("type") or "model"], f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{'' if kind == 'models' else 'datasets/'}{name}", "id": name}
        if (kind, name) in self.hub.repositories:
            return self._json({**answer, "error": "there is such a repository already"}, 409)
        folder = self.hub.uploads / kind / name
        folder.mkdir(parents=True)
        self.hub.add(kind, name, folder)
        return self._json(answer)

    def _preupload(self, kind: str, name: str) -> None:
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["regular" if path.endswith(REGULAR) else "lfs" for path in names]
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(names, modes)]
        self._json({"files": files})

    def _batch(self, kind: str | None, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if not self._lfs(entry["oid"]).is_file():
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "the content is not what its name says"}, 400)
        self._lfs(oid).parent.mkdir(exist_ok=True)
        self._lfs(oid).write_bytes(self.body)
        return self._json({})

    def _commit(self, kind: str, name: str) -> None:
        folder = self.hub.repositories[kind, name]
        for line in self.body.splitlines():
            entry = json.loads(line)
            target = folder / entry["value"].get("path", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if entry["key"] == "file":
                target.write_bytes(base64.b64decode(entry["value"]["content"]))
            elif entry["key"] == "lfsFile":
                shutil.copy(self._lfs(entry["value"]["oid"]), target)
        commit = "0" * 40
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _lfs(self, oid: str) -> Any:
        return self.hub.uploads / "lfs" / oid


def body_of(handler: BaseHTTPRequestHandler) -> bytes:
    """The request's body, sent whole or in chunks."""
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    parts = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(parts)
