"""Writing: checkpoints, whole or not at all, by a thread beside training; each under its names.

Shapes: none; what is written is what Lightning hands over, copied first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from moco.log import reason_of
from moco.whole_files import whole_file

log = logging.getLogger("moco")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints whole or not at all.

    For a run's own, training waits while the state is copied, and a thread writes the copy; after a
    failure the old file stays and training goes on. All others, as of a `ModelCheckpoint`, are
    written before training goes on, and a failure is raised.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Wait for the file before it, then write a checkpoint, or begin to write a run's own.

        Args:
            checkpoint: The state.
            path: Of the file.
            storage_options: Given with a run's own: the thread calls it with the file it wrote.
        """
        self.wait()
        if storage_options is None:
            _write_whole(checkpoint, Path(path))
            return
        copy = apply_to_collection(checkpoint, Tensor, lambda t: t.detach().to("cpu", copy=True))
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._write, copy, Path(path), storage_options)
        thread.shutdown(wait=False)  # it ends with the file

    def wait(self) -> None:
        """Wait until the newest file is written, or is known to have failed."""
        if self._writing:
            self._writing.result()
        self._writing = None

    def _write(
        self, checkpoint: dict[str, Any], target: Path, after: Callable[[Path], None]
    ) -> None:
        """Write to `target`; a failure is logged and not raised, since training goes on."""
        try:
            _write_whole(checkpoint, target)
        except (OSError, RuntimeError) as error:  # torch.save on a full disk raises RuntimeError
            reason = why_not(error, target.parent)
            before = any(target.parent.glob("*.ckpt"))
            rest = "the one before stays" if before else "and there is none before it"
            log.warning("checkpoint %s was not written, %s: %s", target, rest, reason)
        else:
            after(target)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: Any = True
    ) -> Any:
        """Load plain types and tensors only, whatever the caller or the environment asks for."""
        return torch.load(path, map_location=map_location, weights_only=True)


def _write_whole(checkpoint: dict[str, Any], target: Path) -> None:
    """Write beside `target`, flush to the disk, then move the file to its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


def why_not(error: Exception, folder: Path) -> str:
    """Say why a write failed; torch.save speaks of a bad archive, and hides the system's reason."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 2**20:
            return f"the disk of {folder} is full"
    hidden = error if isinstance(error, OSError) else error.__context__
    if isinstance(hidden, OSError) and hidden.strerror:  # as of a quota, which no disk tells
        return f"{hidden.strerror} ({folder})"
    return reason_of(error)


def name_besides(path: Path, name: Path) -> None:
    """Give a file another name besides, in the place of what had it."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # one file under two names: no second copy
    except OSError:  # a file system without such links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)
