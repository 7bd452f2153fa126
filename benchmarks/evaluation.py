"""Evaluation's claims, side by side:  python benchmarks/evaluation.py [--checkpoint CKPT --root
CIFAR10_FOLDER]

Prints one table each: kNN against an unchunked search and against faiss alone, memory of a large
bank under a budget, the sweep of 13 learning rates, and, given images, the probe against
scikit-learn. Rounds are interleaved, medians are quoted.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from moco.evaluation.features import extract_features
from moco.evaluation.knn import knn_predict
from moco.evaluation.probe import LinearProbe
from moco.evaluation.search import nearest

M, Q, D, K, L = 50_000, 10_000, 512, 200, 10
MEMORY = (1_280_000, 256, 1_000)  # bank, width, queries


def clusters(count: int, labels: Tensor, seed: int) -> Tensor:
    """Make positive features in overlapping classes, of falling variance, as networks do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(L, D, generator=torch.Generator().manual_seed(0))
    scale = 3 * torch.arange(1, D + 1).pow(-0.5)
    noise = torch.randn(count, D, generator=generator)
    return (noise * scale + 0.2 * centres[labels] * scale + 0.3).relu()


def unchunked(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Do what most code does: one product, topk, one-hot votes."""
    similarity, place = (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(K, dim=1)
    return vote(similarity, place, labels)


def plain_faiss(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Search with one call of faiss."""
    import faiss

    unit = [normalize(rows, dim=1).numpy() for rows in (queries, bank)]
    found = faiss.knn(*unit, K, metric=faiss.METRIC_INNER_PRODUCT)
    return vote(*map(torch.from_numpy, found), labels)


def vote(similarity: Tensor, place: Tensor, labels: Tensor) -> Tensor:
    """Weigh the neighbours' labels and return the class with the most votes."""
    votes = one_hot(labels[place], L) * (similarity / 0.1).exp()[:, :, None]
    return votes.sum(1).argmax(1)


def compare_knn(rounds: int) -> None:
    """Time the searches on one core and compare their predictions."""
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    labels = torch.arange(M) % L
    targets = torch.arange(Q) % L
    bank, queries = clusters(M, labels, 1), clusters(Q, targets, 2)
    ways: dict[str, Callable[[], Tensor]] = {
        "unchunked": lambda: unchunked(queries, bank, labels),
        "faiss": lambda: plain_faiss(queries, bank, labels),
        "ours": lambda: knn_predict(queries, bank, labels, L, K, 0.1),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            found[name] = way()
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    print(f"kNN, bank {M} x {D}, {Q} queries, k {K}, one core, median of {rounds}")
    base = statistics.median(s[0] for s in seconds["unchunked"])
    for name, times in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        same = (found[name] == found["unchunked"]).sum().item()
        hits = 100 * (found[name] == targets).double().mean().item()
        print(
            f"  {name:9} {wall:6.2f} s, {cpu:6.2f} s of CPU, {base / wall:4.2f} x; "
            f"{same} of {Q} predictions as unchunked, top-1 {hits:.2f}"
        )


def memory(field: str) -> float:
    """Return VmRSS or VmHWM, the peak, in MiB; ru_maxrss would count the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status).group(1)) / 1024


def measure_memory(budget: int) -> None:
    """Search a large bank in this fresh process and print what it took beside the bank."""
    count, width, queries = MEMORY
    torch.set_num_threads(1)
    bank, query = torch.empty(count, width).normal_(), torch.randn(queries, width)
    nearest(query[:8], bank[:1000], 10)  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = memory("VmRSS"), time.perf_counter()
    similarity, place = nearest(query, bank, K, budget)
    result = (similarity.nbytes + place.nbytes) / 2**20
    print(
        f"  budget {budget / 2**20:5.0f} MiB: "
        f"took {memory('VmHWM') - before - result:5.0f} MiB "
        f"beside the bank ({bank.nbytes / 2**20:.0f}) and the result ({result:.0f}), "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )


def compare_memory() -> None:
    """Measure each budget in a process of its own."""
    print(f"Memory, bank {MEMORY[0]} x {MEMORY[1]}, {MEMORY[2]} queries, k {K}", flush=True)
    for budget in (256, 512):
        argv = [sys.executable, __file__, "--memory", str(budget * 2**20)]
        subprocess.run(argv, check=True, timeout=900)


def time_sweep() -> None:
    """Time a sweep of 13 rates over 100 epochs, with the last training of the chosen rate."""
    torch.set_num_threads(os.cpu_count() or 1)
    labels = torch.arange(M) % L
    features = clusters(M, labels, 1)
    start, cpu = time.perf_counter(), time.process_time()
    probe = LinearProbe().fit(features, labels)
    print(
        f"Sweep of {len(probe.results)} rates, {probe.epochs} epochs, {M} x {D}, then the chosen "
        f"rate on everything: {time.perf_counter() - start:.1f} s, "
        f"{time.process_time() - cpu:.1f} s of CPU, "
        f"{torch.get_num_threads()} threads"
    )


def compare_sklearn(checkpoint: str, root: str) -> None:
    """Compare the probe with LogisticRegression at the C that is best on the test images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from moco.checkpoints.load import load_encoder
    from moco.config import DataConfig
    from moco.images.labelled import open_data
    from moco.images.sources import open_labelled

    torch.set_num_threads(os.cpu_count() or 1)
    loaded = load_encoder(checkpoint)
    data = DataConfig(**{**loaded.config.get("data", {}), **loaded.data})
    data.dataset, data.root = "folder", root
    device = torch.device("cpu")
    parts = [open_data(source, data, device, None) for source in open_labelled(data)]
    (bank, rows), (queries, query_rows) = (
        extract_features(loaded.backbone, part.batches(device)) for part in parts
    )
    labels, targets = parts[0].labels(rows), parts[1].labels(query_rows)
    probe = LinearProbe().fit(bank, labels)
    ours = 100 * (probe.predict(queries) == targets).double().mean().item()
    scaler = StandardScaler().fit(bank.numpy())
    scores = {}
    for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=500).fit(
            scaler.transform(bank.numpy()), labels.numpy()
        )
        scores[c] = 100 * model.score(scaler.transform(queries.numpy()), targets.numpy())
    best = max(scores, key=scores.get)
    print(
        f"Probe on {bank.shape[0]} x {bank.shape[1]} features: {ours:.2f} (rate {probe.rate:g}); "
        f"LogisticRegression: {scores[best]:.2f} at its best C {best:g}; "
        f"{ours - scores[best]:+.2f} points"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--root", default="", help="CIFAR-10 as a folder: train/CLASS, test/CLASS")
    parser.add_argument("--memory", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory)
        return
    compare_knn(options.rounds)
    compare_memory()
    time_sweep()
    if options.checkpoint and options.root:
        compare_sklearn(options.checkpoint, options.root)


if __name__ == "__main__":
    main()
