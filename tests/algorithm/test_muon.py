"""Muon: steps that are nearly orthogonal, in fp32 and by the Gram matrix on a CPU."""

import inspect

import pytest
import torch
from timm.optim import muon as library
from torch import nn

from moco.algorithm import muon as ours
from moco.algorithm.muon import nearest_orthogonal
from moco.algorithm.optim import build_optimizer
from moco.config import OptimConfig

COEFFICIENTS = library._COEFFICIENTS["quintic"]
plain = inspect.unwrap(library.zeropower_via_newtonschulz)


def test_muon_moves_convolutions_by_their_nearest_orthogonal_matrix_and_the_rest_as_adamw():
    torch.manual_seed(0)
    filters, gains = torch.randn(8, 4, 3, 3), torch.ones(8)
    parameters = [nn.Parameter(filters.clone()), nn.Parameter(gains.clone())]
    optimizer = build_optimizer(parameters, OptimConfig(name="muon", lr=0.1, weight_decay=0.0))
    gradient = torch.randn(8, 36)
    parameters[0].grad, parameters[1].grad = gradient.clone().view(8, 4, 3, 3), torch.randn(8)
    optimizer.step()
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    nearest = left @ right * 0.1 * 0.2 * 36**0.5  # as large as a step of AdamW (2502.16982)
    moved = (filters - parameters[0].detach()).view(8, 36)
    assert torch.cosine_similarity(moved.flatten(), nearest.flatten(), dim=0) > 0.99
    assert moved.norm().item() == pytest.approx(nearest.norm().item(), rel=0.1)
    moved = gains - parameters[1].detach()
    torch.testing.assert_close(moved, 0.1 * parameters[1].grad.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (20, 40), (12, 12)])
@pytest.mark.parametrize("rank", [16, 3])
def test_iterations_on_the_gram_matrix_are_timms(shape, rank):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    matrix = matrix * torch.logspace(0, -4, shape[1])  # singular values of many sizes
    truth = plain(matrix.double(), 5, COEFFICIENTS, dtype=torch.float64)
    in_fp64 = nearest_orthogonal(matrix.double(), COEFFICIENTS, 1e-7)
    torch.testing.assert_close(in_fp64, truth, atol=1e-9, rtol=0)
    in_fp32 = nearest_orthogonal(matrix, COEFFICIENTS, 1e-7)
    torch.testing.assert_close(in_fp32.double(), truth, atol=2e-3, rtol=0)


def test_no_gradient_is_no_step():
    assert (nearest_orthogonal(torch.zeros(4, 36), COEFFICIENTS, 1e-7) == 0).all()


@pytest.mark.parametrize(
    ("shape", "by_gram"), [((8, 15), False), ((8, 16), True), ((16, 8), True), ((15, 8), False)]
)
def test_muon_iterates_in_fp32_on_a_cpu(monkeypatch, shape, by_gram):
    """In bf16 it is twelve times as slow where the CPU does not multiply that."""
    kinds, by_ours = [], []
    monkeypatch.setattr(
        ours, "nearest_orthogonal", lambda *a: by_ours.append(1) or nearest_orthogonal(*a)
    )

    def watched(*args, dtype=torch.bfloat16, **options):
        kinds.append(dtype)
        return plain(*args, **options, dtype=dtype)

    monkeypatch.setattr(library, "zeropower_via_newtonschulz", watched)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    optimizer = build_optimizer([weight], OptimConfig(name="muon", lr=0.1))
    optimizer.step()
    assert kinds == ([] if by_gram else [torch.float32]) and bool(by_ours) == by_gram


@pytest.mark.parametrize(
    "options",
    [{"ns_coefficients": "original"}, {"ns_steps": 10}, {"scale_eps": True, "eps": 1.0},
     {"safety_factor": 3.0}, {"conv_mode": "batched"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_others_ask_of_timms_muon_is_left_to_it(monkeypatch, options):
    """The function is replaced in timm's room, which other code of the process may use."""
    torch.manual_seed(0)
    gradient = torch.randn(8, 4, 3, 3) if "conv_mode" in options else torch.randn(8, 32)

    def stepped(kind):
        weight = nn.Parameter(torch.zeros(gradient.shape))
        weight.grad = gradient.clone()
        kind([weight], lr=1.0, weight_decay=0.0, **options).step()
        return weight.detach()

    in_fp32 = {"dtype": torch.float32}
    name = "zeropower_via_newtonschulz"
    monkeypatch.setattr(library, name, lambda *given, **other: plain(*given, **other | in_fp32))
    truth = stepped(library.Muon)
    monkeypatch.setattr(library, name, plain)
    torch.testing.assert_close(stepped(ours.muon()), truth, atol=1e-6, rtol=1e-6)
