"""timm's smallest network of each kind trains, resumes and loads back, or is refused in a line.

`python tests/sweep.py` does it with every network of at most 30 million parameters.
"""

from __future__ import annotations

import pytest
import timm
from sweep import try_backbone


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_a_backbone_trains_resumes_and_loads(name, tmp_path):
    found = try_backbone(name, tmp_path)
    assert found == "trains" or name in found  # a refusal names the network
