"""Questions to features: which images are like this one, and which are nearly the same.

Comes in: the directory of features. Goes out: a table, a picture, a list of pairs.
Shapes: D feature, k neighbours.
"""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import DataConfig, UserError
from moco.idle import idle_in_search
from moco.images.formats import lettered, shown
from moco.judge_config import EmbedConfig, SearchConfig
from moco.log import log_to_stderr
from moco.reports.index import (
    PARTNERS,
    Pairs,
    near_duplicates,
    neighbours,
    open_features,
    open_index,
)
from moco.reports.table import Features
from moco.whole_files import output_file

log = logging.getLogger("moco")
_SAID, _DRAWN = 10, 12  # pairs in the log, neighbours in the picture
_CUT = 0.01  # share of a query's values outside of the range that is worth a warning


def search(config: SearchConfig, image: Any = None, backbone: Any = None) -> dict[str, Any]:
    """Answer one question about features.

    Args:
        config: The question.
        image: What Python gives in the place of the file `config.query`.
        backbone: The module of the user's own whose weights the checkpoint holds.

    Returns:
        Plain values: the neighbours of an image, or the file that lists near-duplicates.

    Raises:
        UserError: There are no such features, or the image or its encoder cannot be read.
    """
    log_to_stderr()
    if idle := idle_in_search(config):
        log.info("%s", idle)
    features = open_features(config.index)
    if config.duplicates:
        return _duplicates(features, config)
    return _like(features, config, image, backbone)


def _like(features: Features, config: SearchConfig, image: Any, backbone: Any) -> dict[str, Any]:
    """Find, say and draw the neighbours of an image."""
    source = _open_query(features, config, image)
    vector = embed_query(features, config, source, backbone)
    cosines, ids = (each[0] for each in neighbours(open_index(features), vector, config.k))
    cosines, ids = cosines[ids >= 0].tolist(), ids[ids >= 0].tolist()
    paths, labels = features.column("path"), features.column("label")
    found = [
        {"id": number, "path": paths[number], "label": labels[number], "similarity": round(c, 6)}
        for number, c in zip(ids, cosines, strict=True)
    ]
    result = {"command": "search", "query": shown(config.query), "neighbours": found}
    names = [shown(row["label"] or "") for row in found]
    width = max(map(len, names), default=0)
    for row, name in zip(found, names, strict=True):
        label = f"  {name:{width}}" if width else ""
        log.info("%8.4f%s  %s", row["similarity"], label, shown(row["path"]))
    if config.picture:
        result["picture"] = _draw(features, config, source, found[:_DRAWN])
        log.info("drawn in %s", config.picture)
    return result


def embed_query(
    features: Features, config: SearchConfig, source: Any, backbone: Any = None
) -> np.ndarray:
    """Return the features of the query, 1 x D, by the encoder that made the others.

    Raises:
        UserError: The image cannot be read, or the checkpoint is gone or another one.
    """
    import torch

    from moco.evaluation.features import extract_features
    from moco.evaluation.opening import load, start_process
    from moco.evaluation.own import Given
    from moco.images.labelled import LabelledData
    from moco.reports.embed import checksums_of, network_of

    about, data = features.about, stored_data(features)
    options = about["options"] | {"checkpoint": config.checkpoint or about["checkpoint"]}
    own = EmbedConfig(output="", accelerator=config.accelerator, **options)
    device = start_process(own)
    if not Path(own.checkpoint).exists():
        raise UserError(f"{own.checkpoint} made the features and is gone: give --checkpoint")
    loaded = load(own, data.image_size, Given(backbone=backbone))
    network = network_of(own, loaded).to(device)
    if any(about.get(name, "") != each for name, each in checksums_of(own, loaded).items()):
        raise UserError(f"{own.checkpoint} is not the encoder that made these features: give it "
                        "with --checkpoint, or embed anew")  # fmt: skip
    _read(source, 0)
    with torch.inference_mode():
        found, _ = extract_features(network, LabelledData(source, data).batches(device))
    return found.cpu().numpy()


def stored_data(features: Features) -> DataConfig:
    """Return the settings of the images, as they were read when the features were made."""
    return replace(DataConfig(**features.about["data"]), num_workers=0)


def _open_query(features: Features, config: SearchConfig, image: Any) -> Any:
    """Open the image of the question, read as those of the features were.

    Where these held 8 bits there is no range to share, and the image's values tell one.
    """
    if image is None:
        return open_files(features, [config.query])
    from moco.images.own import open_own
    from moco.images.scaling import PLAIN
    from moco.images.values import as_told

    data, has_range = stored_data(features), "max_value" in features.about["preparation"]
    told = as_told(data)
    if not has_range and (told.low, told.high) == (PLAIN.low, PLAIN.high):
        source = open_own([image], replace(data, min_value="auto", max_value="auto"))
        if source.reading.reason:
            log.info("%s", source.reading)
        return source
    source = open_own([image], data, reading=replace(told, reason="as the features were made"))
    _check_range(source)
    return source


