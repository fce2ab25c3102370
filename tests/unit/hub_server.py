"""A hub on this machine: the endpoints that huggingface_hub asks, with byte ranges, and ways to go wrong."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from local_server import running

COMMIT = "a" * 40


class Refusal(NamedTuple):
    """An answer in place of the right one."""

    status: int
    headers: dict[str, str]
    of: str = ""  # what the path has in it
    methods: tuple[str, ...] = ("GET", "HEAD")
    times: int = 1000


class Hub(ThreadingHTTPServer):
    """Serves ``files`` (name -> content) of the one repository ``org/model``."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.announced = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.break_after: int | None = None  # bytes after which a download breaks off, once
        self.failing = False  # answers 500
        self.has_ranges = True
        self.refusal: Refusal | None = None
        self.refused = 0
        self.cdn: Hub | None = None  # where files are; this one sends there
        self.tokens: list[str] = []  # that came with requests, "" without one
        self.served: list[tuple[str, int, int]] = []  # method, first byte, bytes sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.tokens.append(self.headers.get("Authorization", ""))
        if self.server.failing:
            self._empty(500, {})
            return
        no = self.server.refusal
        if no and no.of in self.path and self.command in no.methods and self.server.refused < no.times:
            self.server.refused += 1
            self._empty(no.status, no.headers)
            return
        if re.fullmatch(r"/api/models/org/model(/revision/main)?(\?.*)?", self.path):
            files = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": files})
            return
        match = re.fullmatch(rf"/org/model/resolve/(?:main|{COMMIT})/([^?]+)(\?.*)?", self.path)
        if match is None:
            code = "EntryNotFound" if "/org/model/" in self.path else "RepoNotFound"
            self._empty(404, {"X-Error-Code": code})
        elif match[1] not in self.server.files:
            self._empty(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._file(match[1], body=body)

    def _file(self, name: str, *, body: bool) -> None:
        data = self.server.files[name]
        if self.server.cdn:
            tag = f'"{self.server.announced[name]}"'
            about = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": tag, "X-Linked-Size": str(len(data))}
            self._empty(302, {"Location": f"{self.server.cdn.url}{self.path}?signature=1", **about})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.has_ranges else None
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else len(data)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.server.announced[name]}"')
        self.send_header("X-Linked-Etag", f'"{self.server.announced[name]}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.end_headers()
        if not body:
            return
        part = data[start:stop]
        if self.server.break_after is not None:
            part = part[: self.server.break_after]
            self.server.break_after = None
            self.close_connection = True
        self.wfile.write(part)
        self.server.served.append((self.command, start, len(part)))

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


def hub(files: dict[str, bytes]) -> AbstractContextManager[Hub]:
    """A running hub."""
    return running(Hub(files))
