"""Export a backbone: load it, place its files on disk, and check them by reading them back.

`write` makes the bytes in memory, so that only `_place` touches the disk. It writes a temporary
sibling, which is read back and compared with the source on real images, and then renamed.
Shapes: N images.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.checkpoints.describe import Features, Files, loading_line, obstacle
from moco.checkpoints.load import Loaded, load_encoder
from moco.checkpoints.official import CLASSIFIER
from moco.checkpoints.places import GraphOptions, check_request
from moco.checkpoints.write import FORMATS
from moco.config import UserError
from moco.whole_files import explained

FP16_TOLERANCE = 0.02  # of the largest feature; 11 bits round each value to 0.0005 of its size


def export(
    checkpoint: str | Path,
    form: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    licence: str = "",
    graph: GraphOptions | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a checkpoint's backbone to `output` and compare what was written with the source.

    Args:
        checkpoint, options: As for `moco.checkpoints.load.load_encoder`.
        form: One of `FORMATS`.
        output: A file, or a directory for timm. It appears whole or not at all.
        overwrite: Replace an earlier export.
        licence: Identifier for the model card, such as mit or cc-by-4.0.
        graph: Choices of onnx.

    Returns:
        What was written, and the largest difference as a share of the largest feature.

    Raises:
        UserError: Wrong input, a format that cannot hold this network, or features that differ.
        RunError: The disk is full or broken.
    """
    output, graph = Path(output), graph or GraphOptions()
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    graph.check(form)
    check_request(checkpoint, form, output, overwrite, licence)
    loaded = load_encoder(checkpoint, **options)
    print(loaded.report, file=sys.stderr)
    if reason := obstacle(loaded, form):
        fitting = ", ".join(name for name in FORMATS if not obstacle(loaded, name))
        raise UserError(f"--format {form} cannot hold {reason}: take one of {fitting}")
    write, read, tolerance = FORMATS[form]
    tolerance = FP16_TOLERANCE if graph.fp16 else tolerance
    with _one_line(f"{loaded.model.backbone} cannot be written as {form}"):
        files = write(loaded, Path(checkpoint), licence, graph)
    again = _one_line(f"{loaded.model.backbone} as {form} does not load again")
    with _place(output, files, overwrite) as written, again:
        difference = _difference(read(written, loaded), loaded, graph)
        if not difference <= tolerance:  # also where it is no number
            raise UserError(
                f"--format {form}: features differ by {difference:.1e} of their size after reading "
                f"back, {tolerance:.0e} is allowed: nothing was written"
            )
    return _result(loaded, form, output, files, difference)


def _result(
    loaded: Loaded, form: str, output: Path, files: Files, difference: float
) -> dict[str, Any]:
    """Describe what was written, for the last line of the command."""
    told = ("layout", "encoder", "epoch", "feature_dim")
    result = {"format": form, "output": str(output), "backbone": loaded.model.backbone}
    result |= {name: getattr(loaded, name) for name in told}
    result["max_feature_difference"] = difference
    if form in ("torchvision", "official"):
        result["left_to_the_consumer"] = list(CLASSIFIER)
    result["load_with"] = loading_line(loaded, form, output)
    how = loaded.preparation
    print(f"load with: {result['load_with']}", file=sys.stderr)
    print(f"prepare images: {how.in_words()}", file=sys.stderr)
    places = [str(output / name) if name else str(output) for name in files]
    return result | loaded.data | {"preparation": how.as_note(), "files": places}


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn any error of an exporter or a loader into a UserError of one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from error


@contextlib.contextmanager
def _place(output: Path, files: Files, overwrite: bool) -> Iterator[Path]:
    """Write files beside `output`, yield them to be checked, and rename them if no error came.

    A link is followed.
    """
    place = Path(os.path.realpath(output))  # where a link leads to
    beside = {"prefix": ".export-", "dir": place.parent, "ignore_cleanup_errors": True}
    with explained(f"--output {output}"), tempfile.TemporaryDirectory(**beside) as room:
        written, old = Path(room, output.name), Path(room, f"{output.name}.old")
        if "" not in files:
            written.mkdir()
        for name, content in files.items():
            with (written / name if name else written).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        yield written
        if place.exists() and not overwrite:
            raise UserError(f"--output {output} exists by now: choose another")
        if place.is_dir():
            os.rename(place, old)
        try:
            os.replace(written, place)
        except OSError:
            if old.exists():
                os.rename(old, place)
            raise


def example_images(loaded: Loaded, height: int, width: int) -> Tensor:
    """Return six crops of scikit-learn's two photographs, N x channels x H x W, normalised."""
    from sklearn.datasets import load_sample_images

    channels = loaded.data["channels"]
    crops = []
    for photograph in load_sample_images().images:
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 255  # 1 3 H W
        for left in (0, 100, 200):
            square = image[:, :, :, left : left + 400]
            crops.append(nn.functional.interpolate(square, (height, width), mode="area"))
    images = torch.cat(crops)
    grey = images.mean(1, keepdim=True)
    images = grey if channels == 1 else images.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
    mean, std = (torch.tensor(loaded.data[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


@torch.no_grad()
def _difference(features: Features, loaded: Loaded, graph: GraphOptions) -> float:
    """Compare two feature extractors in batches of one and of several images."""
    batches = [
        example_images(loaded, *size) for size in graph.image_sizes(loaded.data["image_size"])
    ]
    worst = 0.0
    for batch in (*batches, batches[0][:1]):
        wanted, found = loaded.backbone(batch), features(batch)
        if not wanted.isfinite().all():
            raise UserError("the checkpoint's features are not finite: take one from before that")
        if found.shape != wanted.shape:
            return float("inf")
        scale = wanted.abs().max().clamp(min=1e-30)
        worst = max(worst, ((found - wanted).abs().max() / scale).nan_to_num(float("inf")).item())
    return worst
