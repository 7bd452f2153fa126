"""Where our own lines go."""

import io
import logging
import sys

import pytest
from tqdm import tqdm

from moco.command import launch
from moco.log import columns, log_to_stderr


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


LINE = (
    "model.queue_size 1024 is long for 1257 images, since 35% of the queries would meet an older "
    "key of their own image as a negative: run directory runs/cifar10-20261126-030842-323631"
)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_lines_break_at_words_on_a_terminal(terminal, columns, monkeypatch):
    log = logging.getLogger("moco")
    monkeypatch.setattr(log, "handlers", [])
    screen = terminal(columns)
    log_to_stderr()
    log.error("%s", LINE)
    launch.say(f"error: {LINE}")
    lines = screen().splitlines()
    assert max(map(len, lines)) <= columns and len(lines) == {60: 8, 80: 6, 200: 2}[columns]
    assert " ".join(line.strip() for line in lines) == f"{LINE} error: {LINE}"


def test_a_width_that_is_unknown_is_that_of_a_usual_terminal(terminal):
    terminal(0)
    assert columns() == 80


def test_a_line_comes_above_the_bar(terminal, monkeypatch):
    log = logging.getLogger("moco")
    monkeypatch.setattr(log, "handlers", [])
    screen = terminal(60)
    log_to_stderr()
    with tqdm(total=10, file=sys.stderr, ncols=58) as bar:
        bar.update(1)
        log.error("a line")
    lines = [line.split("\r")[-1] for line in screen().split("\n")]
    assert lines[0] == "a line"
    assert lines[1].startswith(" 10%|")
