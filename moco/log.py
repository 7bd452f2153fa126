"""The lines that a command says: they go to standard error, through Python's logging."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger("moco")


class _StandardError(logging.StreamHandler[Any]):
    """Handler that writes to what `sys.stderr` is now: a notebook changes it from cell to cell."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Send our own lines to standard error, once, unless the caller has handlers of its own."""
    if not log.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
