"""What every test runs under: one thread, no network, real images only where they are given."""

import os

# Before torch is imported: it reads them once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)

from pathlib import Path

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture
def real_images() -> Path:
    """Return the folder of real image archives that MOCO_TEST_IMAGES names, or skip."""
    path = os.environ.get("MOCO_TEST_IMAGES", "")
    if not path:
        pytest.skip("MOCO_TEST_IMAGES does not name a folder of real images")
    if not Path(path).is_dir():
        pytest.fail(f"MOCO_TEST_IMAGES is {path}, which is no folder")
    return Path(path)


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes in one gloo group, started once."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
