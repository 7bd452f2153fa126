"""Errors of libraries are explained. Without a GPU, memory is counted instead of measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from runs import run_tiny
from steps import MODEL, SIZE
from steps import make_module as make_module_of_any_precision

from moco.config import DataConfig, ModelConfig, RunError
from moco.training import explain, monitor, quality

DATA = DataConfig(image_size=SIZE, batch_size=64)


def make_module() -> pl.LightningModule:
    return make_module_of_any_precision().float()


def a_trainer(world: int = 1, device: str = "cpu") -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device(device), launcher=None)
    return SimpleNamespace(world_size=world, strategy=strategy, precision_plugin=Precision())


@pytest.fixture
def counted(monkeypatch):
    """Count the bytes that autograd keeps, in the place of a GPU's memory."""
    kept = {"now": 0, "most": 0}

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # no cycle through the graph that holds this
            kept["now"] += tensor.nbytes
            kept["most"] = max(kept["most"], kept["now"])

        def __del__(self):
            kept["now"] -= self.tensor.nbytes

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: kept.update(most=kept["now"])
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: kept["most"])
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda item: item.tensor):
        yield kept


def test_memory_grows_along_a_line_and_twice_as_fast_with_two_query_views(counted):
    module = make_module()
    four, eight, twelve = (
        explain.peak_memory(a_trainer(), module, count, DATA) for count in (4, 8, 12)
    )
    assert eight - four > 4 * SIZE * SIZE
    assert (twelve - eight) / (eight - four) == pytest.approx(1, abs=0.01)
    module.model_config = ModelConfig(**{**vars(MODEL), "symmetric": "sum"})
    both = [explain.peak_memory(a_trainer(), module, count, DATA) for count in (4, 8)]
    assert (both[1] - both[0]) / (eight - four) == pytest.approx(2, abs=0.05)


def test_chunks_are_measured_and_offered(counted, monkeypatch):
    module = make_module()
    whole = [explain.peak_memory(a_trainer(), module, count, DATA) for count in (8, 16)]
    module.chunks, data = 4, replace(DATA, chunks=4)
    parts = [explain.peak_memory(a_trainer(), module, count, data) for count in (8, 16)]
    assert (parts[1] - parts[0]) / (whole[1] - whole[0]) == pytest.approx(0.25, abs=0.02)
    monkeypatch.setattr(explain, "fitting_batch", lambda *a: 8)
    error = torch.OutOfMemoryError("CUDA out of memory")
    said = str(explain.explain(error, a_trainer(), module, data))
    assert "trainer.accumulate_grad_batches, or data.chunks 8 with the same batch" in said
    module.model_config = replace(MODEL, queue_size=0)
    said = str(explain.explain(error, a_trainer(), module, data))
    assert said.endswith("or data.chunks 8 with the same batch") and "accumulate" not in said


def test_measuring_leaves_the_run_as_it_is(counted):
    module = make_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    explain.peak_memory(a_trainer(), module, 4, DATA)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_failed_steps_activations_are_let_go_before_measuring(counted, monkeypatch):
    """The frames of Lightning hold the activations as long as the error lives."""
    module = make_module()

    def step():
        loss = module.query_encoder(torch.randn(64, 3, SIZE, SIZE)).sum()
        raise torch.OutOfMemoryError(f"CUDA out of memory with {loss.numel()}")

    monkeypatch.setattr(explain, "device_memory", lambda device: 2**40)
    monkeypatch.setattr(explain, "fitting_batch", lambda *a: 8 if counted["now"] == 0 else -1)
    try:
        step()
    except torch.OutOfMemoryError as error:
        assert counted["now"] > 0
        said = explain.explain(error, a_trainer(), module, DATA)
    assert "about 8 would fit" in str(said)


def test_the_device_named_is_the_one_that_was_full(monkeypatch):
    """The module does not tell the device: Lightning has moved it to the CPU by then."""
    seen = []
    monkeypatch.setattr(explain, "peak_memory", lambda trainer, *a: 100 + 10 * a[1])
    monkeypatch.setattr(explain, "device_memory", lambda device: seen.append(device) or 500)
    trainer, module = a_trainer(device="cuda:3"), make_module()
    assert module.device.type == "cpu"
    said = explain.explain(torch.OutOfMemoryError("CUDA out of memory"), trainer, module, DATA)
    assert "out of memory on cuda:3" in str(said) and "about 32 would fit" in str(said)
    assert seen == [torch.device("cuda:3")]


@pytest.fixture
def room(monkeypatch):
    """A device on which so many images fit; returns the sizes that are measured."""
    tried = []

    def hold(most):
        def measured(trainer, module, count, data):
            tried.append(count)
            if count > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 100 + 10 * count

        monkeypatch.setattr(explain, "peak_memory", measured)
        monkeypatch.setattr(explain, "device_memory", lambda device: (100 + 10 * most) / 0.9)
        return tried

    return hold


