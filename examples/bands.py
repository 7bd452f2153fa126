"""Pretrain on images of 16 bands that a data set of your own reads.

    PYTHONPATH=. python examples/bands.py        (after `pip install .` without PYTHONPATH)

Replace `Scenes` by what reads your arrays: a length, and an item for each number from 0 up.
"""

import sys

import numpy as np
from torch.utils.data import Dataset

import moco


class Scenes(Dataset):
    """Made-up scenes of 16 bands, uint8; yours would be read from files here."""

    def __init__(self, count: int = 256) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        draw = np.random.default_rng(index)
        coarse = draw.integers(0, 256, (16, 6, 6), dtype=np.uint8)  # C x H x W
        return coarse.repeat(8, axis=1).repeat(8, axis=2)


def main(folder: str = "runs/bands", epochs: int = 5) -> moco.Pretrained:
    """Train for some epochs, with views for any number of bands."""
    settings = {"trainer.max_epochs": epochs, "data.image_size": 32, "data.views": "cifar"}
    return moco.pretrain(Scenes(), dir=folder, **settings)


if __name__ == "__main__":
    run = main(*sys.argv[1:2])
    print(run.checkpoint, run.metrics["loss"])
