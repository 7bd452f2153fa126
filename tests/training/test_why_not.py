"""Why a checkpoint was not written: the system's reason, which torch hides."""

from __future__ import annotations

import errno
import io

import torch

from moco.training.writing import why_not


class Quota(io.BytesIO):
    def write(self, content) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_quota_is_named_although_the_disk_has_room(tmp_path):
    try:
        torch.save({"weights": torch.zeros(1000)}, Quota())
    except (OSError, RuntimeError) as error:
        assert why_not(error, tmp_path) == f"Disk quota exceeded ({tmp_path})"
