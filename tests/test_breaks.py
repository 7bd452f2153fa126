"""The breaks of `make breaks` still find their places."""

from __future__ import annotations

import pytest
from breaks import BREAKS, ROOT


@pytest.mark.parametrize("name, before, after, tests", BREAKS)
def test_a_break_finds_its_place(name, before, after, tests):
    text = (ROOT / "moco" / name).read_text(encoding="utf-8")
    assert text.count(before) == 1 and before != after
    assert all((ROOT / path).exists() for path in tests.split())
