"""Labels of files: by the folder that they lie in, or by a table of paths and labels.

A label is a class's name here; names that differ only in their Unicode form are one.
"""

from __future__ import annotations

import csv
import filecmp
import functools
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from moco.config import UserError
from moco.images.dicom import split_frame, with_frames
from moco.images.formats import shown

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first one there is taken
_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "image_id", "id", "name")
_LABELS = ("label", "class", "class_name", "target", "category", "breed", "species", "diagnosis")
_SPLITS = ("split", "subset", "partition", "set")
_PAIRS = 256  # of files with one name that are compared


def by_folder(paths: Sequence[str], top: str) -> list[str | None]:
    """Return each image's folder directly below `top`; None for images that lie beside them."""
    start = os.path.join(top, "")
    names: list[str | None] = []
    for path in paths:
        folder, inside, _ = path.removeprefix(start).partition(os.sep)
        names.append(_one_form(folder) if inside and path.startswith(start) else None)
    return names


@functools.cache
def _one_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


@dataclass
class Table:
    """A table of labels.

    Attributes:
        rows: An image as the table names it to its label.
        held_out: What the table names as held out, where it has a column of splits.
        has_splits: Whether it has.
    """

    rows: dict[str, str]
    held_out: set[str]
    has_splits: bool

    def name(self, path: str, root: str) -> str | None:
        """Return what the table calls an image: its path below the root, its file name, or that
        without an ending; None if it does not name it."""
        file, root = (unicodedata.normalize("NFC", each) for each in (split_frame(path)[0], root))
        base = os.path.basename(file)
        words = (os.path.relpath(file, root).replace(os.sep, "/"), file, base)
        return next((w for w in (*words, os.path.splitext(base)[0]) if w in self.rows), None)

    def check_names(self, where: str, paths: Sequence[str], root: str) -> None:
        """Raise UserError where the table names none of the images; `where` names the table."""
        if paths and not any(self.name(path, root) for path in paths):
            first = next(iter(self.rows))
            raise UserError(
                f"{where}: none of its {len(self.rows)} rows names one of the {len(paths)} images, "
                f"first {shown(first)}, where the first image is {shown(paths[0])}: give paths "
                "below data.root, or the files' names"
            )

    def labels(self, paths: Sequence[str], root: str) -> list[str | None]:
        """Return the label of each image; None where the table does not name it."""
        found = [self.name(path, root) for path in paths]
        return [None if name is None else self.rows[name] for name in found]

    def part(self, paths: Sequence[str], root: str, held_out: bool) -> list[str]:
        """Return the images of one split; what the table does not name is trained on."""
        if not self.has_splits:
            return list(paths)
        return [p for p in paths if (self.name(p, root) in self.held_out) == held_out]


def read_table(path: str) -> Table:
    """Read `data.labels`: a path and a label in each row, and perhaps a split.

    The delimiter is the comma, semicolon, tab or bar that splits every row alike. A first row that
    names a column of paths or of labels is a header; without one these are the first two columns.

    Raises:
        UserError: It cannot be read, has one column, or labels no image.
    """
    where = f"data.labels {path!r}"
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        text = f"{where} cannot be read ({reason}): give a table of paths and labels"
        raise UserError(text) from None
    lines = [line for line in text.splitlines() if line.strip()]
    counts = {mark: min((line.count(mark) for line in lines), default=0) for mark in ",;\t|"}
    delimiter = max(counts, key=lambda mark: counts[mark])
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    if not rows or min(map(len, rows)) < 2:
        raise UserError(f"{where} has rows of one column: write PATH,LABEL in each")
    (image, label, split), is_headed = _columns(rows[0], where)
    widest = max(image, label, split)
    body = [row for row in rows[is_headed:] if len(row) > widest and row[label]]
    if not body:
        raise UserError(f"{where} labels no image: write PATH,LABEL in each row")
    named = {_one_form(row[image].removeprefix("./").replace("\\", "/")): row for row in body}
    labels = {name: _one_form(row[label]) for name, row in named.items()}
    held_out = {n for n, row in named.items() if split >= 0 and row[split].lower() in HELD_OUT}
    return Table(labels, held_out, bool(held_out))


def _columns(first: list[str], where: str) -> tuple[tuple[int, int, int], bool]:
    """Return the columns of paths, labels and splits, -1 for none, and whether a row is a header.

    Where a header names only one of the first two, the other is the only column that is left, or
    for paths the first one.

    Raises:
        UserError: Several columns may be that of the labels.
    """
    words = [cell.lower() for cell in first]
    image, label, split = (
        next((words.index(name) for name in names if name in words), -1)
        for names in (_PATHS, _LABELS, _SPLITS)
    )
    if image < 0 and label < 0:
        return (0, 1, -1), False
    image = image if image >= 0 else next(n for n in range(len(words)) if n not in (label, split))
    if label < 0:
        left = [n for n in range(len(words)) if n not in (image, split)]
        if len(left) != 1:
            names = ", ".join(shown(first[n]) for n in left[:5]) or "no other"
            raise UserError(
                f"{where} has no column of a usual name for labels, but {names}: call the one that "
                "holds each image's label `label`"
            )
        label = left[0]
    return (image, label, split), True


def read_list(path: str, root: str) -> list[str]:
    """Read `data.files`: one path a line, absolute or below the root, each image once, in order.

    Raises:
        UserError: It cannot be read, or none of its files is there.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"data.files {path!r} cannot be read ({reason}): give one path a line"
        raise UserError(text) from None
    paths = [os.path.join(root, os.path.normpath(line)) for line in lines if line]
    if not any(os.path.lexists(split_frame(name)[0]) for name in paths):
        first = f", first {shown(paths[0])}" if paths else ""
        raise UserError(
            f"data.files {path!r}: none of its {len(paths)} files is there{first}: give paths "
            f"below data.root {root!r}, or whole ones"
        )
    return with_frames(list(dict.fromkeys(paths)))


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
