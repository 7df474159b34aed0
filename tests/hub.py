"""A hub on this machine, for tests: the few addresses that models and data sets are fetched from, over real HTTP."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
from huggingface_hub import constants


@dataclass
class Repo:
    """A model or a data set on the hub: a folder per commit, `main` is the last of them.

    `sizes` lie about files too large to keep.
    """

    commits: dict[str, Path]
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)


class Hub:
    """Serves `repos` at `url`, data sets by their name behind `datasets/`; `requested` are the files given, in order.

    The second half of weights comes once `going_on` is set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requested: list[str] = []
        self.going_on = threading.Event()
        self.going_on.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = [unquote(part) for part in urlparse(request.path).path.strip("/").split("/")]
        is_api = parts[:1] == ["api"]
        if is_api:
            parts = parts[1:]
        kind = parts.pop(0) + "/" if parts[0] in ("models", "datasets") else ""
        owner, name, *rest = parts
        repo = self.repos.get(kind.replace("models/", "") + f"{owner}/{name}")
        if repo is None:
            return self._send(request, 401, headers={"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = list(repo.commits)[-1] if revision == "main" else revision
        if commit not in repo.commits:
            return self._send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        folder = repo.commits[commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if is_api and rest[:1] == ["tree"]:
            return self._send(request, 200, json.dumps([_entry(p, folder, repo) for p in files]).encode())
        if is_api:
            siblings = [{"rfilename": e["path"], "size": e["size"]} for e in (_entry(p, folder, repo) for p in files)]
            said = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            return self._send(request, 200, json.dumps(said).encode())
        if repo.gated:
            return self._send(request, 403, headers={"X-Error-Code": "GatedRepo"})
        file = folder.joinpath(*rest[2:])
        if not file.is_file():
            return self._send(request, 404, headers={"X-Error-Code": "EntryNotFound"})
        if request.command == "GET":
            self.requested.append(file.name)
        data = file.read_bytes()
        told = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}
        if file.name in repo.sizes:
            told["Content-Length"] = str(repo.sizes[file.name])
        return self._send(request, 200, data, told, self.going_on if file.suffix == ".safetensors" else None)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes = b"",
        headers: dict | None = None,
        going_on: threading.Event | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            half = len(data) // 2 if going_on else 0
            request.wfile.write(data[:half])
            if going_on:
                going_on.wait(600)
            with contextlib.suppress(ConnectionError):  # nobody wants the rest
                request.wfile.write(data[half:])


def _etag(path: Path) -> str:
    """Large files are named by their SHA-256, as the hub does, small ones like a git blob."""
    return (hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1)(path.read_bytes()).hexdigest()


def _entry(path: Path, folder: Path, repo: Repo) -> dict[str, Any]:
    name, size = path.relative_to(folder).as_posix(), repo.sizes.get(path.name, path.stat().st_size)
    entry = {"type": "file", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": size}
    if path.suffix == ".safetensors":
        return entry | {"lfs": {"oid": _etag(path), "size": size, "pointerSize": 134}}
    return entry | {"oid": _etag(path)}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """What is asked of the hub in this process goes to one on this machine, and is kept apart."""
    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
    yield served
    served.close()