@pytest.mark.parametrize(
    ("tried", "most", "chunks", "model", "fits", "sizes"),
    [
        (512, 40, 1, {}, 40, [64, 8, 16]),  # an eighth does not fit
        (512, 300, 1, {}, 296, [64, 128]),
        (2, 1, 1, {}, 0, []),  # the tried one is the smallest there is
        (64, 10, 1, {"bn_splits": 4}, 8, [8, 16]),  # of two images a group
        (64, 40, 1, {"bn_splits": 8}, 32, [16, 32]),
        (512, 200, 4, {"bn_splits": 8}, 192, [64, 128]),  # whole groups in each part
        (64, 4, 1, {"bn_splits": 8}, 0, [16]),
        (8, 6, 1, {"bn_splits": 8, "key_bn": "plain"}, 6, [2, 4]),
    ],
)
def test_the_batch_named_fits(room, tried, most, chunks, model, fits, sizes):
    module, found = make_module(), room(most)
    module.model_config, module.chunks = replace(MODEL, **model), chunks
    data = replace(DATA, chunks=chunks)
    assert explain.fitting_batch(a_trainer(), module, tried, data) == fits
    assert found == sizes


@pytest.mark.parametrize("most", [40, 0])
def test_cudnn_without_an_engine_is_memory_only_where_less_of_it_helps(room, most):
    room(most)
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    said = explain.explain(error, a_trainer(), make_module(), DATA)
    assert (" would fit; or set" in str(said)) if most else said is error


def test_lightning_moves_the_module_away_before_the_error_comes_out(monkeypatch):
    """The explanation relies on this: at teardown the strategy frees the device."""
    module = make_module()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    moved = []
    monkeypatch.setattr(module, "cpu", lambda: moved.append(1))
    trainer.strategy.teardown()
    assert moved == [1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not even a small one would fit"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "not even a small"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out with data."),
        (MemoryError(), "data.resident_budget"),
    ],
)
def test_errors_of_libraries_say_what_to_set(monkeypatch, error, words):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(explain, "peak_memory", full)
    said = explain.explain(error, a_trainer(), make_module(), DATA)
    assert isinstance(said, RunError) and said.local and words in str(said)


@pytest.mark.parametrize(
    ("error", "what", "module", "function"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "kNN", monitor, "extract_features"),
        (RuntimeError("DefaultCPUAllocator: can't"), "kNN", monitor, "extract_features"),
        (torch.OutOfMemoryError("CUDA out of memory"), "quality", quality, "view_features"),
    ],
)
def test_memory_that_ran_out_in_a_reading_of_knn_is_no_matter_of_the_batch(
    images, monkeypatch, in_tmp, error, what, module, function
):
    def full(*arguments):
        raise error

    monkeypatch.setattr(module, function, full)
    digits = ["--data.dataset", "digits", "--data.upscale", "2", "--run.knn_every", "1"]
    with pytest.raises(RunError) as said:
        run_tiny(images, *digits)
    words = f"out of memory on cpu while {what} was read after step 0: set data.res"
    assert words in str(said.value)
    assert "run.knn_every 0" in str(said.value) and "batch" not in str(said.value)
    assert ("eval_knn" in str(said.value)) == (what == "kNN"), "which needs labels"


def test_other_errors_stay_what_they_are():
    error = ZeroDivisionError("a bug of ours")
    assert explain.explain(error, a_trainer(world=2), None, DATA) is error


def _measure_on_one_rank() -> bool:
    """Measure on rank 1 alone, in the middle of a step of DistributedDataParallel."""
    module = make_module()
    ddp = torch.nn.parallel.DistributedDataParallel(module.query_encoder)
    module.query_encoder = ddp.module
    loss = ddp(torch.randn(4, 3, SIZE, SIZE)).sum()  # from now on gradients wait for others
    if torch.distributed.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("empty_cache", "reset_peak_memory_stats"):
                patch.setattr(torch.cuda, name, lambda *a: None)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
            assert explain.peak_memory(a_trainer(2), module, 4, DATA) == 7
    torch.distributed.barrier()
    loss.backward()
    return True


def test_measuring_waits_for_no_other_rank(two_ranks):
    assert two_ranks.run(_measure_on_one_rank) == [True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_full_names_a_batch_that_fits():
    module = make_module()
    trainer = a_trainer(device="cuda:0")
    low, high = (explain.peak_memory(trainer, module, count, DATA) for count in (8, 64))
    assert high > low > 0
    torch.cuda.set_per_process_memory_fraction(0.02, 0)  # so that no large tensor is needed
    try:
        with torch.cuda.device(0):
            fits = explain.fitting_batch(trainer, module, 10**6, DATA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert 64 < fits < 10**6
    assert module.device.type == "cpu", "the run's own module stays where it is"
