"""Layout: points of a few directions in a plane, by t-SNE (van der Maaten and Hinton 2008).

scikit-learn's, and openTSNE's for many points. This room needs neither torch nor an extra package.
Shapes: M points, P directions.
"""

from __future__ import annotations

import numpy as np

from moco.config import UserError

MANY = 10_000  # points from which openTSNE is the faster one
_PERPLEXITY = 30


def tsne(points: np.ndarray, seed: int, remedy: str, steps: int = 1000) -> np.ndarray:
    """Lay M points of a few directions out in a plane, M x 2 float32.

    Args:
        points: M x P, M above 3.
        remedy: What else to do where openTSNE is needed and is not installed.
        steps: That scikit-learn takes.

    Raises:
        UserError: More than `MANY` points, and openTSNE is not installed.
    """
    options = {"perplexity": min(_PERPLEXITY, (len(points) - 1) / 3), "random_state": seed}
    if len(points) > MANY:
        try:
            from openTSNE import TSNE
        except ModuleNotFoundError:
            raise UserError(
                f"a map of {len(points)} images needs openTSNE: pip install openTSNE, or {remedy}"
            ) from None
        import faiss  # late: faiss and torch each load an OpenMP runtime

        threads = faiss.omp_get_max_threads()  # as OMP_NUM_THREADS says
        return np.asarray(TSNE(n_jobs=threads, **options).fit(points), np.float32)
    from sklearn.manifold import TSNE

    return TSNE(max_iter=steps, **options).fit_transform(points).astype(np.float32)
