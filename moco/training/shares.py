"""What the batch must divide into, and how long the queue may be, before the first step.

Shapes: W devices.
"""

from __future__ import annotations

import logging
import math

from moco.config import TrainConfig, UserError
from moco.evaluation.findings import WORTH_A_WARNING, queue_remedy, queue_share

log = logging.getLogger("moco")


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
        remedy = f"take {' and '.join(better)}"
        if max(best for _, best in both.values()) > count:  # no batch is as small as this set
            lower = ", or lower model.bn_splits" if model.bn_splits > 2 else ""
            remedy = f"give more images, {2 * model.bn_splits} at least{lower}"
        where = f"{config.data.dataset} {config.data.root}".strip()
        raise UserError(
            f"{' and '.join(above)} {'is' if len(above) == 1 else 'are'} above the {count} "
            f"{'image' if count == 1 else 'images'} of {where}"
            f"{f', and {meet}' if size > count else ''}: {remedy}"
        )
    if share > WORTH_A_WARNING:
        log.warning(
            "model.queue_size %d is long for %d images, since %s: %s",
            size,
            count,
            meet,
            f"{most} would be better, at most an eighth of the keys that an epoch makes"
            if most < size
            else queue_remedy(size, most),
        )
