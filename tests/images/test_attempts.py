"""Requests of a store: what is tried again, and what no attempt mends."""

from __future__ import annotations

import pytest

from moco.config import RunError
from moco.images import stores


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
