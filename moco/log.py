"""The lines that a command says: they go to standard error, through Python's logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

log = logging.getLogger("moco")


class _StandardError(logging.StreamHandler[Any]):
    """Handler that writes to what `sys.stderr` is now: a notebook changes it from cell to cell."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
        # A bar that is shown is taken away for the line, and shown again below it.
        with bars.external_write_mode(self.stream) if bars else contextlib.nullcontext():
            super().emit(record)


def have_standard_error() -> None:
    """Open a standard error that takes all and keeps nothing where there is none, as with 2>&-.

    The next file that is opened would stand in its place, and get what others write there.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, it stays open


def is_terminal() -> bool:
    """Tell whether standard error is a terminal; what a program puts in its place may not say."""
    return getattr(sys.stderr, "isatty", lambda: False)()


def log_to_stderr() -> None:
    """Send our own lines to standard error, on rank 0 alone those that are no warnings.

    A caller who has handlers of its own gets the lines there.
    """
    have_standard_error()
    if not log.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    """Show a bar on a terminal, elsewhere a line every 20 seconds, on rank 0's standard error."""
    from tqdm import tqdm

    quiet = os.environ.get("RANK", "0") != "0"
    if is_terminal():
        return tqdm(items, label, total, disable=quiet)
    times = {"delay": 20, "mininterval": 20, "maxinterval": 20}
    return tqdm(items, label, total, leave=False, disable=quiet, ascii=True, **times)


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return the start of an error's text on one line, or its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def columns() -> int:
    """Return the width of the terminal that standard error is, or 0 where it is none."""
    if not is_terminal():
        return 0
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: it knows no width
    return 80


def fitted(text: str) -> str:
    """Break lines at words to the width of the terminal; elsewhere they stay as they are."""
    if not (width := columns()):
        return text
    break_at_words = textwrap.TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(break_at_words.fill(line) for line in text.split("\n"))
