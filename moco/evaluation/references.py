"""References: other checkpoints, judged beside the encoder, and which test images they have seen.

A network that was pretrained on the images that test it has an advantage which no error tells. So
the pixels of the test images are compared with those of the images that each checkpoint's run
trained on, where its settings say where they lie.
Shapes: N images of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.checkpoints.load import Loaded, load_encoder
from moco.checkpoints.matching import checksum
from moco.config import DataConfig, RunError, TrainConfig, UserError
from moco.evaluation.subject import Layer, Subject
from moco.evaluation.verdict import REFERENCE
from moco.images import aside, sources
from moco.images.decode import BadImage
from moco.images.image_source import ImageSource
from moco.pixels import normalisation
from moco.run_directory import run_of, same_images

log = logging.getLogger("moco")
_SHOWN = 3  # images that the log names
# Settings by which files become pixels, which must be those of the test images to compare them.
_READING = ("channels", "min_value", "max_value", "exif", "dicom_window")


@dataclass(frozen=True)
class Reference:
    """A checkpoint that is judged beside the encoder."""

    name: str
    path: str
    loaded: Loaded


class Renormalise(nn.Module):
    """Take images N x C x H x W that were normalised for one network to another's normalisation."""

    def __init__(self, before: tuple[list[float], ...], after: tuple[list[float], ...]) -> None:
        super().__init__()
        (mean, std), (new_mean, new_std) = (map(torch.tensor, each) for each in (before, after))
        self.register_buffer("scale", (std / new_std)[:, None, None])
        self.register_buffer("shift", ((mean - new_mean) / new_std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def add_references(subject: Subject) -> list[Reference]:
    """Put the networks of `reference` beside those of a subject.

    Raises:
        UserError: A file that cannot be judged on the subject's images.
    """
    found = []
    with distributed.together():
        for path in subject.judge.reference:
            loaded = load_encoder(path, "query", image_size=subject.data.image_size)
            name = _name(path, subject)
            subject.networks[name] = _network(path, loaded, subject).eval().to(subject.device)
            found.append(Reference(name, path, loaded))
            log.info("%s: %s", name, loaded.report)
    return found


def _name(path: str, subject: Subject) -> str:
    """Name a reference by its run's directory or its file; of two alike the second has a number."""
    run_dir = run_of(Path(path))
    label = (run_dir or Path(path)).absolute().name
    name = f"{REFERENCE} {label}"[:28]
    alike = [each for each in subject.networks if each.startswith(name)]
    return f"{name} {len(alike) + 1}" if alike else name


def _network(path: str, loaded: Loaded, subject: Subject) -> Layer:
    judge, data = subject.judge, subject.data
    if loaded.data["channels"] != data.channels:
        raise UserError(
            f"--reference {path} takes images of {loaded.data['channels']} channels and the "
            f"checkpoint {data.channels}: leave it out"
        )
    head = loaded.head if judge.layer == "head" else None
    if judge.layer == "head" and head is None:
        raise UserError(f"--reference {path} holds no projection head: take --layer backbone")
    known = {name: loaded.data[name] for name in ("channels", "mean", "std") if name in loaded.data}
    before, after = normalisation(data), normalisation(replace(data, **known))
    own = [] if before == after else [Renormalise(before, after)]
    return Layer(nn.Sequential(*own, loaded.backbone), head, judge.precision == "bf16-mixed")


def describe(references: list[Reference], subject: Subject) -> dict[str, Any]:
    """State which references were judged, and which test images every checkpoint has seen."""
    if not references:
        return {}
    files = [
        {
            "name": each.name,
            "checkpoint": each.path,
            "layout": each.loaded.layout,
            "backbone": each.loaded.model.backbone,
            "backbone_sha256": checksum(subject.networks[each.name]),
        }
        for each in references
    ]
    tested = _digests(subject.queries.source)
    judged = {subject.judge.checkpoint: subject.loaded}
    judged |= {each.path: each.loaded for each in references}
    seen = {path: _seen(path, loaded, tested, subject) for path, loaded in judged.items()}
    return {"references": files, "test_images_in_pretraining": seen}


def _seen(
    path: str, loaded: Loaded, tested: list[tuple[str, str]], subject: Subject
) -> dict[str, Any] | None:
    """Find the test images that a checkpoint's run trained on; None where that cannot be known.

    Args:
        tested: Hash and name of each test image.
    """
    if not (stored := loaded.config.get("data")):
        log.info("%s does not say which images it was trained on", path)
        return None
    known = {name: stored[name] for name in (f.name for f in fields(DataConfig)) if name in stored}
    known |= {name: getattr(subject.data, name) for name in _READING} | {"download": False}
    try:
        own = DataConfig(**known)
        pool = sources.open_source(own, "train")
        if same_images(sources.identify(pool, own.root), loaded.images):
            seed = TrainConfig.from_dict(loaded.config).run.seed
            pool, _ = aside.set_aside(pool, loaded.held_out, seed)
        elif loaded.held_out:
            log.info("%s has set images aside of a set that has changed since: all count", path)
        log.info("comparing test images with the %d images that %s was trained on", len(pool), path)
        trained = {digest for digest, _ in _digests(pool)}
    except (UserError, RunError, OSError) as error:
        log.info("the images that %s was trained on cannot be read: %s", path, error)
        return None
    both = [(digest, name) for digest, name in tested if digest in trained]
    shown = [f"{name} ({digest[:12]})" for digest, name in both[:_SHOWN]]
    log.info(
        "%d of %d test images are among them%s",
        len(both),
        len(tested),
        f": {', '.join(shown)}{', ...' if len(both) > _SHOWN else ''}" if both else "",
    )
    return {"pool": len(pool), "count": len(both), "images": dict(both)}


def _digests(source: ImageSource) -> list[tuple[str, str]]:
    """Return the SHA-256 of each image's shape and pixels, with its file or place."""

    def of(index: int) -> tuple[str, str] | None:
        try:
            image = source.read(index).contiguous()
        except BadImage:
            return None
        digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes())
        return digest.hexdigest(), str(source.paths[index]) if source.paths else f"image {index}"

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        return [*filter(None, threads.map(of, range(len(source))))]
