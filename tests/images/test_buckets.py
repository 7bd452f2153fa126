"""Buckets of a store that hold nothing, or that are not there."""

from __future__ import annotations

import pytest
from webserver import S3Server

from moco.config import DataConfig, UserError
from moco.images import patterns, stores


@pytest.fixture(scope="module")
def s3():
    """An S3 server on loopback with an empty bucket `images`."""
    for name in ("moto.server", "boto3", "s3fs"):
        pytest.importorskip(name)
    with S3Server() as running:
        yield running


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("s3://imagse/set", "the store has no bucket imagse: mend its name"),
        ("s3://imagse/set/*.tar", "the store has no bucket imagse: mend its name"),
        ("s3://images/set", "names no shard"),
        ("s3://images/{train,val}-*.tar", "names no shard"),
    ],
)
def test_a_bucket_that_is_not_there_is_told_from_an_empty_one(s3, root, reason, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "WAITS_S", (0.0,) * 5)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=reason):
        patterns.find_shards(DataConfig(dataset="shards", root=root))
