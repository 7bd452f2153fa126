"""Loggers of metrics: metrics.csv always, TensorBoard, Weights & Biases and MLflow on demand."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import netrc
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from moco import distributed
from moco.config import RunConfig, UserError
from moco.evaluation.measures import MEASURES
from moco.log import reason_of
from moco.whole_files import whole_file

log = logging.getLogger("moco")
IDS = "loggers.json"
COLUMNS = (
    "step",
    "epoch",
    "train/loss",
    "train/chance_loss",
    "train/contrast_top1",
    "train/contrast_top5",
    "train/queue_fill",
    "train/spread",
    "train/lr",
    "train/key_momentum",
    "train/images_per_second",
    "train/wait_share",
    "val/knn_top1",
    *(f"val/{name}" for name in MEASURES),
)


class MetricsFile(Logger):
    """Write metrics.csv, a row per reading, at once; a resumed run continues it.

    While the disk is full, rows wait in memory.

    Args:
        path: The file.
        resume_step: Rows of later steps are dropped, since the run repeats them; 0: all rows are.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path, self._resume_step, self._ready = path, resume_step, False
        self._waiting: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        """Where a ModelCheckpoint without a directory writes."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, and those that could not be written before.

        What callbacks of the user's log besides has no column here; other loggers take it.
        """
        known = {name: value for name, value in metrics.items() if name in COLUMNS}
        if len(known) < len(metrics) and known.keys() <= {"epoch"}:  # which Lightning adds
            return
        self._waiting.append({"step": step, **known})
        try:
            if not self._ready:
                self._start()
            self._append()
            self._waiting.clear()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s waits to be written: %s", self.path, error.strerror)

    def _append(self) -> None:
        """Append all waiting rows, or none of them."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerows(self._waiting)
        except OSError:
            os.truncate(self.path, size)
            raise

    def _start(self) -> None:
        """Write the header, and the rows that a resumed run keeps."""
        rows: list[dict[str, str]] = []
        if self._resume_step and self.path.is_file():
            # A kill tears the last line, and a power cut may leave zeros.
            text = self.path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
            whole = text[: text.rfind("\n") + 1].splitlines()
            rows = [row for row in csv.DictReader(whole) if _step(row) <= self._resume_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as place, place.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self._ready = True


def _step(row: dict[str, str]) -> float:
    """Return a row's step, or infinity where a kill has torn the row."""
    try:
        return int(row["step"])
    except (TypeError, ValueError):
        return float("inf")


def loggers(config: RunConfig, run_dir: Path, resume_step: int) -> list[Logger]:
    """Make the loggers that the settings ask for.

    Raises:
        UserError: One is asked for but not installed, or cannot be reached.
    """
    found: list[Logger] = [MetricsFile(run_dir / "metrics.csv", resume_step)]
    if config.tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        try:
            found.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
        except ModuleNotFoundError:
            raise UserError(
                "run.tensorboard is true but it is not installed: pip install tensorboard"
            ) from None
    kept = _read_ids(run_dir) if resume_step else {}
    if config.wandb:
        from pytorch_lightning.loggers import WandbLogger

        # Without a key, wandb would open a login prompt or fail, so it must not be asked.
        mode = os.environ.get("WANDB_MODE")
        offline = mode == "offline" or (not mode and not _has_wandb_key())
        kept["wandb"] = kept.get("wandb") or uuid.uuid4().hex[:8]
        found.append(
            WandbLogger(
                run_dir.name,
                run_dir,
                project=config.wandb_project,
                offline=offline,
                id=kept["wandb"],
            )
        )
        _write_ids(run_dir, kept)
    if config.mlflow and distributed.rank() == 0:
        found.append(_mlflow(run_dir, kept))
    return found


def _mlflow(run_dir: Path, kept: dict[str, str]) -> Logger:
    """Make the logger of MLflow, whose run is begun on rank 0 or goes on.

    Raises:
        UserError: It is not installed, or the store of its runs does not answer.
    """
    from pytorch_lightning.loggers import MLFlowLogger

    place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.absolute()}/mlflow.db"
    pictures = None
    if place.startswith("sqlite:"):
        run_dir.mkdir(parents=True, exist_ok=True)
        pictures = (run_dir.absolute() / "mlflow").as_uri()
    try:
        logger = MLFlowLogger(
            "moco", run_dir.name, place, artifact_location=pictures, run_id=kept.get("mlflow")
        )
        kept["mlflow"] = str(logger.run_id)
        _write_ids(run_dir, kept)
    except ModuleNotFoundError:
        raise UserError("run.mlflow is true but it is not installed: pip install mlflow") from None
    except Exception as error:  # MLflow's own errors, which cannot be named before it is imported
        reason = reason_of(error)
        raise UserError(
            f"run.mlflow: {place} does not take the run ({reason}): set MLFLOW_TRACKING_URI to a "
            "store that does, or leave run.mlflow out"
        ) from None
    return logger


def _read_ids(run_dir: Path) -> dict[str, str]:
    """Return under which names loggers know the run, so that it goes on there."""
    try:
        found = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


@rank_zero_only
def _write_ids(run_dir: Path, kept: dict[str, str]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(run_dir / IDS) as temporary:
        temporary.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def finish() -> None:
    """End wandb's run before the result is printed, so that its words do not follow the result."""
    if wandb := sys.modules.get("wandb"):
        with contextlib.redirect_stdout(sys.stderr):
            wandb.finish()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
