"""The fast step: compiled encoders and views compute the same, and nothing waits for the device."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from steps import MODEL, SMALL, STEPS, Small, make_batches, make_module, make_views, train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco.algorithm.pretrain import MoCo
from moco.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, UserError
from moco.images.loader import PretrainData
from moco.images.steps import Indices
from moco.training import hardware, run
from moco.training.guard import NonFiniteGuard

GPU = torch.cuda.is_available()
# aot_eager traces and rewrites as inductor does, but runs torch's own kernels: seconds, no compiler
BACKEND = "inductor" if GPU else "aot_eager"
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# The same numbers


@pytest.mark.parametrize("precise", [True, False])
def test_losses_of_compiled_encoders(precise, monkeypatch):
    """Twenty steps; in fp32 at a rate at which training does not blow rounding errors up."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    first = module_of("none", precise)
    names = list(first.state_dict())
    first.compile_encoders(BACKEND)
    for symmetric in ("none", "mean"):
        plain, compiled = module_of(symmetric, precise), module_of(symmetric, precise)
        # Compiling takes most of the time, so both modules have the same compiled encoders.
        compiled.query_encoder, compiled.key_encoder = first.query_encoder, first.key_encoder
        compiled.load_state_dict(plain.state_dict())
        losses, others = (twenty_losses(module, symmetric) for module in (plain, compiled))
        assert others == pytest.approx(losses, abs=1e-7 if precise else 1e-5)
        assert len(losses) == 20 and max(losses) - min(losses) > 0.1
        assert list(compiled.state_dict()) == names == list(plain.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of each encoder


def module_of(symmetric, precise):
    torch.manual_seed(0)
    module = make_module(replace(SMALL, symmetric=symmetric), backbone=Small())
    if not precise:
        module.float()
        module.optim_config = OptimConfig(lr=1e-4, schedule="constant")
    return module


def twenty_losses(module, symmetric):
    dtype = next(module.parameters()).dtype
    pairs = [tuple(view.to(dtype) for view in pair) for pair in make_views(16, steps=2 * STEPS)]
    batches = make_batches(pairs, 1, 0, True, symmetric != "none")
    return train(module, batches, accelerator="gpu" if GPU else "cpu")


# What is done to cuts of streamed images is done to those of resident ones too.
@pytest.mark.parametrize(
    ("views", "streamed"), [("v1", False), ("v2", False), ("cifar", False), ("v2", True)]
)
def test_compiled_views(views, streamed):
    config = DataConfig(dataset="digits", image_size=16, upscale=2.0, batch_size=24, views=views)
    crops = torch.randint(0, 256, (24, 2, 3, 16, 16), dtype=torch.uint8, device=DEVICE)
    crops = crops if streamed else None
    made = []
    for backend in ("", BACKEND):
        data = PretrainData(config, 3, shuffle=True, symmetric=True)
        data.prepare(DEVICE, backend=backend)
        index = torch.arange(100, 124, device=DEVICE)
        batches = [Indices(epoch, 7, index, crops) for epoch in (0, 1, 2)]
        made.append([data.on_after_batch_transfer(b, 0) for b in batches])
    for one, other in zip(*made, strict=True):
        for view, same in zip(one.query_views, other.query_views, strict=True):
            # On a GPU the products of crop and blur round to 11 bits.
            torch.testing.assert_close(view, same, atol=1e-2 if GPU else 1e-5, rtol=0)
            assert same.is_contiguous(memory_format=torch.channels_last)
    assert not made[1][0].query_views[0].equal(made[1][1].query_views[0])  # epochs differ
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # views 0, 1, any epoch


# What `auto` decides


@pytest.mark.parametrize(
    ("wanted", "gpu", "missing", "steps", "backend"),
    [
        ("auto", False, "", 10**6, ""),
        ("auto", True, "", 10**6, "inductor"),
        ("auto", True, "", 100, ""),
        ("auto", True, "Triton", 10**6, ""),
        ("on", False, "", 1, "inductor"),
        ("off", True, "", 10**6, ""),
    ],
)
def test_what_is_compiled(wanted, gpu, missing, steps, backend, monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda config: "cuda" if gpu else "cpu")
    monkeypatch.setattr(hardware, "missing_compiler", lambda on_gpu: missing)
    config = TrainConfig()
    config.model.compile = wanted
    assert hardware.choose_compile(config, steps)[0] == backend


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    config = TrainConfig()
    config.model.compile = "on"
    config.trainer.accelerator = "cpu"
    with pytest.raises(UserError, match=r"model\.compile is on .* C\+\+ compiler"):
        hardware.choose_compile(config, 1)


# Nothing waits


class NothingIsRead(TorchDispatchMode):
    """Fail where a value is read from the device, or where a tensor of the host is copied to it."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.def")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        assert not any(read in name for read in self.READS), name
        source = args[-1] if "copy_" in name and len(args) > 1 else args[0] if args else None
        if isinstance(source, torch.Tensor):
            target = torch.device(kwargs.get("device") or args[0].device).type
            assert not ("copy" in name and source.device.type != target), f"{name}: host to device"
        return func(*args, **kwargs)


class NothingIsMade(TorchFunctionMode):
    """Fail where Python's numbers become a tensor on the device: that copies them from the host.

    Operators below do not show it in every release of torch.
    """

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in self.MAKERS:
            assert made.device.type != "meta", f"{func.__name__}: a constant is copied"
        if func is torch.Tensor.__getitem__ and args[0].device.type == "meta":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(place, list) for place in places), "a list is copied"
        return made


@contextlib.contextmanager
def nothing_waits():
    """Fail where a GPU would have to be waited for."""
    with NothingIsRead(), NothingIsMade():
        yield


CONTROLS = {
    "a value is read": lambda x: x.sum().item(),
    "a constant is made": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    "a constant is made of a list": lambda x: x + x.new_tensor([1.0, 2.0]),
    "a list is an index": lambda x: x[[0, 1]],
    "the host's memory is copied": lambda x: x + torch.ones(2).to(x.device),
    "copied in place": lambda x: x.copy_(torch.ones(2)),
    "places are counted": lambda x: x[x > 0],
}


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_waiting_is_noticed(control):
    with nothing_waits(), pytest.raises((AssertionError, RuntimeError)):
        control(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("views", ["v1", "v2"])
@pytest.mark.parametrize(
    ("symmetric", "streamed"), [("none", False), ("mean", False), ("none", True)]
)
def test_a_step_never_waits(views, symmetric, streamed, monkeypatch):
    """Views, both encoders, queue, guard and optimiser on the meta device, which has no values and
    takes the GPU's paths everywhere.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    meta = torch.device("meta")
    config = DataConfig(dataset="digits", image_size=16, upscale=2.0, batch_size=16, views=views)
    data = PretrainData(config, 0, shuffle=True, symmetric=symmetric != "none")
    data.prepare(meta)
    data.source.images = data.source.images.to(meta)
    crops = torch.empty(16, 2, 3, 16, 16, dtype=torch.uint8, device=meta) if streamed else None
    model = ModelConfig(**{**vars(MODEL), "queue_size": 64, "symmetric": symmetric})
    module = MoCo(model, OptimConfig(), 3, 16).to(meta)
    module.wants_metrics = False
    optimizer = torch.optim.SGD(module.query_encoder.parameters(), 0.1, momentum=0.9, foreach=True)
    trainer = SimpleNamespace(
        global_step=5, precision_plugin=None, optimizers=[optimizer], num_training_batches=9
    )
    guard = NonFiniteGuard(None)
    guard.on_train_start(trainer, module)

    def step():
        indices = Indices(1, 5, torch.arange(16, device=meta), crops)
        batch = data.on_after_batch_transfer(indices, 0)
        module.training_step(batch, 0).backward()
        guard.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        guard.on_train_batch_end(trainer, module, None, batch, 0)

    step()
    with nothing_waits():
        step()


def test_the_order_of_a_resident_set_is_made_on_the_device(monkeypatch):
    """So that no step copies its indices there."""
    data = PretrainData(DataConfig(dataset="digits", batch_size=16), 0, True, False)
    data.device, data.bad = torch.device("meta"), None  # as if it were prepared
    data.source.images = data.source.images.to("meta")
    data.trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(
                batch_progress=SimpleNamespace(total=SimpleNamespace(ready=0))
            )
        )
    )
    assert next(iter(data.train_dataloader())).index.device.type == "meta"


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_run_on_a_gpu_never_waits(compiled, tmp_path):
    """The whole loop, Lightning's part too, between two readings."""

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            inside = 10 <= trainer.global_step < 18
            torch.cuda.set_sync_debug_mode("error" if inside else "default")

    config = TrainConfig()
    config.data = DataConfig(dataset="digits", image_size=16, upscale=2.0, batch_size=32)
    config.model = ModelConfig(**{**vars(MODEL), "queue_size": 64, "compile": compiled})
    config.trainer.max_steps, config.trainer.log_every_n_steps = 20, 1000
    config.run.dir, config.run.knn_every = str(tmp_path / "run"), 0
    config.run.checkpoint_every, config.run.checkpoint_minutes = 1000, 0
    config.run.report = False
    try:
        assert run.pretrain(config, callbacks=[Watch()])["steps"] == 20
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda config: "cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert hardware.own_device(TrainConfig()) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert hardware.own_device(TrainConfig()) == torch.device("cuda", 3)
