"""Splits: which folders of a tree are trained on, and which are held out, by their names.

This room needs no torch.
"""

from __future__ import annotations

import logging
import os
import re
from itertools import islice

from moco.config import DataConfig, UserError
from moco.images.folders import check_root, is_dir, visible
from moco.images.formats import extension, looks_like_image, shown
from moco.images.labels import HELD_OUT, TRAIN
from moco.images.tables import read_table

log = logging.getLogger("moco")
_WORD = re.compile("[a-z]+")


def split_folders(data: DataConfig, say: bool = False) -> tuple[str, str | None]:
    """Return the directories of the train and the held-out split, by their names in any case.

    They are looked for below the root, and deeper where a folder holds one folder and no image. A
    table of labels may hold images out that lie in the same directory.

    Args:
        say: Whether to log which directory was taken for which split.

    Raises:
        UserError: The root cannot be listed, or is not laid out as `imagenet` is.
    """
    top, names, train, test = _find_splits(check_root(data.root))
    by_name = {name.lower(): os.path.join(top, name) for name in names}
    if data.dataset == "imagenet":
        if not train or "val" not in by_name:
            raise UserError(
                f"data.root {data.root!r} lacks train/ or val/: lay imagenet out as "
                "train/CLASS/*.JPEG and val/CLASS/*.JPEG; for another tree set data.dataset folder"
            )
        test = by_name["val"]
    in_table = bool(data.labels) and read_table(data.labels).has_splits
    if not train:
        return top, top if in_table else None
    if say:
        rest = [name for name in names if os.path.join(top, name) not in (train, test)]
        count = _inside(top)[1]
        rest += [f"{count} picture{'s'[: count != 1]}"][:count]
        unused = f"; not used: {', '.join(map(shown, rest[:5]))}" if rest else ""
        base, held_out = (shown(os.path.basename(path or "none")) for path in (train, test))
        log.info("%s: trained on is %s, held out is %s%s", shown(top), base, held_out, unused)
    if data.dataset == "imagenet":
        return train, test
    test = test or (train if in_table else None)
    below = _sole_inside(train)
    deeper = below[len(train) :].count(os.sep)  # what is held out may be of one class
    return below, test and _sole_inside(test, deeper)


def _inside(folder: str) -> tuple[list[str], int]:
    """Return the names of the folders that lie in a folder itself, and the number of pictures.

    Raises:
        OSError: It cannot be listed.
    """
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if visible(entry.name)]
    names = sorted(entry.name for entry in found if is_dir(entry))
    return names, sum(looks_like_image(extension(e.name)) and not is_dir(e) for e in found)


def _find_splits(top: str) -> tuple[str, list[str], str | None, str | None]:
    """Return where splits are, the folders there, and those of train and of what is held out.

    Without splits that is the first directory that holds more than a single folder.
    """
    seen = set()
    while True:
        seen.add(os.path.realpath(top))
        try:
            names, pictures = _inside(top)
        except OSError:  # a folder below the root, which `walk` names
            return os.path.dirname(top), [], None, None
        train, held_out = _named_splits(names)
        holding = names if len(names) == 1 or pictures or held_out else _holding(top, names)
        # Among other folders `train` may be a class of images, unless one is a held-out split.
        if train and (held_out or holding == [train]):
            test = _labelled_first(top, train, held_out)
            return top, names, os.path.join(top, train), test
        deeper = os.path.join(top, holding[0]) if len(holding) == 1 else top
        if pictures or os.path.realpath(deeper) in seen:
            return top, names, None, None
        top = deeper


def _named_splits(names: list[str]) -> tuple[str | None, list[str]]:
    """Return the names of the train split and of what may be held out, best first.

    Where there are none of these by themselves, they may be words of names that are otherwise
    alike, such as train2017 beside val2017, and seg_train beside seg_test.
    """
    exact = {name.lower(): name for name in names}
    train = next((exact[word] for word in TRAIN if word in exact), None)
    held_out = [exact[word] for word in HELD_OUT if word in exact]
    if train and held_out:
        return train, held_out
    within: dict[str, dict[str, list[str]]] = {}  # the rest of a name, and its word
    for name in names:
        words = _WORD.findall(name.lower())
        own = [word for word in words if word in (*TRAIN, *HELD_OUT)]
        if len(own) == 1:
            words.remove(own[0])
            within.setdefault("".join(words), {}).setdefault(own[0], []).append(name)
    for found in within.values():
        trains = [name for word in TRAIN for name in found.get(word, ())]
        others = [name for word in HELD_OUT for name in found.get(word, ())]
        if len(within) == len(trains) == 1 and others:
            return trains[0], others
    return train, []


def _sole_inside(folder: str, most: int | None = None) -> str:
    """Go down into a folder, so often at most, while it holds one folder of images and no image."""
    seen: set[str] = set()
    while (real := os.path.realpath(folder)) not in seen and len(seen) != most:
        seen.add(real)
        try:
            names, pictures = _inside(folder)
        except OSError:  # which `walk` names
            return folder
        if pictures:
            return folder
        names = _holding(folder, names)
        folder = os.path.join(folder, names[0]) if len(names) == 1 else folder
    return folder


def _labelled_first(top: str, train: str, names: list[str]) -> str | None:
    """Choose what is held out: the first that holds images, in folders where the train split does.

    The test images of many sets have no labels, and those of `val` beside them do. Without any
    image there is none.
    """
    folders = [os.path.join(top, name) for name in names]
    folders = [folder for folder in folders if _may_hold(folder)]
    if _has_classes(os.path.join(top, train)):
        folders = [folder for folder in folders if _has_classes(folder)] or folders
    return folders[0] if folders else None


def _has_classes(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(visible(e.name) and is_dir(e) and _may_hold(e.path) for e in entries)
    except OSError:  # which `walk` names
        return False


def _holding(top: str, names: list[str]) -> list[str]:
    """Return those folders, two at most, that may hold images: lists and boxes lie beside them."""
    return list(islice((n for n in names if _may_hold(os.path.join(top, n))), 2))


def _may_hold(top: str) -> bool:
    """Tell whether an image is seen below a folder, or a link or closed folder may lead to one."""
    closed: list[OSError] = []
    for folder, inside, names in os.walk(top, onerror=closed.append):
        inside[:] = filter(visible, inside)
        if any(looks_like_image(extension(name)) for name in names):
            return True
        if any(os.path.islink(os.path.join(folder, name)) for name in inside):
            return True
    return bool(closed)
