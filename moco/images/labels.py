"""Labels of files by the folder that they lie in, and lists of files.

A label is a class's name here; names that differ only in their Unicode form are one.
"""

from __future__ import annotations

import filecmp
import functools
import os
import unicodedata
from collections.abc import Sequence

from moco.config import UserError
from moco.images.dicom import split_frame, with_frames
from moco.images.formats import shown

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first one there is taken
_FORMS = ("NFC", "NFD")  # of Unicode
_PAIRS = 256  # of files with one name that are compared


def by_folder(paths: Sequence[str], top: str) -> list[str | None]:
    """Return each image's folder directly below `top`; None for images that lie beside them."""
    start = os.path.join(top, "")
    names: list[str | None] = []
    for path in paths:
        folder, inside, _ = path.removeprefix(start).partition(os.sep)
        names.append(one_form(folder) if inside and path.startswith(start) else None)
    return names


def spelt(name: str) -> str:
    """Return a name in one of the forms that Unicode has for it."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


one_form = functools.cache(spelt)  # of classes, which are few


def read_list(path: str, root: str) -> list[str]:
    """Read `data.files`: one path a line, absolute or below the root, each image once, in order.

    Raises:
        UserError: It cannot be read, or none of its files is there.
    """
    try:
        name, how = os.path.expanduser(path), {"errors": "surrogateescape", "newline": "\n"}
        with open(name, encoding="utf-8-sig", **how) as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"data.files {path!r} cannot be read ({reason}): give one path a line"
        raise UserError(text) from None
    paths = [_listed(line, root) for line in lines if line.strip()]
    if not any(os.path.lexists(split_frame(name)[0]) for name in paths):
        first = f", first {shown(paths[0])}" if paths else ""
        raise UserError(
            f"data.files {path!r}: none of its {len(paths)} files is there{first}: give paths "
            f"below data.root {root!r}, or whole ones"
        )
    return with_frames(list(dict.fromkeys(paths)))


def _listed(line: str, root: str) -> str:
    """Return the path that a line names: as it stands, or as others write the same name."""
    bare = line.strip()
    words = [bare, line, bare.strip("\"'"), bare.replace("\\", "/")]
    words += [] if bare.isascii() else [unicodedata.normalize(form, bare) for form in _FORMS]
    paths = [os.path.join(root, os.path.normpath(word)) for word in dict.fromkeys(words)]
    if len(paths) == 1:  # as almost always, so that not every file is asked for
        return paths[0]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def twins(paths: Sequence[str], labels: Sequence[str | None]) -> list[tuple[str, str]]:
    """Return some pairs of one file that lies in two classes, among files of the same name."""
    first: dict[str, int] = {}
    pairs = []
    for place, path in enumerate(paths):
        other = first.setdefault(path.rpartition(os.sep)[2], place)
        if labels[other] != labels[place]:
            pairs.append((paths[other], path))
    some = pairs[:: max(1, len(pairs) // _PAIRS)]
    return [pair for pair in some if _is_same(*pair)]


def _is_same(one: str, other: str) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)  # which compares sizes first
    except OSError:
        return False
