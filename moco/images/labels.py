"""Labels of files: by the folder that they lie in, or by a table of paths and labels.

A label is a class's name here; names that differ only in their Unicode form are one.
"""

from __future__ import annotations

import csv
import filecmp
import functools
import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from moco.config import UserError
from moco.images.dicom import split_frame, with_frames
from moco.images.formats import shown

log = logging.getLogger("moco")
TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first one there is taken
_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "image_id", "id", "name")
_LABELS = ("label", "class", "class_name", "target", "category", "breed", "species", "diagnosis")
_SPLITS = ("split", "subset", "partition", "set")
_WORDS = (*TRAIN, *HELD_OUT)
_FORMS = ("NFC", "NFD")  # of Unicode
_PAIRS = 256  # of files with one name that are compared


def by_folder(paths: Sequence[str], top: str) -> list[str | None]:
    """Return each image's folder directly below `top`; None for images that lie beside them."""
    start = os.path.join(top, "")
    names: list[str | None] = []
    for path in paths:
        folder, inside, _ = path.removeprefix(start).partition(os.sep)
        names.append(_one_form(folder) if inside and path.startswith(start) else None)
    return names


def _spelt(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


_one_form = functools.cache(_spelt)  # of classes, which are few


@dataclass
class Table:
    """A table of labels.

    Attributes:
        path: Of its file.
        rows: An image as the table names it to its label, or to None.
        splits: An image so named to its split, where the table says that it is not trained on.
        column: What the column of labels is called; empty without a header.
        several: Images to which several rows give different labels, of which the last one counts.
        remark: What is odd about its column of splits, or nothing.
    """

    path: str
    rows: dict[str, str | None]
    splits: dict[str, str]
    column: str
    several: list[str]
    remark: str

    @property
    def has_splits(self) -> bool:
        """Tell whether the table holds images out."""
        return bool(self.splits)

    @property
    def held_out(self) -> str:
        """Return the split that is held out: as of folders the first one there is."""
        found = {*self.splits.values()}
        return next((word for word in HELD_OUT if word in found), "")

    def name(self, path: str) -> str | None:
        """Return what the table calls an image: its path or the longest end of it, or its file's
        name without an ending; None if it does not name it. Frames have the name of their file."""
        whole = _spelt(split_frame(path)[0].replace(os.sep, "/"))
        starts = (0, *(place + 1 for place, sign in enumerate(whole) if sign == "/"))
        ends = (whole[start:] for start in starts)
        stem = os.path.splitext(os.path.basename(whole))[0]
        return next((word for word in (*ends, stem) if word in self.rows), None)

    def labels(self, paths: Sequence[str], others: Sequence[str] = ()) -> list[str | None]:
        """Return the label of each image; None where the table has none for it.

        Args:
            paths: The images.
            others: Further images, such as those that are trained on.

        Raises:
            UserError: One row names two files.
        """
        named: dict[str, str] = {}
        found = []
        for path in (*others, *paths):
            name, file = self.name(path), split_frame(path)[0]
            other = file if name is None else named.setdefault(name, file)
            if os.path.splitext(other)[0] != os.path.splitext(file)[0]:
                raise UserError(
                    f"data.labels {self.path!r}: {shown(name)} may be {shown(other)} or "
                    f"{shown(file)}: write paths below data.root"
                )
            found.append(None if name is None else self.rows[name])
        return found[len(others) :]

    def part(self, paths: Sequence[str], held_out: bool) -> list[str]:
        """Return the images of one split; what the table does not name is trained on."""
        if not self.has_splits:
            return list(paths)
        wanted = self.held_out if held_out else ""
        return [path for path in paths if self.splits.get(self.name(path) or "", "") == wanted]

    def say(self, paths: Sequence[str], labels: Sequence[str | None]) -> None:
        """Tell how many images have a label, and of which column; and what no split takes.

        Raises:
            UserError: None has.
        """
        known = [label for label in labels if label is not None]
        where = f"data.labels {self.path!r}"
        if not known:
            raise UserError(
                f"{where} names none of the {len(labels)} images: its first row names "
                f"{shown(next(iter(self.rows)))}, and the first image is {shown(paths[0])}"
            )
        column = f", by its column {shown(self.column)!r}" if self.column else ""
        log.info("%s: %d of %d images have a label, of %d classes%s", where, len(known),
                 len(labels), len(set(known)), column)  # fmt: skip
        unused = [word for word in self.splits.values() if word != self.held_out]
        if self.remark:
            log.info("warning: %s: %s", where, self.remark)
        if unused:
            log.info("%s: held out is %s; not used: %d images of %s", where, self.held_out,
                     len(unused), ", ".join(sorted({*unused})))  # fmt: skip
        if self.several:
            log.info(
                "warning: %s gives %d images several labels, first %s: the last one counts",
                where, len(self.several), shown(self.several[0]),
            )  # fmt: skip


def read_table(path: str) -> Table:
    """Read `data.labels`: a path and a label in each row, and perhaps a split.

    The delimiter is the comma, semicolon, tab or bar that splits every row alike. A first row that
    names a column of paths or of labels is a header; without one these are the first two columns,
    and the third one is that of the splits if nothing else stands in it.

    Raises:
        UserError: It cannot be read, has one column or unknown splits, or labels no image.
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
    if not is_headed and all(row[2:3] and row[2].lower() in _WORDS for row in rows):
        split = 2
    width = max(image, label, split) + 1
    body = [row + [""] * (width - len(row)) for row in rows[is_headed:]]  # ends may be left out
    if not any(row[label] for row in body):
        raise UserError(f"{where} labels no image: write PATH,LABEL in each row")
    words = [row[split].lower() if split >= 0 else "" for row in body]
    words, remark = _splits(words, rows[0][split], where)
    labels: dict[str, str | None] = {}
    several: dict[str, None] = {}
    splits = {}
    for row, word in zip(body, words, strict=True):
        own, name = _one_form(row[label]) or None, row[image].replace("\\", "/").removeprefix("./")
        if not name or not (own or word):
            continue  # the row says nothing
        name = _spelt(name)
        if own and labels.get(name) not in (own, None):
            several[name] = None
        labels[name] = own or labels.get(name)
        if word in HELD_OUT:
            splits[name] = word
    column = rows[0][label] if is_headed else ""
    return Table(path, labels, splits, column, list(several), remark)


def _splits(words: list[str], column: str, where: str) -> tuple[list[str], str]:
    """Return the words of a column of splits; none, and a remark, where it holds something else.

    Raises:
        UserError: Some are names of splits, and others are not.
    """
    others = sorted({*words} - {*_WORDS, ""})
    if not others:
        return words, ""
    said = f"its column {shown(column)} has {', '.join(map(shown, others[:5]))}"
    known = ", ".join(("train", *HELD_OUT))
    if {*words} & {*_WORDS}:
        text = f"{where}: {said}, which is no split: write one of {known}, or rename the column"
        raise UserError(text)
    return [""] * len(words), f"{said}, none of {known}, so that no image is held out by it"


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
