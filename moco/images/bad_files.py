"""Bad files: what of a streamed set could not be read, counted over all ranks, and named.

Resident sets are judged before training, by `moco.images.sources.check_files`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from moco import distributed
from moco.config import UserError
from moco.images.decode import one_line, shown
from moco.images.sources import ImageSource

log = logging.getLogger("moco")
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of any bytes come back as such


class BadFiles:
    """Streamed files that could not be read: counted, named once, and an error above a share.

    Args:
        source: The images.
        most: Share of them that may be bad.
        report_path: File with path, tab, reason per line; None for the log alone.
    """

    def __init__(self, source: ImageSource, most: float, report_path: str | None) -> None:
        self.source, self.most, self.report_path = source, most, report_path
        self.found: dict[int, str] = {}
        self._told: set[int] = set()

    def note(self, bad: list[tuple[int, str]]) -> None:
        """Remember what a batch met; without other ranks, tell it at once."""
        self.found.update(bad)
        if distributed.world_size() == 1:
            self.tell()

    def agree(self) -> None:
        """Tell what any rank has met; every rank calls this at the same step."""
        if distributed.world_size() == 1 or self.source.images is not None:
            return
        new = {index: why for index, why in self.found.items() if index not in self._told}
        met: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(met, new)
        for part in met:
            self.found |= part
        self.tell()

    def tell(self) -> None:
        """Name the new ones; raise UserError when there are too many."""
        new = [index for index in self.found if index not in self._told]
        if not new:
            return
        self._told.update(new)
        if distributed.rank() == 0:
            self._write(new)
        first = shown(self.source.paths[new[0]])
        share = len(self.found) / len(self.source)
        count = f"{len(self.found)} of {len(self.source)} images"
        what = f"{count} of {self.source.name} cannot be read"
        if share > self.most:
            listed = f" (all are listed in {self.report_path})" if self.report_path else ""
            raise UserError(
                f"{what}, {100 * share:.3g} %, first {first}: {self.found[new[0]]}{listed}: mend "
                f"them and go on with --resume, or raise data.max_bad_fraction (now {self.most:g})"
            )
        if distributed.rank() == 0:
            log.warning("%s: %s is left out: %s", what, first, self.found[new[0]])

    def _write(self, new: list[int]) -> None:
        if self.report_path is None:
            return
        lines = [f"{one_line(self.source.paths[i])}\t{self.found[i]}\n" for i in new]
        try:
            with open(self.report_path, "a+", **_TEXT) as file:
                file.seek(0)
                before = set(file)  # of the same run, before it was resumed
                file.writelines(line for line in lines if line not in before)
        except OSError as error:
            log.warning("%s was not written: %s", self.report_path, error.strerror)
