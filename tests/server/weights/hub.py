"""A stand-in for the Hugging Face hub: one gated model with two revisions, over plain HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.listening import QuietHandler, listening

TOKEN = "hf_stand_in"


class Hub:
    """`revisions`: name -> folder with the files. `asked`: paths of requests, with their token or None."""

    def __init__(self, model: str, revisions: Mapping[str, Path]) -> None:
        self.model = model
        self.revisions = revisions
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        with listening(_handler(self)) as self.url:
            yield self

    def commit(self, revision: str) -> str | None:
        """The commit behind a branch, tag or commit."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or next((sha for sha in commits.values() if sha == revision), None)

    def folder(self, commit: str) -> Path:
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)


def _handler(hub: Hub) -> type[QuietHandler]:
    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.asked.append((path, token))
            if token != TOKEN:
                return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
            api, resolve = f"/api/models/{hub.model}", f"/{hub.model}/resolve/"
            if path.startswith(api):
                parts = path.removeprefix(api).strip("/").split("/")
                commit = hub.commit(parts[1] if len(parts) > 1 else "main")
                if commit is None:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body=with_body)
                files = sorted(hub.folder(commit).iterdir())
                if parts[0] == "tree":
                    tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                    return self._send(200, json.dumps(tree).encode(), with_body=with_body)
                siblings = [{"rfilename": file.name} for file in files]
                info = {"id": hub.model, "sha": commit, "siblings": siblings, "private": False, "tags": []}
                return self._send(200, json.dumps(info).encode(), with_body=with_body)
            if path.startswith(resolve):
                revision, name = path.removeprefix(resolve).split("/", 1)
                commit = hub.commit(revision)
                if commit is not None and (file := hub.folder(commit) / name).is_file():
                    body = file.read_bytes()
                    headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
                    return self._send(200, body, headers, with_body=with_body)
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, with_body: bool) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler
