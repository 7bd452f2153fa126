"""Preview: the view pairs of a run that has not begun."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco.config import TrainConfig, UserError
from moco.images import aside, sources
from moco.images.pairs import find_partners
from moco.random import permutation
from moco.reports.pairs import make_pairs
from moco.reports.pictures import draw_rows
from moco.training.announce import set_up_logging
from moco.training.settling import settle

log = logging.getLogger("moco")
_IMAGES, _EPOCHS = 12, (0, 1, 2)


def preview(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Draw images with the view pairs of their first epochs, without training.

    Args:
        config: Settings, passed by `moco.checks.check`; auto is decided as a run would.
        output: PNG to write.

    Raises:
        UserError: No images, or settings that do not fit them.
    """
    set_up_logging()
    source = sources.open_source(config.data, "train")
    source, _ = aside.part(source, config.data, config.run, None)
    config = settle(config, source, None).config
    reading, data = source.reading, config.data
    if reading.reason:
        data = replace(data, min_value=list(reading.low), max_value=list(reading.high))
    chosen = permutation(config.run.seed, "preview", 0, len(source))[:_IMAGES].tolist()
    partners = find_partners(source, data, config.run.seed)
    pairs = make_pairs(source, data, config.run.seed, _EPOCHS, chosen, partners)
    if not pairs:
        raise UserError("none of the images that were looked at can be read")
    heads = ["image", *(f"epoch {n + 1}, view {v}" for n in _EPOCHS for v in "12")]
    draw_rows(output, [(pair.name, [pair.image, *pair.views]) for pair in pairs], heads)
    log.info("views of %d px by data.views %s: %s", data.view_side, data.views, output)
    return {"views": str(output), "images": len(pairs), "image_size": data.view_side}
