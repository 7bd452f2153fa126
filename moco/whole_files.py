"""Whole files: what is written is whole at its place or not there, whenever the power fails.

Single files of runs and commands go through here. Exports of several files, shards and the cache
move their own, since they check them first or share them. This room needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from moco.config import RunError, UserError

# Of a disk that is full, over quota or broken; a library may raise an OSError without a number.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None)


@contextlib.contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Give a temporary name beside `path`, which becomes `path` once its file lies on the disk.

    Args:
        mode: Its permissions; None: the usual ones.

    Raises:
        OSError: It cannot be written; then nothing is left of it, and a file before it stays.
    """
    temporary = path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")  # a long name has no room
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if mode is not None:
            with contextlib.suppress(OSError):  # some file systems have none
                temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Do as `whole_file` for what a command writes: errors are those of `explained`.

    A link is followed, and a file that was there keeps its permissions.

    Raises:
        UserError: As `explained`; also where a device or a pipe would become a file.
    """
    with explained(path):
        place = Path(os.path.realpath(path))
        is_there = place.exists()
        if is_there and not place.is_file():
            raise UserError(f"{path} is no regular file: choose another place")
        mode = stat.S_IMODE(place.stat().st_mode) if is_there else None
        with whole_file(place, mode) as temporary:
            yield temporary


def is_of_the_disk(error: OSError) -> bool:
    """Tell whether a disk is full or broken, which is no fault of the user's."""
    return error.errno in _DISK


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written.

    Raises:
        RunError: The disk is full or broken, which is no fault of the user's.
        UserError: The place takes no file.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:100]
        text = f"{path} cannot be written: {reason}"
        if is_of_the_disk(error):
            raise RunError(f"{text}; make room, and give the command again", local=True) from None
        raise UserError(f"{text}: choose another place") from None
