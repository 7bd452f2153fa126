"""Findings: what the readings and the settings of a run show to be wrong, each with its remedy.

A run says them at its end, and a report on its page.
Shapes: K queue, M keys that an epoch makes.
"""

from __future__ import annotations

import math

from moco.config import ModelConfig

COLLAPSED = 0.05  # spread of the embeddings; an even sphere has 1
WORTH_A_WARNING = 0.05  # share of the queries that meet their own image's older key


def findings(latest: dict[str, float], model: ModelConfig, batch: int, count: int) -> list[str]:
    """Name what is wrong, and what to set.

    Args:
        latest: The last reading of each metric, by its name in metrics.csv.
        batch: Global batch.
        count: Images in the set.
    """
    found = []
    if latest.get("train/spread", 1.0) < COLLAPSED:
        found.append(
            f"the embeddings are nearly one point (train/spread {latest['train/spread']:.2f}), so "
            "lower optim.lr or raise model.key_momentum"
        )
    elif latest.get("train/loss", 0.0) >= latest.get("train/chance_loss", math.inf):
        found.append("the loss is not below that of chance, so train longer or change optim.lr")
    share, most = queue_share(model, batch, count)
    if share > WORTH_A_WARNING:
        found.append(
            f"{share:.0%} of the queries meet an older key of their own image, so "
            f"{queue_remedy(model.queue_size, most)}"
        )
    return found


def queue_remedy(size: int, most: int) -> str:
    """Return what to set where a queue is too long, or to do where it can be no shorter."""
    if most < size:
        return f"take model.queue_size {most}"
    return "give more images, or lower data.batch_size and with it model.queue_size"


def own_key_share(queue_size: int, keys: int) -> float:
    """Return the share of queries that find an older key of their own image among the negatives.

    An image that stands at u in one epoch and stood at v in the epoch before, both uniform in
    [0, 1), made its key (1 + u - v) * M keys ago: it is still queued where that is below K.

    Args:
        queue_size: K.
        keys: M.
    """
    reach = min(queue_size / keys, 2.0)
    return reach**2 / 2 if reach <= 1 else 1 - (2 - reach) ** 2 / 2


def queue_share(model: ModelConfig, batch: int, count: int) -> tuple[float, int]:
    """Return the share of queries that meet an older key of their own, and the longest good queue.

    Args:
        model: Settings; without a queue the share is 0.
        batch: Global batch.
        count: Images in the set.
    """
    of_step = batch * model.keys_per_image
    keys = max(count // batch, 1) * of_step
    return own_key_share(model.queue_size, keys), max(keys // 8, of_step)  # K holds a step's keys