def _check_range(source: Any) -> None:
    """Refuse a query of which the range of the features leaves no picture; warn where it is cut.

    Raises:
        UserError: It becomes black, white, or these two alone, and is not so itself.
    """
    from moco.images.scaling import numbers

    shown_levels = np.unique(_read(source, 0).numpy())
    values = source.items.values(0, source.channels)
    if values.dtype == np.uint8:
        return
    (low, high), found = (source.reading.low, source.reading.high), values[np.isfinite(values)]
    if not found.size:
        raise UserError(f"query holds no number among its {values.dtype} values: give an image")
    held = f"query holds {values.dtype} values of {found.min():g} to {found.max():g}"
    ends = f"{numbers(low)} to {numbers(high)}, the range of the features"
    if len(shown_levels) < min(3, len(np.unique(found))):
        levels = " and ".join(map(str, shown_levels))
        raise UserError(f"{held}, of which {ends}, leaves {levels} alone: scale it as their images")
    if (cut := float(((found < min(low)) | (found > max(high))).mean())) > _CUT:
        log.info("warning: %s, %.0f %% of which lie outside of %s", held, 100 * cut, ends)


def open_files(features: Features, paths: list[str]) -> Any:
    """Open some files as a source, read as those of the features were."""
    from moco.images.image_source import ImageSource
    from moco.images.values import as_told, settle

    data = stored_data(features)  # of an earlier version without a range, where all had 8 bits
    reading = settle(paths, data) if "auto" in (data.min_value, data.max_value) else as_told(data)
    return ImageSource("query", None, paths, None, [], data.channels, reading)


def _read(source: Any, row: int) -> Any:
    from moco.images.decode import BadImage

    try:
        return source.read(row)
    except BadImage as error:
        raise UserError(f"{shown(source.called(row))} cannot be read: {error.reason}") from None


def _draw(features: Features, config: SearchConfig, query: Any, found: list[dict[str, Any]]) -> str:
    """Draw the query beside its neighbours; in the place of one that is gone stands a grey cell."""
    from PIL import Image

    from moco.evaluation.gallery import SIDE, Cell, as_seen, draw_sheet
    from moco.reports.listing import list_images_of

    data, ids = stored_data(features), [row["id"] for row in found]
    line = [Cell(as_seen(_read(query, 0), data.image_size), "query")]
    if features.about["files"]:
        source, rows = open_files(features, features.files(ids)), range(len(ids))
    else:
        source, rows = list_images_of(data).source, ids
    for number, row in zip(rows, found, strict=True):
        try:
            picture = as_seen(_read(source, number).cpu(), data.image_size)
        except UserError as error:
            log.warning("%s", error)
            picture = Image.new("RGB", (SIDE, SIDE), "lightgrey")
        text = f"{lettered(row['label'] or '')[:6]}: " if row["label"] else ""
        line.append(Cell(picture, f"{text}{row['similarity']:.2f}"))
    return draw_sheet(Path(config.picture), [line])


def _duplicates(features: Features, config: SearchConfig) -> dict[str, Any]:
    """List near-duplicates in a file, and say the most alike."""
    pairs = near_duplicates(features, open_index(features), config.above)
    paths = features.column("path")
    target = Path(config.output or features.folder / "duplicates.csv")
    with (
        output_file(target) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        (_write_json if target.suffix.lower() == ".json" else _write_csv)(file, pairs, paths)
    for one, other, cosine in zip(*(each[:_SAID].tolist() for each in pairs[:3]), strict=True):
        log.info("%8.4f  %s  %s", cosine, shown(paths[one]), shown(paths[other]))
    images = len(np.unique(np.concatenate([pairs.first, pairs.second])))
    log.info("%d pairs of %d images have a cosine of %g or more: %s", len(pairs.first), images,
             config.above, target)  # fmt: skip
    if pairs.crowded:
        log.info("%d of them have %d such partners, which is as many as are looked at: there may "
                 "be more pairs", pairs.crowded, PARTNERS)  # fmt: skip
    result = {"command": "search", "duplicates": str(target), "above": config.above}
    return result | {
        "pairs": len(pairs.first),
        "images": images,
        "crowded": pairs.crowded,
        "of": len(features),
    }


def _rows(pairs: Pairs, paths: list[str]) -> Any:
    """Yield each pair: the cosine, both paths, both numbers."""
    for one, other, cosine in zip(pairs.first, pairs.second, pairs.similarity, strict=True):
        yield round(float(cosine), 6), paths[one], paths[other], int(one), int(other)


def _write_csv(file: Any, pairs: Pairs, paths: list[str]) -> None:
    writer = csv.writer(file)
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(pairs, paths))


def _write_json(file: Any, pairs: Pairs, paths: list[str]) -> None:
    """Write a list of objects, one a line."""
    lines = (json.dumps(dict(zip(_COLUMNS, row, strict=True))) for row in _rows(pairs, paths))
    for number, line in enumerate(lines):
        file.write(f"{',' if number else '['}\n{line}")
    file.write("\n]\n" if len(pairs.first) else "[]\n")


_COLUMNS = ("similarity", "path", "other_path", "id", "other_id")
