"""A package registry on this machine: the simple repository API as JSON or HTML, and ways to go wrong."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import running


class Registry(ThreadingHTTPServer):
    """Serves ``files`` (file name -> content) of the packages whose names they begin with."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.stated = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}  # "": the index states none
        self.yanked: set[str] = set()
        self.html = False
        self.login = ""  # "name:password" that is asked for
        self.break_off = 0  # downloads that end in the middle
        self.failing = 0  # answers 503
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class _Handler(BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.path)
        login = base64.b64encode(server.login.encode()).decode()
        if server.login and self.headers.get("Authorization") != f"Basic {login}":
            self._answer(401, b"", "text/plain", {"WWW-Authenticate": 'Basic realm="x"'})
        elif server.failing:
            server.failing -= 1
            self._answer(503, b"", "text/plain")
        elif self.path.startswith("/simple/"):
            self._page(self.path.split("/")[2])
        elif (name := self.path.rpartition("/")[2]) in server.files:
            self._answer(200, server.files[name], "application/gzip")
        else:
            self._answer(404, b"", "text/plain")

    def _page(self, package: str) -> None:
        names = [name for name in self.server.files if name.replace("_", "-").lower().startswith(f"{package}-")]
        if not names:
            self._answer(404, b"", "text/plain")
        elif self.server.html:
            links = [self._link(name) for name in names]
            self._answer(200, f"<html><body>{'<br>'.join(links)}</body></html>".encode(), "text/html")
        else:
            files = [self._file(name) for name in names]
            self._answer(200, json.dumps({"name": package, "files": files}).encode(), "application/vnd.pypi.simple.v1+json")

    def _file(self, name: str) -> dict[str, object]:
        stated = self.server.stated[name]
        return {
            "filename": name,
            "url": f"../../files/{name}",
            "hashes": {"sha256": stated} if stated else {},
            "yanked": self._yanked(name),
        }

    def _link(self, name: str) -> str:
        stated = self.server.stated[name]
        mark = ' data-yanked="bad"' if self._yanked(name) else ""
        return f'<a href="../../files/{html.escape(name)}{f"#sha256={stated}" if stated else ""}"{mark}>{name}</a>'

    def _yanked(self, name: str) -> bool:
        return name in self.server.yanked

    def _answer(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if kind == "application/gzip" and self.server.break_off:
            self.server.break_off -= 1
            data = data[: len(data) // 2]
        self.wfile.write(data)


def registry(files: dict[str, bytes]) -> AbstractContextManager[Registry]:
    """A running registry."""
    return running(Registry(files))
