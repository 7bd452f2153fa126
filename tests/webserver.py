"""Servers on loopback that fail as they are told: a web server with ranges, and one of S3."""

from __future__ import annotations

import functools
import hashlib
import http.server
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Faults:
    """What a server was asked, and what befalls the next requests.

    Attributes:
        asked: (method, name) of each request so far; RANGE is a GET of a part.
        fault: Tells what befalls a request, by its number, method and name: `500`, `cut`, `whole`
            (a web server sends no part of a file) or nothing.
        latency: Seconds that pass before each answer.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.fault: Callable[[int, str, str], str] = lambda number, method, name: ""
        self.latency = 0.0

    def meet(self, method: str, name: str, is_range: bool) -> str:
        """Note a request and return what befalls it."""
        method = "RANGE" if method == "GET" and is_range else method
        self.asked.append((method, name))
        time.sleep(self.latency)
        return self.fault(len(self.asked), method, name)


class WebServer(Faults, http.server.ThreadingHTTPServer):
    """Serve a folder until the block ends."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        Faults.__init__(self)
        http.server.ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), _Handler)
        self.folder = folder
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
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fault = server.meet(method, name, bool(span))
        path = server.folder / name
        span = None if fault == "whole" else span
        if fault == "500" or not path.is_file():
            self.send_error(500 if fault == "500" else 404)
            return
        total, code = path.stat().st_size, 200
        start, end = 0, total
        if span:
            start, end, code = int(span[1]), min(int(span[2] or total), total - 1) + 1, 206
        self.send_response(code)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_digest(path, path.stat().st_mtime_ns)}"')
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        self.end_headers()
        if method == "GET":
            with open(path, "rb") as file:
                file.seek(start)
                self.wfile.write(file.read((end - start) // (2 if fault == "cut" else 1)))
        if fault == "cut":
            self.close_connection = True


@functools.lru_cache(4096)
def _digest(path: Path, changed: int) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class S3Server(Faults):
    """An S3 server of moto's with one bucket, until the block ends.

    Attributes:
        environment: What a client is told by the environment.
        client: One of boto3's.
    """

    BUCKET = "images"

    def __enter__(self) -> S3Server:
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel("ERROR")
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "c0ffee",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="someone", aws_secret_access_key="c0ffee",
        )  # fmt: skip
        self.client.create_bucket(Bucket=self.BUCKET)
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def upload(self, folder: Path, pattern: str = "*") -> None:
        """Copy the files of a folder to `set/` in the bucket."""
        for path in sorted(folder.glob(pattern)):
            self.client.upload_file(str(path), self.BUCKET, f"set/{path.name}")

    def _answer(self, environ: dict[str, Any], start_response: Callable) -> Iterator[bytes]:
        name = environ["PATH_INFO"].removeprefix(f"/{self.BUCKET}/")
        fault = self.meet(environ["REQUEST_METHOD"], name, "HTTP_RANGE" in environ)
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return iter([b""])
        if fault != "cut":
            return self._application(environ, start_response)

        def last(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start_response(status, [*headers, ("Connection", "close")], *rest)

        content = b"".join(self._application(environ, last))
        return iter([content[: len(content) // 2]])
