"""Requests of a store: what is tried again, and what no attempt mends."""

from __future__ import annotations

import socketserver
import threading

import pytest
from webserver import WebServer

from moco.config import DataConfig, RunError, UserError
from moco.images import indexing, stores


def attempts(error: Exception, monkeypatch) -> int:
    """Return how often a request that fails so is made."""
    made: list[int] = []
    monkeypatch.setattr(stores, "WAITS_S", (0.0,) * 5)

    def fail() -> None:
        made.append(1)
        raise error

    with pytest.raises(RunError, match=r"s3://bucket/1.tar cannot be read"):
        stores._tried("s3://bucket/1.tar", fail)
    return len(made)


def test_missing_credentials_are_told_at_once(monkeypatch):
    botocore = pytest.importorskip("botocore.exceptions")
    assert attempts(botocore.NoCredentialsError(), monkeypatch) == 1
    assert attempts(botocore.ProfileNotFound(profile="mine"), monkeypatch) == 1
    assert attempts(botocore.ReadTimeoutError(endpoint_url="http://here"), monkeypatch) == 6


def test_an_s3_that_stays_away_is_not_asked_for_minutes(monkeypatch):
    pytest.importorskip("s3fs")
    asked: list[int] = []

    class Closed(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(1)

    monkeypatch.setattr(stores, "WAITS_S", ())
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "x")
        with pytest.raises(RunError, match=r"s3://bucket/\*.tar cannot be read"):
            stores.listed("s3://bucket/*.tar", ".tar")
        server.shutdown()
    assert len(asked) <= 12  # aiohttp asks twice where a connection is closed


def test_parquet_of_a_web_server_that_sends_no_parts_is_told_at_once(tmp_path, monkeypatch):
    """It has its index at its end; what is tried again fails for the same reason."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.parquet").write_bytes(b"PAR1" * 100)
    with WebServer(tmp_path / "set") as server:
        server.fault = lambda number, method, name: "whole"
        root = f"{server.address}/{{0..0}}.parquet"
        with pytest.raises(UserError, match=r"0.parquet: its web server sends no parts .* tars"):
            indexing.open_shards(DataConfig(dataset="parquet", root=root))
    assert len(server.asked) < 4
