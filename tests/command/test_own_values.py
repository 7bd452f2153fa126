"""Images of more than 8 bits from Python: runs and judgements as of a folder of these files."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from door import PIXELS, STREAMED, assert_resumes, pretrain
from PIL import Image
from runs import assert_same_end, load
from torch.utils.data import Dataset

import moco
from moco.pixels import to_uint8

VALUES = (PIXELS.astype(np.float32) - 40) * 11  # -440 to 2354
VALUES[:, 2:5, 2:5] = math.nan
LABELS = [0] * 24 + [1] * 24
FEW = {"k": [3], "shots": [1], "gallery": False, "baselines": False, "accelerator": "cpu"}


class Heights(Dataset):
    """Pairs of values and a label."""

    def __len__(self):
        return len(VALUES)

    def __getitem__(self, index):
        return torch.from_numpy(VALUES[index]).permute(2, 0, 1), LABELS[index]


def saved(root: Path, values: np.ndarray = VALUES) -> Path:
    """Save values as files in two classes, which stand there in the order of the array."""
    for number, (image, label) in enumerate(zip(values, LABELS, strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        np.save(root / str(label) / f"{number:02d}.npy", image)
    return root


@pytest.mark.parametrize("settings", [{}, STREAMED], ids=["held", "streamed"])
def test_a_run_on_values_is_that_on_their_files(in_tmp, said, settings):
    pretrain(saved(Path("set")), "files", **settings)
    (line,) = [line for line in said if line.startswith("values: ")]
    assert line.startswith("values: -1024 becomes 0 and 4095 becomes 255 (auto: float32 images, 48")
    for name, given in {"run": VALUES, "items": Heights()}.items():
        said.clear()
        pretrain(given, name, **settings)
        assert line in said
        assert_same_end("files", name)
    stored = load("run/checkpoints/last.ckpt")["decided"]
    assert (stored["min_value"], stored["max_value"]) == ([-1024.0], [4095.0])
    said.clear()
    assert_resumes(VALUES)
    assert "values: -1024 becomes 0 and 4095 becomes 255 (as the run began)" in said


def test_what_a_run_has_learnt_is_judged_and_used_in_its_range(in_tmp, said):
    run = pretrain(VALUES, **{"trainer.max_steps": 1})
    # Others have another range of their own: that of the run counts.
    test = VALUES / 8
    saved(Path("set/train")), saved(Path("set/test"), test)
    for name in "ab":
        Path(name).mkdir()
    files = moco.knn(run, "set", output="a", **FEW)
    own = moco.knn(run, ((VALUES, LABELS), (test, LABELS)), output="b", **FEW)
    assert own["top1"] == files["top1"]
    for images, output in ((Path("set/test"), "files"), (test, "own"), ([*test], "items")):
        moco.embed(run, images, output, accelerator="cpu")
    vectors = [pq.read_table(f"{name}/features.parquet")["vector"].to_pylist()
               for name in ("files", "own", "items")]  # fmt: skip
    assert vectors[0] == vectors[1] == vectors[2]
    bands = test.transpose(0, 3, 1, 2)
    levels = to_uint8(bands, (-1024.0,), (4095.0,))
    transform = run.encoder.transform
    assert transform(torch.from_numpy(bands)).equal(transform(torch.from_numpy(levels)))
    options = {"count": 48, "views": 2, "accelerator": "cpu"}
    own = moco.quality(run, test, **options)
    files = moco.quality(run, Path("set/test"), **options)
    assert own["backbone"] == files["backbone"]


def test_a_picture_in_grey_of_16_bits_is_prepared_by_the_range_of_the_run(in_tmp):
    pictures = [Image.fromarray(16 * pixels[..., 0].astype(np.uint16)) for pixels in PIXELS]
    assert pictures[0].mode == "I;16"
    run = pretrain(pictures, **{"trainer.max_steps": 1})
    transform = run.encoder.transform
    assert (transform.min_value, transform.max_value) == ([0.0], [4095.0])
    levels = np.rint(PIXELS[0, ..., 0] * (16 * 255 / 4095)).astype(np.uint8)
    assert torch.equal(transform(pictures[0]), transform(torch.from_numpy(levels)[None]))
