"""MoCo in a Trainer of your own, on digits.

PYTHONPATH=. python examples/plain_trainer.py        (after `pip install .` without PYTHONPATH)
"""

import sys
from pathlib import Path

import pytorch_lightning as pl

import moco


def main(folder: str = "runs/plain", epochs: int = 5) -> Path:
    """Train, or go on where the last run in the same directory was stopped."""
    pl.seed_everything(0)
    images = moco.DataConfig(
        dataset="digits", channels=1, image_size=16, upscale=2, batch_size=64, views="cifar", flip=0
    )
    model = moco.ModelConfig(
        backbone="resnet10t", stem="cifar", width=0.25, queue_size=128, key_bn="split", bn_splits=4
    )
    module = moco.MoCo(model, moco.OptimConfig(lr=0.06), channels=1, image_size=16)
    data = moco.PretrainData(images, seed=0, shuffle=True, symmetric=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=moco.callbacks(module, data, folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    last = Path(folder, "checkpoints", "last.ckpt")
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    return last


if __name__ == "__main__":
    print(moco.load_backbone(main(*sys.argv[1:2])))
