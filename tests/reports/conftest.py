"""Fixtures of the tests of features."""

from __future__ import annotations

import pytest
from embedding import checkpoint, in_small_parts


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def small_parts(monkeypatch):
    in_small_parts(monkeypatch)
