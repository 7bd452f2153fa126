"""Bad files: which images of a set cannot be read, counted over all ranks, and named.

Of resident sets this is known before training, and `without_bad` leaves them out. Of streamed sets
`BadFiles` looks at the headers before the first step, and collects what the workers meet.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from moco import distributed
from moco.config import UserError
from moco.images.decode import BadImage
from moco.images.formats import escaped, shown
from moco.images.image_source import ImageSource

log = logging.getLogger("moco")
HEADERS_S, FILES_S = 3.0, 10.0  # seconds to look at headers, and for further files to name
SHOWN, _ENOUGH = 10, 1000  # bad files in one line, and those after which no more are looked for
_THREADS = 16  # more than cores, since a file of another machine is waited for
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of any bytes come back as such


def without_bad(
    source: ImageSource, bad: list[tuple[int, str]], most: float, report_path: str | None
) -> ImageSource:
    """Return the files without the bad ones, (index, reason) each, which are named.

    Raises:
        UserError: More than the share `most` are bad, or no image is left.
    """
    if not bad:
        return source
    BadFiles(source, most, report_path).note(bad, agreed=True)
    dropped = torch.tensor([index for index, _ in bad])
    kept = torch.ones(len(source), dtype=torch.bool).index_fill_(0, dropped, False)
    return source.rows(kept.nonzero()[:, 0])


class BadFiles:
    """Files that could not be read: counted, named once, and an error above a share.

    Args:
        most: Share of them that may be bad.
        report_path: File with path, tab, reason per line; None for the log alone.
    """

    def __init__(
        self,
        source: ImageSource,
        most: float,
        report_path: str | None,
        remedy: str = "mend them or leave them out",
    ) -> None:
        self.source, self.most, self.report_path, self.remedy = source, most, report_path, remedy
        self.found: dict[int, str] = {}
        self._told: set[int] = set()

    def look_ahead(self) -> None:
        """Read headers of streamed files for a few seconds, and tell which are bad.

        Every rank reads a share of them, and all call this at the same time.
        """
        if self._are_all_met:
            return
        rank, world, source = distributed.rank(), distributed.world_size(), self.source
        rows = _spread(len(source))[rank::world]
        bad, seen = unreadable(source, rows, ImageSource.header, HEADERS_S)
        if seen < len(rows) and rank == 0:
            log.info("%s: the headers of %d of %d images were looked at, in %g s: the others are "
                     "met while they are streamed", source.name, seen * world, len(source),
                     HEADERS_S)  # fmt: skip
        self.note(bad.items())
        self.agree()

    def note(self, bad: Iterable[tuple[int, str]], agreed: bool = False) -> None:
        """Remember bad files, (index, reason) each; tell them if all ranks know the same ones."""
        self.found.update(bad)
        if agreed or distributed.world_size() == 1:
            self._tell()

    def agree(self) -> None:
        """Tell what any rank has met; every rank calls this at the same step."""
        if distributed.world_size() == 1 or self.source.images is not None:
            return
        new = {index: why for index, why in self.found.items() if index not in self._told}
        met: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(met, new)
        for part in met:
            self.found |= part
        self._tell()

    def _tell(self) -> None:
        """Name the new ones; raise UserError when there are too many."""
        if not self._new():
            return
        total = len(self.source)
        are_many = len(self.found) > self.most * total or len(self.found) == total
        if are_many and distributed.rank() == 0 and not self._are_all_met:
            left = [row for row in _spread(total) if row not in self.found]
            self.found |= unreadable(self.source, left, ImageSource.read, FILES_S)[0]
        new = self._new()
        self._told.update(new)
        if distributed.rank() == 0:
            self._write(new)
        count = f"{len(self.found)} of {total} images of {self.source.name}"
        names = "; ".join(f"{shown(self.source.called(i))}: {self.found[i]}" for i in new[:SHOWN])
        names += f"; and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
        if are_many:
            listed = f" (all are listed in {shown(self.report_path)})" if self.report_path else ""
            raise UserError(
                f"{count} ({100 * len(self.found) / total:.3g} %) cannot be read: {names}{listed}: "
                f"{self.remedy}, or raise data.max_bad_fraction (now {self.most:g})"
            )
        if distributed.rank() == 0:
            log.warning("%s cannot be read and are left out: %s", count, names)

    @property
    def _are_all_met(self) -> bool:
        """Tell whether files are not looked at ahead: all are read, or lie in shards."""
        return self.source.images is not None or self.source.is_sharded

    def _new(self) -> list[int]:
        """Return those that have not been told, in the order of the set."""
        return sorted(index for index in self.found if index not in self._told)

    def _write(self, new: list[int]) -> None:
        if self.report_path is None:
            return
        lines = [f"{escaped(self.source.called(i))}\t{self.found[i]}\n" for i in new]
        try:
            os.makedirs(os.path.dirname(self.report_path) or ".", exist_ok=True)
            with open(self.report_path, "a+", **_TEXT) as file:
                file.seek(0)
                before = set(file)  # of the same run, before it was resumed
                file.writelines(line for line in lines if line not in before)
        except OSError as error:
            log.warning("%s was not written: %s", self.report_path, error.strerror)


def unreadable(
    source: ImageSource, rows: list[int], read: Callable[[ImageSource, int], Any], seconds: float
) -> tuple[dict[int, str], int]:
    """Read files for some seconds at most, several at a time.

    Args:
        rows: Which of them, in the order in which they are to be read.
        seconds: After these no further file is read, nor after a thousand bad ones.

    Returns:
        Index to reason of the bad ones, and how many were looked at.
    """
    end, bad = time.monotonic() + seconds, {}

    def look(part: list[int]) -> int:
        for count, index in enumerate(part):
            if time.monotonic() > end or len(bad) >= _ENOUGH:
                return count
            try:
                read(source, index)
            except BadImage as error:
                bad[index] = error.reason
        return len(part)

    threads = min(_THREADS, source.readers)
    with ThreadPoolExecutor(threads) as pool:
        seen = sum(pool.map(look, [rows[start::threads] for start in range(threads)]))
    return bad, seen


def _spread(count: int) -> list[int]:
    """Order the images so that the first ones, however few, come from all parts of the set."""
    step = -(-count // 64)
    return [row for start in range(step) for row in range(start, count, step)]
