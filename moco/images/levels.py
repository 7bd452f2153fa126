"""Levels: which range people use for some values, and whether a range leaves an image of them.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from moco.config import UserError
from moco.images.scaling import Reading, numbers
from moco.pixels import scaled

log = logging.getLogger("moco")
OUTLIERS = 0.1  # percent of a file's values at each end that may be noise, dead or hot
PIXELS_PER_FILE = 2**16  # of each band; more say nothing new about a range
FEW_LEVELS = 32
_USUAL = (1, 255, 1023, 4095, 10_000, 65_535)  # tops that people use
_USUAL_BOTTOMS = (1, 128, 1024, 2048, 4096, 10_000, 32_768)
_STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
_CLIPPED = 0.01


def choose_range(bottom: float, top: float) -> tuple[float, float]:
    """Return the range that people use for values of bottom..top.

    The top is 1, 255, 1023, 4095, 10000 or 65535 where that is at most eight times too wide, else
    a round number. A float may overshoot 1 a little, as after sharpening. The bottom is 0, unless
    a share of the values that counts is negative.
    """
    high = _rounded(top if top > 1.5 else min(top, 1), _USUAL) if top > 0 else 0.0
    if -bottom <= 0.02 * high:
        return 0.0, high or 1.0
    return -_rounded(-bottom, _USUAL_BOTTOMS), high


def _rounded(value: float, usual: tuple[int, ...]) -> float:
    """Return the usual number at or next above a positive value, or a round one if that is far.

    One percent more than a usual number is taken for it.
    """
    next_above = next((number for number in usual if 1.01 * number >= value), math.inf)
    if next_above <= 8 * value:
        return float(next_above)
    power = 10.0 ** math.floor(math.log10(value))
    return float(
        f"{next(step for step in _STEPS if step * power >= value * (1 - 1e-9)) * power:.3g}"
    )


def check_levels(values: list[np.ndarray], ends: tuple[float, float], reading: Reading) -> None:
    """Refuse a set that is one value after scaling; warn of one that is clipped, or almost flat.

    Args:
        values: C H W each, as they are stored.
        ends: Their lowest and highest value, without a few outliers.
        reading: Its range is checked.

    Raises:
        UserError: Every value looked at becomes the same.
    """
    deep = [v for v in values if v.dtype != np.uint8]
    (bottom, top), (low, high) = ends, (reading.low, reading.high)
    shown = [scaled(v, max(len(low), len(high)), low, high) for v in deep]
    levels = len(np.unique(np.concatenate([v.ravel() for v in shown])))
    names = f"data.min_value {numbers(low)} and data.max_value {numbers(high)}"
    better = choose_range(bottom, top)
    remedy = f"set data.min_value {better[0]:.10g} and data.max_value {better[1]:.10g}"
    is_best = (low, high) == ((better[0],), (better[1],))
    files = f"{len(deep)} images looked at"
    if levels == 1:
        closer = f"set data.min_value {bottom:.10g} and data.max_value {top:.10g}"
        cure = "give images that differ" if bottom == top else closer if is_best else remedy
        if not any(np.isfinite(v).any() for v in deep):
            cure = "none of them is a finite number, give images that have some"
        raise UserError(
            f"with {names} every value of the {files} becomes {shown[0].flat[0]}: {cure}"
        )
    marks = _of_marks(deep, high[0] - low[0]) if is_best else ""
    if marks:
        log.info("warning: %s", marks)
        return
    if levels < FEW_LEVELS:
        cure = _cure(deep, high[0] - low[0]) if is_best else remedy
        log.info("warning: with %s %s use %d of 256 levels: %s", names, files, levels, cure)
    bounds = [np.array(ends)[:, None, None] for ends in (low, high)]
    outside = [((v < bounds[0]) | (v > bounds[1])).mean() for v in deep]
    if (share := float(np.mean(outside))) > _CLIPPED:
        endless = float(np.mean([np.isinf(v).mean() for v in deep]))
        all_of_them = min(bottom, low[0]), max(top, high[0])
        wider = "set data.min_value {:.10g} and data.max_value {:.10g}".format(*all_of_them)
        cure = wider if is_best else remedy
        cure = "infinite ones are, which NaN would mark as no data" if endless > share / 2 else cure
        log.info("warning: with %s %.0f %% of the values are clipped: %s", names, 100 * share, cure)


def _cure(deep: list[np.ndarray], width: float) -> str:
    """Say which range shows more where the usual one for these values shows few levels.

    That is where values lie far from 0. The rarest ones do not count.

    Args:
        deep: Values, C H W each.
        width: Of the usual range.
    """
    some = [v[np.isfinite(v)][:: max(1, v.size // PIXELS_PER_FILE)] for v in deep]
    found = np.unique(np.concatenate(some).astype(np.float64))
    if len(found) < FEW_LEVELS:
        return "the images hold no more"
    rare = max(1, len(found) // 1000)
    low, high = found[rare], found[-1 - rare]
    step = 10.0 ** math.floor(math.log10(high - low))
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    if high - low > width / 2:
        return "set data.min_value and data.max_value to those between which differences matter"
    return f"set data.min_value {low:.6g} and data.max_value {high:.6g}"


def _of_marks(values: list[np.ndarray], span: float) -> str:
    """Say how to read values of which many are one far from the others, as marks of no data are."""
    some = [v[:, ::4, ::4] for v in values]
    every = np.concatenate([v[np.isfinite(v)] for v in some])
    for mark in (every.min(), every.max()) if every.size else ():
        rest = every[every != mark]
        if 0.01 * every.size > every.size - rest.size or not rest.size:
            continue
        low, high = choose_range(*map(float, np.percentile(rest, (OUTLIERS, 100 - OUTLIERS))))
        if high - low < span / 4:
            share = 100 * (1 - rest.size / every.size)
            return (
                f"{share:.2g} % of the values are {mark:.10g}, and if that marks no data set "
                f"data.min_value {low:.10g} and data.max_value {high:.10g}"
            )
    return ""
