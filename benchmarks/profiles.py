"""Profiles: where one step's time went, by operator, and what made the host wait."""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import print_columns, wait

# What makes the host wait for the device; `aten::item` on a CPU costs nothing and is counted too.
SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add `--profile [TRACE]`, for `profiled`."""
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="TRACE",
        help="profile one step; with a path, also write a trace for chrome://tracing",
    )


@dataclass
class Profile:
    """Where one step's time went; empty until the step is over.

    Attributes:
        step_ms: Of the host, from the first line to the last.
        operators: (name, calls, self milliseconds, share), the costliest first: on the device if
            there is one, else on the CPU.
        device_ms, idle_share: Time in which the device did something, and the share of the time
            from its first to its last piece of work in which it did nothing; None without one.
        waits: Calls that synchronise, by name.
    """

    step_ms: float = 0.0
    operators: list[tuple[str, int, float, float]] = field(default_factory=list)
    device_ms: float | None = None
    idle_share: float | None = None
    waits: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def profiled(path: str | None, limit: int = 15) -> Iterator[Profile | None]:
    """Profile the one step inside and print where its time went.

    Args:
        path: What `--profile` gave: None does nothing, "" prints, a path also writes the trace.
        limit: Operators that are printed.

    Yields:
        What is found, filled in at the end; None where nothing is asked.
    """
    if path is None:
        yield None
        return
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    found = Profile()
    wait()
    with profile(activities=activities) as profiler:
        with record_function("profiled step"):
            yield found
        wait()
    if path:
        profiler.export_chrome_trace(path)
    _read_profile(list(profiler.events()), found)
    _print_profile(found, limit)


def _read_profile(events: list[Any], found: Profile) -> None:
    """Fill in a profile from the profiler's events of the host and of the device."""
    step = next(e for e in events if e.name == "profiled step" and _on_host(e)).time_range
    host = [
        e for e in events if _on_host(e) and step.start <= e.time_range.start < step.end
    ]  # without the wait that ends the profile
    device = [e for e in events if not _on_host(e) and not _is_note(e)]
    found.step_ms = (step.end - step.start) / 1000
    counts = Counter(e.name for e in host)
    found.waits = {name: counts[name] for name in SYNCHRONISING if counts[name]}
    if device:
        busy, idle = busy_and_idle([(e.time_range.start, e.time_range.end) for e in device])
        found.device_ms, found.idle_share = busy / 1000, idle / max(busy + idle, 1e-9)
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in device or host:
        if event.name != "profiled step":
            own = event.time_range.elapsed_us() if device else event.self_cpu_time_total
            spent[event.name] += own
            calls[event.name] += 1
    total = sum(spent.values()) or 1
    found.operators = [
        (name, calls[name], own / 1000, own / total) for name, own in spent.most_common()
    ]


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _is_note(event: Any) -> bool:
    """Whether a device event only frames others, as `record_function` and optimisers leave it."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name == "profiled step"


def busy_and_idle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Return how much of the time from the first start to the last end is covered, and how much
    is not; spans may overlap.
    """
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, reached - min(start for start, _ in spans) - busy


def _print_profile(found: Profile, limit: int) -> None:
    where = "CPU" if found.device_ms is None else "device"
    print(f"\nOne step: {found.step_ms:.2f} ms on the host")
    if found.device_ms is not None:
        print(f"  device busy {found.device_ms:.2f} ms, idle {100 * found.idle_share:.1f} %")
    waits = ", ".join(f"{count} {name}" for name, count in found.waits.items())
    print(f"  synchronising calls: {waits or 'none'}")
    lines = [[f"self time on the {where}", "calls", "ms", "share"]]
    for name, calls, own, share in found.operators[:limit]:
        lines.append([name[:70], str(calls), f"{own:.3f}", f"{100 * share:.1f} %"])
    print_columns(lines)
