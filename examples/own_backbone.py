"""Pretrain a network of your own on digits, and export it.

PYTHONPATH=. python examples/own_backbone.py        (after `pip install .` without PYTHONPATH)
"""

import sys
from pathlib import Path

from torch import Tensor, nn

import moco


class Small(nn.Module):
    """From N x 1 x 16 x 16 to maps N x 64 x 4 x 4, which are averaged to features N x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def main(folder: str = "runs/own_backbone", epochs: int = 5) -> Path:
    """Train for some epochs, and write a program that needs neither MoCo nor the class."""
    settings = {"trainer.max_epochs": epochs}
    run = moco.pretrain(recipe="quickstart", backbone=Small(), dir=folder, **settings)
    output = Path(folder, "small.pt2")
    moco.export(run, "torch-export", output, backbone=Small(), overwrite=True)
    return output


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
