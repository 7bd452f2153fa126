"""Tables of labels (`data.labels`): a path, a label and perhaps a split in each row.

A label is a class's name; names that differ only in their Unicode form are one.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moco.config import UserError
from moco.images.dicom import split_frame
from moco.images.formats import shown
from moco.images.labels import HELD_OUT, TRAIN, one_form, spelt

log = logging.getLogger("moco")
_PATHS = ("path", "file", "filename", "file_name", "image", "image_path", "image_id", "id", "name")
_LABELS = ("label", "class", "class_name", "target", "category", "breed", "species", "diagnosis")
_SPLITS = ("split", "subset", "partition", "set")
_WORDS = (*TRAIN, *HELD_OUT)


@dataclass
class Table:
    """A table of labels.

    Attributes:
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

    def split(self, path: str) -> str:
        """Return the split of an image; empty where it is trained on."""
        return self.splits.get(self.name(path) or "", "")

    def held_out(self, paths: Sequence[str]) -> str:
        """Return which split is held out, as of folders: of those that have images and labels, or
        else images, the first; empty where none has.

        The test images of many sets have no labels, and those of `val` beside them do.
        """
        has_labels: dict[str, bool] = {}
        for name in map(self.name, paths):
            if name in self.splits:
                word = self.splits[name]
                has_labels[word] = has_labels.get(word, False) or self.rows[name] is not None
        found = [word for word in HELD_OUT if word in has_labels]
        return next((word for word in found if has_labels[word]), found[0] if found else "")

    def name(self, path: str) -> str | None:
        """Return what the table calls an image: its path or the longest end of it, or its file's
        name without an ending; None if it does not name it. Frames have the name of their file."""
        whole = spelt(split_frame(path)[0].replace(os.sep, "/"))
        starts = (0, *(place + 1 for place, sign in enumerate(whole) if sign == "/"))
        ends = (whole[start:] for start in starts)
        stem = os.path.splitext(os.path.basename(whole))[0]
        return next((word for word in (*ends, stem) if word in self.rows), None)

    def labels(self, paths: Sequence[str], others: Sequence[str] = ()) -> list[str | None]:
        """Return the label of each image; None where the table has none for it.

        Args:
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
        wanted = self.held_out(paths) if held_out else ""
        if held_out and not wanted:
            return []
        return [path for path in paths if self.split(path) == wanted]

    def say_unused(self, paths: Sequence[str], folder: str = "") -> None:
        """Tell of images of a split that is neither trained on nor held out.

        Args:
            paths: Of the train split.
            folder: The directory that is held out, where it is another one than theirs.
        """
        held_out = "" if folder else self.held_out(paths)
        words = Counter(word for path in paths if (word := self.split(path)) and word != held_out)
        if words:
            unused = ", ".join(f"{count} images of {word}" for word, count in words.items())
            remedy = ": to hold these out, let data.root be their folder" if folder else ""
            log.info("data.labels %r: held out is %s; not used: %s%s", self.path,
                     shown(folder) or held_out, unused, remedy)  # fmt: skip

    def say(self, paths: Sequence[str], labels: Sequence[str | None]) -> None:
        """Tell how many images have a label, and of which column.

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
        if self.remark:
            log.info("warning: %s: %s", where, self.remark)
        if self.several:
            log.info(
                "warning: %s gives %d images several labels, first %s: the last one counts",
                where, len(self.several), shown(self.several[0]),
            )  # fmt: skip


def read_table(path: str, may_split: bool = True) -> Table:
    """Read `data.labels`: a path and a label in each row, and perhaps a split.

    Args:
        may_split: Whether a column of splits counts.

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
    thirds = {"".join(row[2:3]).lower() for row in rows}
    if not is_headed and {""} < thirds | {""} <= {*_WORDS, ""}:
        split = 2
    split = split if may_split else -1
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
        own, name = one_form(row[label]) or None, row[image].replace("\\", "/").removeprefix("./")
        if not name or not (own or word):
            continue  # the row says nothing
        name = spelt(name)
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
                "holds each image's label `label` (several of an image: docs/features.md)"
            )
        label = left[0]
    return (image, label, split), True
