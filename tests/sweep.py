"""Train, resume and load every backbone of timm up to 30 million parameters, or see it refused.

    python tests/sweep.py [WORDS]        only backbones whose names hold one of the words

`tests/training/test_backbones.py` does the same with timm's smallest networks of each kind.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pictures import write_pictures
from runs import load, same

import train
from moco.checkpoints.load import load_encoder
from moco.config import UserError

MOST_PARAMETERS = 30_000_000
SETTINGS = [
    *("--model.queue_size", "8", "--model.key_bn", "plain", "--model.embedding_dim", "16"),
    *("--data.batch_size", "4", "--data.upscale", "32", "--optim.lr", "0.001"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--run.knn_every", "0"),
    *("--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"),
    *("--run.checkpoint_every", "1", "--run.keep_checkpoints", "9"),
    *("--run.report", "false"),
]


def image_size(name: str) -> int:
    """Return the smallest side that a network is likely to take: its own where that is fixed."""
    default = timm.get_pretrained_cfg(name)
    return default.input_size[1] if default.fixed_input_size else min(default.input_size[1], 96)


def try_backbone(name: str, folder: Path) -> str:
    """Take two steps, again from the first, and load what came out.

    Args:
        name: Of timm.
        folder: Empty; takes the pictures and two runs.

    Returns:
        "trains", or the line that refuses the network.

    Raises:
        AssertionError: The resumed run ended otherwise, or the loaded network has other features.
    """
    pictures = [f"{number}.png" for number in range(8)]
    write_pictures(folder / "pictures", pictures, np.random.default_rng(0), size=(24, 24))
    size = image_size(name)
    asked = ["--model.backbone", name, "--data.image_size", str(size), *SETTINGS]
    asked += ["--data.root", str(folder / "pictures")]
    whole, cut = folder / "whole", folder / "cut"
    try:
        train.main([*asked, "--run.dir", str(whole)])
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    shutil.copytree(whole, cut)
    first = cut / "checkpoints" / "step_000000001.ckpt"
    first.with_name("step_000000002.ckpt").unlink()
    os.replace(first, cut / "checkpoints" / "last.ckpt")
    train.main(["--resume", str(cut), "--run.dir", str(cut)])
    ends = [load(run / "checkpoints" / "last.ckpt") for run in (whole, cut)]
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert same(ends[0][part], ends[1][part]), f"{part} differs after a resume"
    loaded = load_encoder(whole / "checkpoints" / "last.ckpt")
    stored = ends[0]["state_dict"]
    for key, value in loaded.backbone.state_dict().items():
        assert value.equal(stored[f"query_encoder.backbone.{key}"]), f"{key} differs in the file"
    with torch.no_grad():
        features = loaded.backbone(torch.zeros(2, 3, size, size))
    assert features.ndim == 2 and features.isfinite().all()
    return "trains"


def parameters(name: str) -> int:
    """Count a network's parameters without making them; 0 where timm cannot build it so."""
    with contextlib.suppress(Exception), torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
    return 0


def main(words: list[str]) -> int:
    """Try all, print a line each; return 1 where one neither trains nor is refused, or none is."""
    tried, failed = 0, []
    for name in timm.list_models():
        if (words and not any(word in name for word in words)) or not (
            0 < parameters(name) <= MOST_PARAMETERS
        ):
            continue
        tried += 1
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            try:
                found = try_backbone(name, Path(folder))
            except Exception as error:
                found = f"FAILED: {type(error).__name__}: {error}"
                failed.append(name)
        print(
            f"{name}: {' '.join(found.split())[:200]} ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        gc.collect()
    print(f"{tried} tried, {len(failed)} failed: {', '.join(failed)}")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
