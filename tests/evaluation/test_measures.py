"""Measures without labels: closed forms, bounds, and what a collapse gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from moco.evaluation.measures import MEASURES, alignment, lidar, rankme, retrieval, uniformity


def features(images: int, views: int, dim: int, noise: float = 0.1) -> torch.Tensor:
    """Make images of random directions whose views differ by noise."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(images, 1, dim, generator=generator, dtype=torch.float64)
    return centres + noise * torch.randn(
        images, views, dim, generator=generator, dtype=torch.float64
    )


def test_rankme_counts_equal_directions():
    for count in (1, 3, 8):
        rows = torch.eye(8)[torch.arange(40) % count]
        # All singular values are equal where all directions have as many rows.
        even = 40 % count == 0
        assert rankme(rows) == pytest.approx(count, rel=1e-9 if even else 1e-2)


def test_rankme_is_the_papers_formula():
    x = features(20, 1, 6)[:, 0]
    share = torch.linalg.svdvals(x)
    share = share / share.sum()
    assert rankme(x) == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-9)


def test_lidar_ignores_directions_in_which_views_differ():
    """Three directions tell images apart; in the others the views of one image differ."""
    x = features(400, 4, 12, noise=0.0)
    x[..., 3:] = features(400, 4, 9, noise=3.0) - features(400, 4, 9, noise=0.0)
    assert lidar(x) == pytest.approx(3, abs=0.05)
    assert rankme(x.flatten(0, 1)) > 9


def test_lidar_is_the_same_in_any_basis_and_that_of_its_definition():
    x = features(60, 3, 5)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert lidar(x @ turn) == pytest.approx(lidar(x), rel=1e-6)
    # The eigenvalues of W^-1 B are those of the symmetric form.
    centres = x.mean(1)
    within = sum((p - c).T @ (p - c) for p, c in zip(x, centres, strict=True)) / (60 * 2)
    within += 1e-4 * torch.eye(5, dtype=torch.float64)
    values = torch.linalg.eigvals(torch.linalg.inv(within) @ torch.cov(centres.T)).real
    share = values / values.sum()
    assert lidar(x) == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-6)


def test_alignment_and_uniformity_are_their_definitions():
    x = features(15, 2, 4, noise=0.5)
    a, b = normalize(x[:, 0], dim=-1), normalize(x[:, 1], dim=-1)
    assert alignment(x) == pytest.approx((2 - 2 * (a * b).sum(1)).mean().item(), rel=1e-9)
    pairs = [(a[i] - a[j]).square().sum() for i in range(15) for j in range(i)]
    expected = torch.stack(pairs).mul(-2).exp().mean().log().item()
    assert uniformity(x) == pytest.approx(expected, rel=1e-9)


def test_retrieval_counts_own_views():
    x = features(30, 2, 8, noise=1e-3)
    assert retrieval(x) == 100
    x[:10, 1] = x[:10, 1].roll(1, 0)  # ten images have the view of another
    assert retrieval(x) == pytest.approx(100 * 20 / 30)


def test_scale_matters_to_none_that_is_normalised():
    x = features(20, 2, 6)
    for measure in (alignment, uniformity, retrieval, lambda y: rankme(y[:, 0])):
        assert measure(7 * x) == pytest.approx(measure(x), rel=1e-9)


@pytest.mark.parametrize("kind", ["zeros", "one point", "one image"])
def test_a_collapse_has_the_worst_values_and_no_error(kind):
    x = torch.zeros(20, 2, 6) if kind == "zeros" else torch.ones(20, 2, 6)
    x = x[:1] if kind == "one image" else x
    found = {name: measure(x) for name, (measure, _) in MEASURES.items()}
    assert all(math.isfinite(value) for value in found.values())
    assert found["rankme"] == pytest.approx(1) and found["uniformity"] == 0
    assert found["retrieval"] == pytest.approx(100 / len(x))


def test_half_precision_is_measured_in_double():
    x = features(64, 2, 16)
    for measure, _ in MEASURES.values():
        assert measure(x.float()) == pytest.approx(measure(x), rel=1e-4)
