"""The code uses private names of libraries; a release without one of them fails here first."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytorch_lightning as pl
import torch

ROOMS = sorted((Path(__file__).parent.parent / "moco").rglob("*.py"))
# Private names of others that the rooms use; each is exercised below or by the test that is named.
KNOWN = {
    "_actions",  # cli, of argparse
    "_exit",  # os, public in spite of its name
    "_BatchNorm",  # batch_norm, torch's own base of all BatchNorm layers
    "_foreach_add",  # optim, and the five below; pretrain
    "_foreach_add_",
    "_foreach_lerp_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_norm",
    "_foreach_sub",
    "_is_avx512_bf16_supported",
    "_iterator",  # workers, of a DataLoader
    "_triton",  # decide
    "_version",  # trial, of a tensor: test_what_changes_in_each_pass_goes_in_no_chunks
    "_workers",  # workers, of a DataLoader's iterator
}


def private_names(path: Path) -> set[str]:
    """List the names with one leading underscore that a room uses and does not define."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            used |= {part for part in (node.module or "").split(".") if part.startswith("_")}
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            used |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return {n for n in used - defined if n.startswith("_") and not n.startswith("__")}


def test_every_private_name_that_is_used_is_known_here():
    found = {name for path in ROOMS for name in private_names(path)}
    known = {part for name in KNOWN for part in name.split(".")}
    assert found - known == set(), "a new one: use a public name, or list it with a test"


def test_names_of_torch():
    for name in ("lerp_", "add", "add_", "mul", "mul_", "norm", "sub"):
        assert callable(getattr(torch, f"_foreach_{name}"))
    base = torch.nn.modules.batchnorm._BatchNorm
    assert all(issubclass(k, base) for k in (torch.nn.BatchNorm1d, torch.nn.SyncBatchNorm))
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    next(iter(loader))
    (worker,) = loader._iterator._workers
    assert worker.exitcode is None and worker.pid


def test_lightning_asks_all_ranks_about_sigterm_where_it_is_told_not_to():
    """`run` puts a function that does nothing in its place."""
    loop = pl.loops.training_epoch_loop._TrainingEpochLoop
    assert inspect.signature(loop._broadcast_sigterm_tensor).parameters.keys() == {"self"}
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(loop.advance)
