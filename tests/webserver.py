"""A web server on loopback that serves a folder with ranges, and fails as it is told."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class WebServer(http.server.ThreadingHTTPServer):
    """Serve a folder until the block ends.

    Attributes:
        asked: (method, name) of each request so far.
        fault: Tells what befalls a request, by its number, method and name: `500`, `cut` or
            nothing.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.fault: Callable[[int, str, str], str] = lambda number, method, name: ""
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        server, name = self.server, self.path.lstrip("/")
        server.asked.append((method, name))
        fault = server.fault(len(server.asked), method, name)
        path = server.folder / name
        if fault == "500" or not path.is_file():
            self.send_error(500 if fault == "500" else 404)
            return
        content = path.read_bytes()
        tag, total, code = hashlib.md5(content).hexdigest(), len(content), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, total
        if span:
            start, end, code = int(span[1]), int(span[2] or total - 1) + 1, 206
        part = content[start:end]
        self.send_response(code)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{tag}"')
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{total}")
        self.end_headers()
        if method == "GET":
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
        if fault == "cut":
            self.close_connection = True
