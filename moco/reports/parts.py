"""Parts: features are computed and written part by part, so that a run that was killed goes on.

Each rank computes every W-th part that is not there yet, in batches that depend neither on the
ranks nor on what was done before, and writes it whole. Rank 0 puts the parts behind one another.
Shapes: M images, N images of a batch, D feature, W ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import UserError
from moco.evaluation.features import check_finite, each_batch
from moco.images.bad_files import FILES_S, unreadable
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData
from moco.judge_config import EmbedConfig
from moco.log import track
from moco.reports.listing import Listing
from moco.reports.table import FILE, INDEX, Features, as_text, vectors_of, writing
from moco.whole_files import output_file

log = logging.getLogger("moco")
PARTS, BAD_FILES = ".parts", "bad_files.txt"  # inside the directory of the features
_BATCH = 256  # images; as `LabelledData.batches` takes
_PART_BYTES = 2**26  # of features in a part, at most, unless one batch has more
_PART_BATCHES = 32


@dataclass
class Job:
    """What is to be computed and written.

    Attributes:
        network: Images to features, on this rank's device.
        listing, images: The M images.
        about: What the file's metadata says, in plain values.
    """

    config: EmbedConfig
    network: nn.Module
    listing: Listing
    images: LabelledData
    about: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def rows(self) -> int:
        """How many images a part has; the last one may have fewer."""
        batches = _PART_BYTES // (4 * _BATCH * math.prod(self.about["shape"]))
        return _BATCH * min(_PART_BATCHES, max(1, batches))

    @property
    def starts(self) -> range:
        """The first row of each part."""
        return range(0, len(self.images), self.rows)

    def part(self, start: int) -> Path:
        """Return the file of the part that begins with a row."""
        return self.folder / PARTS / f"{start:012d}.parquet"


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two files hold the same features; how they are computed may differ."""
    names = ("backbone_sha256", "head_sha256", "shape", "preparation", "data_root", "images")
    names += ("state", "labels", "options")
    return all(one.get(name) == other.get(name) for name in names)


def is_done(job: Job) -> bool:
    """Tell whether the features are there; where not, prepare the directory of the parts.

    Features that are to be replaced stay until the new ones are whole; parts of others go.

    Raises:
        UserError: It holds other features, or parts of others.
    """
    os.makedirs(job.folder, exist_ok=True)
    target, plan = job.folder / FILE, job.folder / PARTS / "plan.json"
    about = {**job.about, "rows": job.rows}
    goes_on = plan.is_file() and _same(_planned(plan), about)
    is_same = target.is_file() and _same(_told(target), about)
    if is_same and not _may_grow(job):
        log.info("%s holds these features already", target)
        if goes_on:
            remove_parts(job)
        return True
    other = target if target.is_file() and not is_same else None
    if plan.is_file() and not goes_on and any(plan.parent.glob("*.parquet")):
        other = plan
    if other and not job.config.overwrite:
        raise UserError(
            f"{other} is of other features (another encoder, other or changed images, other labels "
            "or options): name another --output, or give --overwrite"
        )
    if not goes_on:
        remove_parts(job)  # without a plan they may be of anything
        (job.folder / BAD_FILES).unlink(missing_ok=True)
        os.makedirs(plan.parent, exist_ok=True)
        with output_file(plan) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
    return False


def _may_grow(job: Job) -> bool:
    """Tell whether an image that has no features can be read by now, as with a further package."""
    features = Features(job.folder)
    if len(features) == len(job.listing.names):
        return False
    there = {*features.column("path")}
    rows = [row for row, name in enumerate(job.listing.names) if as_text(name) not in there]
    bad, seen = unreadable(job.images.source, rows, ImageSource.read, FILES_S)
    if len(bad) < seen:
        log.info("%d of %d images without features can be read now: computing anew",
                 seen - len(bad), len(rows))  # fmt: skip
    return len(bad) < seen


