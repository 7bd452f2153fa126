"""The code uses private names of libraries; a release without one of them fails here first."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from moco.training.ranks import RankLauncher

ROOMS = sorted((Path(__file__).parent.parent / "moco").rglob("*.py"))
# Private names of others that the rooms use; each is exercised below or by the test that is named.
KNOWN = {
    "_C._error_if_any_worker_fails",  # workers
    "_SubprocessScriptLauncher",  # ranks
    "_actions",  # cli, of argparse
    "_call_children_scripts",  # ranks
    "_exit",  # os, public in spite of its name
    "_foreach_copy_",
    "_foreach_lerp_",
    "_foreach_norm",
    "_is_avx512_bf16_supported",
    "_iterator",  # workers, of a DataLoader
    "_launcher",  # ranks, of a strategy
    "_num_ready_batches_reached",  # saving, monitor
    "_triton",  # decide
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
    for name in ("_foreach_copy_", "_foreach_lerp_", "_foreach_norm"):
        assert callable(getattr(torch, name))
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    torch._C._error_if_any_worker_fails()
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    next(iter(loader))
    (worker,) = loader._iterator._workers
    assert worker.exitcode is None and worker.pid


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, 0.1, fused=True), "exp_avg"),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fused_optimisers_skip_an_update_whose_found_inf_is_1(make, state, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make([weight])
    for found, moves in ((0, True), (1, False), (0, True)):
        weight.grad = torch.ones_like(weight) if not found else torch.full_like(weight, torch.nan)
        optimizer.found_inf = torch.tensor(float(found), device=device)
        slot = optimizer.state[weight] if optimizer.state else {}
        before = weight.detach().clone(), {k: v.clone() for k, v in slot.items()}
        optimizer.step()
        assert weight.equal(before[0]) != moves
        if not moves:
            assert all(v.equal(before[1][k]) for k, v in optimizer.state[weight].items())
    assert optimizer.state[weight][state].isfinite().all()


def test_names_of_lightning():
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    assert isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    assert callable(trainer.fit_loop.epoch_loop._num_ready_batches_reached)
    RankLauncher.replace(trainer.strategy)
    assert type(trainer.strategy.launcher) is RankLauncher
    assert trainer.strategy.launcher.procs == []
    theirs = inspect.signature(_SubprocessScriptLauncher.launch).parameters
    assert list(theirs) == ["self", "function", "args", "trainer", "kwargs"]
    assert callable(_SubprocessScriptLauncher._call_children_scripts)
    RankLauncher.replace(single := SimpleNamespace(launcher=None))
    assert single.launcher is None


def test_lightning_asks_all_ranks_about_sigterm_where_it_is_told_not_to():
    """`run` puts a function that does nothing in its place."""
    loop = pl.loops.training_epoch_loop._TrainingEpochLoop
    assert inspect.signature(loop._broadcast_sigterm_tensor).parameters.keys() == {"self"}
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(loop.advance)
