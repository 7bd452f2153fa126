"""timm's Muon, made fit for a CPU: it iterates in fp32, and on the Gram matrix of wide matrices.

Muon takes for a step the orthogonal matrix nearest to the momentum, by five iterations
X <- (a + b R + c R^2) X with R = X X^T (arXiv:2502.16982). Each costs three products, two of them
with X. But all of them are the first X times a polynomial of its own R, which is small and square:
so the iterations can go on with R alone, and meet X at the beginning and at the end.
Shapes: a matrix is m x n with m <= n, R is m x m.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

# From this ratio of sides on the Gram matrix is faster; it is 9 for most convolutions of 3 x 3.
WIDE = 2


def muon() -> type[torch.optim.Optimizer]:
    """Return timm's Muon with the iteration that a tensor's device is fast at."""
    import timm.optim.muon as library  # this takes 2 s, so it is left to those who want it

    iterate = inspect.unwrap(library.zeropower_via_newtonschulz)  # also where this ran before

    @functools.wraps(iterate)
    def by_device(matrix: Tensor, steps: int, coefficients: Any, **options: Any) -> Tensor:
        if matrix.device.type != "cpu":  # in bf16 the Gram matrix loses what is small
            return iterate(matrix, steps, coefficients, **options)
        if is_wide(matrix) and has_usual_options(steps, coefficients, options):
            return nearest_orthogonal(matrix.float(), coefficients[:steps], options["eps"])
        # timm iterates in bf16, twelve times as slow where a CPU does not multiply bf16.
        return iterate(matrix, steps, coefficients, **options | {"dtype": torch.float32})

    library.zeropower_via_newtonschulz = by_device
    return library.Muon


def is_wide(matrix: Tensor) -> bool:
    """Tell whether the Gram matrix is the faster way: a stack of matrices is left to timm."""
    return matrix.ndim == 2 and max(matrix.shape) >= WIDE * min(matrix.shape)


def has_usual_options(steps: int, coefficients: Any, options: dict[str, Any]) -> bool:
    """Tell whether timm is asked for what `nearest_orthogonal` does; others may use it too."""
    is_scaled = options.get("safety_factor", 1) != 1 or options.get("scale_eps", False)
    return steps <= len(coefficients) and "eps" in options and not is_scaled


def nearest_orthogonal(
    matrix: Tensor, coefficients: list[tuple[float, float, float]], eps: float
) -> Tensor:
    """Return nearly the orthogonal matrix nearest to a matrix, by way of its Gram matrix.

    Args:
        matrix: Of any two sides.
        coefficients: a, b and c of each iteration.
        eps: Smallest norm that it is divided by.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return nearest_orthogonal(matrix.mT, coefficients, eps).mT
    x = matrix / matrix.norm().clamp(min=eps)
    gram = x @ x.mT
    product = torch.eye(len(x), dtype=x.dtype)  # of all factors so far
    for a, b, c in coefficients:
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # a + b R + c R^2
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