def _told(path: Path) -> dict[str, Any]:
    """Return what a file of features says of itself; of a foreign file nothing."""
    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(b"moco", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}


def _planned(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def compute(job: Job, device: torch.device) -> None:
    """Compute this rank's share of the parts that are not there."""
    images, world = job.images, distributed.world_size()
    done = distributed.from_first(lambda: [s for s in job.starts if job.part(s).is_file()])
    images.bad.note([bad for start in done for bad in _unread(job.part(start))], agreed=True)
    images.bad.look_ahead()
    if done:
        log.info("going on: %d of %d parts are there", len(done), len(job.starts))
    waiting = [start for start in job.starts if start not in {*done}]
    mine = waiting[distributed.rank() :: world]
    parts = [_part_rows(job, start).split(_BATCH) for start in mine]
    batches = [rows for part in parts for rows in part]
    cut = track(images.cut(batches, device), "features", len(batches))
    features = each_batch(job.network, cut)
    for turn in range(math.ceil(len(waiting) / world)):
        with distributed.together():
            if turn < len(mine):
                _write_part(job, mine[turn], islice(features, len(parts[turn])))
    for _ in features:  # the end of what workers make
        pass
    images.bad.agree()


def _part_rows(job: Job, start: int) -> Tensor:
    return torch.arange(start, min(start + job.rows, len(job.images)))


def _write_part(job: Job, start: int, features: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Write one part: which rows could be read and their vectors, and why others could not."""
    pairs = [(found.flatten(1), rows) for found, rows in features if len(rows)]
    width = math.prod(job.about["shape"])
    found = torch.cat([found for found, _ in pairs]) if pairs else torch.empty(0, width)
    rows = torch.cat([rows.cpu() for _, rows in pairs]) if pairs else torch.empty(0).long()
    check_finite(found, "the encoder's features")
    if job.config.dtype == "float16":
        found = found.half()
        if not found.isfinite().all():
            raise UserError("features are beyond float16's 65504: take --dtype float32")
    absent = sorted({*_part_rows(job, start).tolist()} - {*rows.tolist()})
    unread = json.dumps([(row, job.images.bad.found[row]) for row in absent])
    columns = {"row": pa.array(rows.numpy()), "vector": vectors_of(found.cpu().numpy())}
    table = pa.table(columns).replace_schema_metadata({"unread": unread})
    with writing(job.part(start), table.schema) as writer:
        writer.write_table(table)


def _unread(part: Path) -> list[tuple[int, str]]:
    """Return the rows that could not be read in a part, and why."""
    return [(row, why) for row, why in json.loads(pq.read_schema(part).metadata[b"unread"])]


def join(job: Job) -> None:
    """Put the parts behind one another, with what is known of each image."""
    listing, first = job.listing, 0
    texts = {"path": [as_text(name) for name in listing.names]}
    texts |= {"split": listing.splits} if any(listing.splits) else {}
    if any(listing.labels):
        texts["label"] = [label and as_text(label) for label in listing.labels]
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    if texts["path"] != listing.names:
        columns["path_bytes"] = pa.array(map(os.fsencode, listing.names), pa.binary())
    vector = pq.read_schema(job.part(0)).field("vector")
    known = [pa.field(name, values.type) for name, values in columns.items()]
    schema = pa.schema([pa.field("id", pa.int64()), *known, vector])
    schema = schema.with_metadata({"moco": json.dumps(job.about)})
    (job.folder / INDEX).unlink(missing_ok=True)  # of features before
    with writing(job.folder / FILE, schema) as writer:
        for start in job.starts:
            part = pq.read_table(job.part(start))
            ids = pa.array(np.arange(first, first + len(part)))
            own = [values.take(part["row"].combine_chunks()) for values in columns.values()]
            writer.write_table(pa.table([ids, *own, part["vector"]], schema=schema))
            first += len(part)


def remove_parts(job: Job) -> None:
    """Remove the directory of the parts, once the file holds them."""
    shutil.rmtree(job.folder / PARTS, ignore_errors=True)
