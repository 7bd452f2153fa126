"""Write the model card of a timm directory, as the Hub shows it: recipe, data, scores, licence.

It says only what the checkpoint holds and what the JSON files beside it report. It names no path
of the machine that trained the network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from moco.checkpoints.describe import loading_line
from moco.checkpoints.load import Loaded
from moco.checkpoints.matching import checksum


def model_card(loaded: Loaded, checkpoint: Path, licence: str) -> str:
    """Write the card in Markdown, with the front matter that the Hub reads.

    Args:
        loaded: The encoder that is exported.
        checkpoint: Its file; scores are looked for beside it.
        licence: Identifier; empty if unknown.
    """
    model, config = loaded.model, loaded.config
    is_moco = loaded.layout in _OF_MOCO
    names = ("image-feature-extraction", "timm", *(["moco"] if is_moco else []))
    tags = "".join(f"- {tag}\n" for tag in names)
    how = (
        "Self-supervised (MoCo, arXiv:1911.05722, 2003.04297 and, without a queue, 2104.02057)"
        if is_moco
        else "The checkpoint does not say how it was trained"
    )
    scores = _scores(loaded, checkpoint)
    recipe = {name: config[name] for name in ("model", "optim", "trainer") if name in config}
    settings = {f"{g}.{n}": v for g, group in recipe.items() for n, v in group.items()}
    settings |= {n: v for n, v in config.get("data", {}).items() if n in _DATA_ON_CARD}
    rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
    lines = [
        f"---\ntags:\n{tags}library_name: timm\npipeline_tag: image-feature-extraction\n"
        f"license: {licence or 'unknown'}\n---",
        f"# {model.backbone}{', pretrained by Momentum Contrast' if is_moco else ''}",
        f"{how}: the {loaded.encoder}"
        f"{'' if loaded.encoder == 'backbone' else ' encoder'} without its projection head, "
        f"{loaded.feature_dim} features, from a checkpoint of {loaded.layout} layout"
        f"{'' if loaded.epoch is None else f' and epoch {loaded.epoch}'}.",
        *([_BEGUN] if loaded.is_begun else []),
        f"What was read: {loaded.report}.",
        "## Use",
        f"```python\n{loading_line(loaded, 'timm', 'PATH').replace('; ', chr(10))}\n```",
        "`pretrained=True` is needed: without it timm leaves the weights random.",
        f"Input: {loaded.preparation.in_words()}. In `config.json` the same as `moco.preparation`.",
        "## Recipe and data",
        f"| setting | value |\n|---|---|\n{rows}" if rows else "Not recorded in the checkpoint.",
        "## Scores",
        "".join(f"- {name}: {value}\n" for name, value in scores.items()) or "None recorded.",
    ]
    return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"


_BEGUN = (
    "The run began from weights that were there before (`init_from`, or those of a module of its "
    "author's): their training, their images and their licence count too, and the checkpoint does "
    "not tell them."
)
# Layouts whose code trains by MoCo alone; that of the others has further methods, or none.
_OF_MOCO = ("moco", "official", "official-v3", "openselfsup", "mmpretrain")
_DATA_ON_CARD = (
    *("dataset", "channels", "image_size", "image_size_start", "image_size_end", "batch_size"),
    *("views", "mean", "std"),
)
_SCORE = re.compile(r"top1|top5|accuracy|knn|linear|shot|loss", re.IGNORECASE)


def _scores(loaded: Loaded, checkpoint: Path) -> dict[str, float]:
    """Collect this encoder's scores in JSON files beside a checkpoint or in its run directory.

    Scores of other weights lie in the same folders; the checksum in each file tells them apart.
    """
    judged = {"backbone": loaded.backbone}  # as evaluation names what it judges
    parts = [judged, judged | {"head": loaded.head}] if loaded.head else [judged]
    own = {checksum(nn.ModuleDict(part)) for part in parts}
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
    scores: dict[str, float] = {}
    for path in sorted(p for place in places for p in place.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # somebody else's file
        if not isinstance(content, dict) or content.get("backbone_sha256") not in own:
            continue
        scores |= {
            f"{path.stem}: {name}": value
            for name, value in content.items()
            if type(value) in (int, float) and _SCORE.search(name)
        }
    return scores
