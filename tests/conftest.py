"""Settings and fixtures of all tests: they run on one thread and without a network.

This file imports no torch, since the process that only hands out tests to others loads it too.
"""

import logging
import os
import shutil

# Torch and the hubs read these once, when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)

import argparse
import contextlib
import ctypes
import signal
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pictures import write_pictures
from processes import ROOT, end_group, start_command
from ranks import Ranks

# Under nohup it is ignored, and so would it be in all that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

HOLD = """
import os, signal
from pathlib import Path
from moco.run_directory import sole_run
with sole_run(Path("run"), is_new=False):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    signal.pause()
"""


@pytest.fixture
def real_images() -> Path:
    """Return the folder of real image archives that MOCO_TEST_IMAGES names, or skip."""
    path = os.environ.get("MOCO_TEST_IMAGES", "")
    if not path:
        pytest.skip("MOCO_TEST_IMAGES does not name a folder of real images")
    if not Path(path).is_dir():
        pytest.fail(f"MOCO_TEST_IMAGES is {path}, which is no folder")
    return Path(path)


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Give back what the tests of a file have built: one process runs through many files."""
    yield
    if networks := sys.modules.get("networks"):
        networks.forget()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make folders by name that the tests of a file share, and that go with its last one."""
    made = []

    def make(name):
        made.append(tmp_path_factory.mktemp(name))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def cache_of_shards(tmp_path_factory):
    """Keep the index and the cache of shards out of the user's folders, in all that is started."""
    os.environ["MOCO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def parsers():
    """Build the parser of a run's settings once in a process: that takes as long as parsing.

    Commands that judge change their parser's defaults, so each of these is built anew.
    """
    from moco.command import cli
    from moco.config import TrainConfig

    build, built = cli.build_parser, {}

    def once(description, config, extras):
        if config is not TrainConfig:
            return build(description, config, extras)
        key = (description, repr(extras), argparse.ArgumentParser().prog)  # it bears its name
        if key not in built:
            built[key] = build(description, config, extras)
        return built[key]

    cli.build_parser = once
    yield
    cli.build_parser = build


@pytest.fixture(scope="session")
def two_ranks():
    """Start two processes in one gloo group, once for all tests."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def own_log():
    """Undo what a command in this process made of the log, so that the next test hears it."""
    yield
    log = logging.getLogger("moco")
    log.handlers.clear()
    log.propagate = True


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run the test in a temporary directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Write 48 colour images of 20 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    write_pictures(root, [f"{i:02d}.jpg" for i in range(48)], rng)
    return root


@pytest.fixture
def copied(images, tmp_path):
    """Copy the images, so that a test may damage them."""
    return shutil.copytree(images, tmp_path / "images")


@pytest.fixture
def held():
    """Start a process that trains in `run`, with a worker that is its fork."""
    process = start_command("-c", HOLD, PYTHONPATH=str(ROOT))
    assert int(process.stdout.readline()) > 0, process.stderr.read()
    yield process
    end_group(process)


@pytest.fixture
def terminal(monkeypatch):
    """Make standard error a terminal of some columns; return a function that reads its screen."""
    screens = contextlib.ExitStack()

    def of(columns: int, lines: int = 50):
        outer, inner = os.openpty()
        termios.tcsetwinsize(inner, (lines, columns))
        os.set_blocking(outer, False)
        screens.callback(os.close, outer)
        stream = screens.enter_context(os.fdopen(inner, "w", encoding="utf-8", buffering=1))
        monkeypatch.setattr(sys, "stderr", stream)

        def read() -> str:
            shown = b""
            with contextlib.suppress(BlockingIOError):
                while True:
                    shown += os.read(outer, 2**16)
            return shown.decode().replace("\r\n", "\n")

        return read

    with screens:
        yield of


@pytest.fixture
def said():
    """Collect the lines that a run logs."""

    class Keep(logging.Handler):
        def emit(self, record) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    handler, logger = Keep(), logging.getLogger("moco")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def with_callback(monkeypatch):
    """Add a callback to the next runs of train.py, behind their own."""
    from moco.training import run

    def add(callback) -> None:
        monkeypatch.setattr(run, "pretrain", partial(run.pretrain, callbacks=[callback]))

    return add
