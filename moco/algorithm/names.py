"""Names of backbones, read from timm's source: to import it takes seconds. No torch is needed."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from moco.config import UserError

OWN = "own"  # begins the name of a module that Python gives, as own:MyNetwork
# Settings that shape networks of timm alone.
OF_KNOWN = ("stem", "width", "zero_init_residual", "patch_size", "depth", "num_heads", "positions")
OF_KNOWN += ("vit_init", "freeze_patch_embed")
_MODEL = re.compile(r"^@register_model\s+def (\w+)", re.MULTILINE)
_KEY = re.compile(r"""^\s+['"](\w+)['"]\s*:""", re.MULTILINE)


def check_backbone(name: str, setting: str) -> None:
    """Raise UserError for a name that occurs in timm's source neither as a model nor as a key."""
    if is_own(name):
        raise UserError(
            f"{setting} {name!r} stands for a module of your own: give it in Python, as in "
            "moco.pretrain(images, backbone=module), or take a timm name"
        )
    known = name.partition(".")[0]  # what follows names weights
    names = _registered()
    if "resnet50" in names and known not in names and known not in find_keys(read_source()):
        raise unknown_backbone(name, setting, names)


def is_own(name: str) -> bool:
    """Tell whether a name stands for a module of the user's own."""
    return name.partition(":")[0] == OWN


def read_source() -> list[str]:
    """Return the text of each file of timm's models; empty where these do not lie in files."""
    found = find_spec("timm")
    folder = Path(found.origin).parent / "models" if found and found.origin else Path()
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


@functools.cache
def _registered() -> list[str]:
    """Return the names of all models; once a process, since they stand in over a hundred files."""
    return find_names(read_source())


def find_names(texts: list[str]) -> list[str]:
    """Find the models that are registered in the source."""
    return [name for text in texts for name in _MODEL.findall(text)]


def find_keys(texts: list[str]) -> set[str]:
    """Find the keys of tables in the source; the former names of models are among them."""
    return {name for text in texts for name in _KEY.findall(text)}


def unknown_backbone(name: str, setting: str, names: Iterable[str]) -> UserError:
    """Say that no backbone has this name, and which one may be meant."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see timm.list_models() for the names"
    return UserError(f"{setting} {name!r} is not a torchvision ResNet or timm model: {hint}")
