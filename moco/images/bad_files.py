"""Bad files: which images of a set cannot be read, counted over all ranks, and named.

Of resident sets this is known before training, and `without_bad` leaves them out. Of streamed sets
`BadFiles` collects what the workers meet.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from moco import distributed
from moco.config import UserError
from moco.images.formats import one_line, shown
from moco.images.sources import ImageSource

log = logging.getLogger("moco")
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
        source: The images.
        most: Share of them that may be bad.
        report_path: File with path, tab, reason per line; None for the log alone.
        remedy: What to do about them.
    """

    def __init__(
        self,
        source: ImageSource,
        most: float,
        report_path: str | None,
        remedy: str = "mend or remove them",
    ) -> None:
        self.source, self.most, self.report_path, self.remedy = source, most, report_path, remedy
        self.found: dict[int, str] = {}
        self._told: set[int] = set()

    def note(self, bad: list[tuple[int, str]], agreed: bool = False) -> None:
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
        new = [index for index in self.found if index not in self._told]
        if not new:
            return
        self._told.update(new)
        if distributed.rank() == 0:
            self._write(new)
        first, reason = shown(self.source.paths[new[0]]), self.found[new[0]]
        share = len(self.found) / len(self.source)
        count = f"{len(self.found)} of {len(self.source)} images of {self.source.name}"
        if share > self.most or share == 1:
            listed = f" (all are listed in {shown(self.report_path)})" if self.report_path else ""
            raise UserError(
                f"{count} ({100 * share:.3g} %) cannot be read, first {first}: {reason}{listed}: "
                f"{self.remedy}, or raise data.max_bad_fraction (now {self.most:g})"
            )
        if distributed.rank() == 0:
            log.warning("%s cannot be read: %s is left out: %s", count, first, reason)

    def _write(self, new: list[int]) -> None:
        if self.report_path is None:
            return
        lines = [f"{one_line(self.source.paths[i])}\t{self.found[i]}\n" for i in new]
        try:
            os.makedirs(os.path.dirname(self.report_path) or ".", exist_ok=True)
            with open(self.report_path, "a+", **_TEXT) as file:
                file.seek(0)
                before = set(file)  # of the same run, before it was resumed
                file.writelines(line for line in lines if line not in before)
        except OSError as error:
            log.warning("%s was not written: %s", self.report_path, error.strerror)
