"""Where our own lines go."""

import io
import logging
import sys

from moco.log import log_to_stderr


def test_our_own_lines_go_to_what_is_standard_error_now(monkeypatch):
    """A notebook changes `sys.stderr` from cell to cell, and each run speaks in its own cell."""
    log = logging.getLogger("moco")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    for cell in (io.StringIO(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", cell)
        log_to_stderr()
        log.error("a line")
        assert cell.getvalue() == "a line\n"
