"""What the batch must divide into, and how long the queue may be, before the first step.

Shapes: W devices, K queue, M keys that an epoch makes.
"""

from __future__ import annotations

import logging
import math

from moco.config import ModelConfig, TrainConfig, UserError

log = logging.getLogger("moco")
WORTH_A_WARNING = 0.05  # share of the queries that meet their own image's older key


def check_shares(config: TrainConfig, world: int, key_bn: str, query_bn: str) -> None:
    """Raise UserError when the batch does not divide by the devices and BatchNorm groups."""
    batch = config.data.batch_size
    groups, why, needs = _needs(config, world, key_bn, query_bn)
    unit = math.lcm(*(parts for parts, _ in needs))
    near = max(-(-2 * groups // unit), batch // unit) * unit
    for parts, reason in needs:
        if batch % parts:
            raise UserError(
                f"data.batch_size {batch} does not divide by {parts} ({reason}): take {near}"
            )
    if batch < 2 * groups:
        raise UserError(
            f"data.batch_size {batch} leaves {batch // groups} image in a BatchNorm group ({why}): "
            f"take {near}"
        )


def batch_unit(config: TrainConfig, world: int) -> int:
    """Return what the batch must be a multiple of, with two images in each BatchNorm group."""
    key_bn, query_bn = config.model.key_bn, config.model.query_bn
    if key_bn == "shuffle" or (key_bn == "auto" and config.model.queue_size != 0):
        key_bn = "shuffle" if world > 1 else "split"
    groups, _, needs = _needs(config, world, key_bn, query_bn)
    return math.lcm(2 * groups, *(parts for parts, _ in needs))


def _needs(
    config: TrainConfig, world: int, key_bn: str, query_bn: str
) -> tuple[int, str, list[tuple[int, str]]]:
    """Return the BatchNorm groups, why there are so many, and all that the batch divides into."""
    groups, why, needs = world, f"{world} devices", []
    if config.data.chunks > 1:
        groups *= config.data.chunks
        why += f" x {config.data.chunks} chunks"
        needs.append((groups, why))
    if "split" in (key_bn, query_bn):
        groups *= config.model.bn_splits
        why += f" x {config.model.bn_splits} BatchNorm groups"
        needs.append((groups, why))
    if key_bn in ("shuffle", "split"):
        blocks = f"{world} devices, {world} equal blocks on each to shuffle keys"
        needs.append((world * world, blocks))
    needs.append((world, f"{world} devices"))
    return groups, why, needs


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


def check_queue(config: TrainConfig, count: int) -> None:
    """Warn where many queries would meet their own older keys, which count as negatives.

    Args:
        config: Settings.
        count: Images in the set.

    Raises:
        UserError: A batch or the queue is longer than the set.
    """
    model, batch = config.model, config.data.batch_size
    eighth = max(2 ** int(math.log2(max(count / 8, 2))), 2 * model.bn_splits)
    most_batch = min(batch, eighth) if batch > count else batch
    size = model.queue_size
    share, most = queue_share(model, most_batch, count)
    both = {"data.batch_size": (batch, most_batch), "model.queue_size": (size, size and most)}
    above = [f"{name} {value}" for name, (value, _) in both.items() if value > count]
    meet = f"{share:.0%} of the queries would meet an older key of their own image as a negative"
    if above:
        better = [f"{name} {best}" for name, (value, best) in both.items() if value != best]
        raise UserError(
            f"{' and '.join(above)} {'is' if len(above) == 1 else 'are'} above the {count} images "
            f"of {config.data.dataset} {config.data.root}{f', and {meet}' if size > count else ''}"
            f": take {' and '.join(better)}"
        )
    if share > WORTH_A_WARNING:
        log.warning(
            "model.queue_size %d is long for %d images, since %s: %d would be better, at most an "
            "eighth of the keys that an epoch makes",
            size,
            count,
            meet,
            most,
        )
