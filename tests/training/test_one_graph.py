"""The step as one graph: it computes what the plain step does, and is captured where it can be."""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from steps import (
    MODEL,
    OPTIM,
    SIZE,
    SMALL,
    Recorder,
    Small,
    as_rank,
    make_batches,
    make_module,
    make_views,
    train,
)

from benchmarks import launches
from moco.algorithm.pretrain import MoCo
from moco.config import DataConfig, TrainConfig
from moco.images.loader import PretrainData
from moco.images.steps import Indices
from moco.training import captured, hardware, run
from moco.training.build import compile_parts, why_in_parts
from moco.training.captured import CapturedStep, capturable
from moco.training.decide import Decided

GPU = torch.cuda.is_available()
COUNT, STEPS = 16, 4
COUNTERS = torch._dynamo.utils.counters
ON_GPU = Decided("cuda", 1, 1, "bf16-mixed", "split", "inductor", "device")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    COUNTERS.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def said(caplog, monkeypatch):
    """The lines that the run says."""
    log = logging.getLogger("moco")
    monkeypatch.setattr(log, "propagate", False)
    log.addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    yield caplog
    log.removeHandler(caplog.handler)


def make_data(symmetric: bool, **views) -> PretrainData:
    config = DataConfig(
        dataset="digits", image_size=SIZE, upscale=2.0, batch_size=COUNT, views="cifar", **views
    )
    data = PretrainData(config, 3, shuffle=True, symmetric=symmetric)
    data.prepare(torch.device("cpu"))
    return data


def indices() -> list[Indices]:
    """What the loader yields, over two epochs."""
    return [Indices(n // 2, n, torch.arange(COUNT) + 5 * n) for n in range(STEPS)]


def in_fp64(data: PretrainData):
    """Make the views as `data` does, for networks in fp64."""

    def make_batch(images):
        batch = data.make_batch(images)
        queries, keys = ([v.double() for v in vs] for vs in (batch.query_views, batch.key_views))
        return replace(batch, query_views=queries, key_views=keys)

    return make_batch


# One graph


PLAIN_VIEWS = {"jitter": 0.0, "grey": 0.0}  # fewer operations to compile
V3 = replace(SMALL, queue_size=0, predictor="mlp", key_bn="plain")
CASES = {
    "views, momentum along a cosine": replace(SMALL, key_momentum_schedule="cosine"),
    "two queues, predictor, patches": replace(
        SMALL, queues=2, symmetric="mean", predictor="bottleneck", patches=2, combine=2
    ),
    "v3": V3,
}


def places_of(module: MoCo) -> dict[str, int]:
    """Where each parameter and buffer lies in memory."""
    return {n: t.data_ptr() for n, t in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_computes_what_the_plain_step_does(case):
    model, makes_views = CASES[case], case.startswith("views")
    made = make_batches(make_views(COUNT, steps=STEPS), 1, 0, True, model.symmetric != "none")
    found, states = [], []
    for backend in ("", "aot_eager"):
        data = make_data(model.symmetric != "none", **PLAIN_VIEWS)
        torch.manual_seed(0)
        optim = replace(OPTIM, schedule="cosine", schedule_per="step")
        module = make_module(model, optim=optim, backbone=Small())
        places = places_of(module)
        data.in_graph = bool(backend)
        if backend:
            module.compile_step(backend, in_fp64(data) if makes_views else lambda batch: batch)
        batches = made
        if makes_views:
            given = [data.on_after_batch_transfer(i, 0) for i in indices()]
            batches = given if backend else [in_fp64(data)(i) for i in indices()]
        found.append(train(module, batches))
        states.append({**module.state_dict(), **module.metrics, "loss_sum": module.loss_sum})
        assert places_of(module) == places, "a captured graph would not see another place"
    assert found[0] == pytest.approx(found[1], abs=1e-9) and len(set(found[0])) == STEPS
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-9, rtol=1e-9, msg=name)
    assert COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]


@pytest.mark.parametrize("is_whole", [True, False], ids=["as one graph", "in parts"])
def test_runs_of_one_process_do_not_use_up_what_torch_compiles(is_whole):
    [batch] = make_batches(make_views(COUNT, steps=1), 1, 0, True, False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for seed in range(3):
            module = make_module(SMALL, backbone=Small())
            if is_whole:
                module.compile_step("eager", lambda batch: batch)
            else:
                module.compile_encoders("eager")
                data = make_data(False, **PLAIN_VIEWS)
                data.seed = seed
                data.prepare(torch.device("cpu"), backend="eager")
                data.make_batch(indices()[0])
            assert module.training_step(batch, 0).isfinite()


def test_the_loss_is_returned_as_it_is_noted():
    """Inductor removes a product with 1, and would return the noted loss, without a gradient."""
    module = make_module()
    loss = module.training_step(make_batches(make_views(16, steps=1), 1, 0, True, False)[0], 0)
    assert loss.data_ptr() == module.metrics["train/loss"].data_ptr() and loss.requires_grad


@pytest.mark.parametrize("words", [[], ["--model.symmetric", "sum"]])
def test_launches_outside_graphs(words):
    """The shipped recipe on a narrow network, whose launches are as many as those of the wide."""
    recipe = ["--config", "configs/cifar10.yaml", "--model.width", "0.125"]
    counted = launches.count([*recipe, *words])
    assert all(sum(found.values()) <= launches.MOST_LAUNCHES for found in counted.found.values())
    assert counted.found.keys() == {"a step", "with a reading"}
    assert 0 < counted.graphs <= launches.MOST_GRAPHS
    assert counted.inside > 1000, "the views, both encoders and the loss are in it"


def test_two_compiled_ranks_compute_what_two_plain_ones_do(two_ranks):
    """Several devices have compiled encoders, with shuffled keys between them."""
    [plain, *_], [compiled, *_] = (two_ranks.run(_losses_on_rank, b) for b in ("", "aot_eager"))
    assert compiled == pytest.approx(plain, abs=1e-9) and len(set(plain)) == len(plain) > 2


def _losses_on_rank(backend: str) -> list[float]:
    rank, world = as_rank()
    torch.manual_seed(0)
    module = make_module(replace(SMALL, key_bn="shuffle"), backbone=Small())
    if backend:
        module.compile_encoders(backend)
    batches = make_batches(make_views(16, steps=3), world, rank, True, False)
    return train(module, batches, world)


def config_of(group: str = "", name: str = "", value=None) -> TrainConfig:
    config = TrainConfig()
    if name:
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize(
    ("config", "decided", "word"),
    [
        (config_of(), ON_GPU, ""),
        (config_of(), replace(ON_GPU, resident="streamed"), ""),
        (config_of(), replace(ON_GPU, accelerator="cpu", resident="memory"), ""),
        (config_of(), replace(ON_GPU, resident="memory"), "main memory"),
        (config_of(), replace(ON_GPU, devices=2), "devices"),
        (config_of("trainer", "accumulate_grad_batches", 2), ON_GPU, "accumulate_grad_batches"),
        (config_of("data", "chunks", 2), ON_GPU, "chunks"),
    ],
)
def test_what_is_not_one_graph(config, decided, word):
    assert bool(why_in_parts(config, decided)) == bool(word)
    assert word in why_in_parts(config, decided)


@pytest.mark.parametrize(
    ("config", "decided", "can"),
    [
        (config_of(), ON_GPU, True),
        (config_of(), replace(ON_GPU, accelerator="cpu"), False),
        (config_of(), replace(ON_GPU, precision="16-mixed"), False),
        (config_of("optim", "name", "lars"), ON_GPU, False),
        (config_of("optim", "clip_grad_norm", 1.0), ON_GPU, False),
    ],
)
def test_what_is_captured(config, decided, can):
    assert capturable(config, decided) == can


class Clip(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("callback", "can"),
    [
        (Recorder(), True),
        (Clip(), False),
        (pl.callbacks.LambdaCallback(on_train_start=print), True),
        (pl.callbacks.LambdaCallback(on_after_backward=print), False),
    ],
)
def test_a_callback_between_backward_pass_and_optimiser_is_never_too_late(callback, can):
    module, data = make_module(), make_data(symmetric=False)
    found = compile_parts(config_of(), ON_GPU, module, data, [callback])
    assert [type(each) for each in found] == [CapturedStep] * can and data.in_graph


@pytest.mark.parametrize(("accumulated", "how"), [(1, "to one graph"), (2, "not to one graph: tr")])
def test_a_run_says_how_it_is_compiled(accumulated, how, tmp_path, monkeypatch, said):
    def compile_step(self, backend, make_batch):
        plain = self.training_step
        self.training_step = lambda images, batch_idx: plain(make_batch(images), batch_idx)

    monkeypatch.setattr(hardware, "choose_compile", lambda *_: ("eager", "for once"))
    monkeypatch.setattr(MoCo, "compile_step", compile_step)
    monkeypatch.setattr(MoCo, "compile_encoders", lambda *_: None)
    config = config_on_digits(tmp_path)
    config.trainer.accumulate_grad_batches = accumulated
    run.pretrain(config)
    assert [how in line for line in said.messages if "for once" in line] == [True]


def config_on_digits(path) -> TrainConfig:
    config = TrainConfig()
    config.data = DataConfig(dataset="digits", image_size=SIZE, upscale=2.0, batch_size=32)
    config.model = replace(MODEL, queue_size=64)
    config.trainer.max_steps, config.trainer.log_every_n_steps = 8, 1
    config.run.dir, config.run.knn_every, config.run.report = str(path / "run"), 0, False
    config.run.checkpoint_every, config.run.checkpoint_minutes = 1000, 0
    return config


# The captured step


class Graph:
    """Stand in for a CUDA graph: what is captured leaves no trace, and is computed when replayed.

    Attributes:
        replayed: How often.
    """

    def __init__(self, step: CapturedStep, module: MoCo, fails: bool) -> None:
        self.step, self.module, self.fails, self.replayed = step, module, fails, 0

    @contextlib.contextmanager
    def capture(self, graph, **_):
        state = copy.deepcopy(self.module.state_dict())
        slots = copy.deepcopy(self.step._optimizer.state_dict())
        sums = self.module.loss_sum.clone()
        yield
        self.module.load_state_dict(state)
        self.module.loss_sum.copy_(sums)
        self.step._optimizer.load_state_dict(slots)
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def replay(self) -> None:
        self.replayed += 1
        self.step.loss.copy_(self.step._whole_step())


class Look(Recorder):
    """Note what callbacks see before an optimiser's step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad.clone() for p in module.query_encoder.parameters()]
        self.seen.append((trainer.global_step, optimizer.param_groups[0]["lr"], gradients))


def train_on_indices(module: MoCo, *callbacks: pl.Callback) -> Look:
    data, plain, recorder = make_data(symmetric=False), module.training_step, Look()
    make_batch = in_fp64(data)
    module.training_step = lambda images, batch_idx: plain(make_batch(images), batch_idx)
    module.steps_per_epoch = module.total_steps = 2 * STEPS
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, callbacks=[*callbacks, recorder],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    )  # fmt: skip
    data.in_graph = True
    batches = [data.on_after_batch_transfer(i, 0) for i in indices()]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == 2 * STEPS
    return recorder


@pytest.mark.parametrize("fails", [False, True])
def test_a_captured_step_trains_as_lightning_does(fails, monkeypatch, said):
    """The capture is made by a stand-in; all around it is what a GPU would run."""
    schedule = replace(OPTIM, schedule="cosine", schedule_per="step")
    plain, module = make_module(optim=schedule), make_module(optim=schedule)
    step = CapturedStep()
    graph = Graph(step, module, fails)
    monkeypatch.setattr(captured.torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(captured.torch.cuda, "graph", graph.capture)
    expected, found = train_on_indices(plain), train_on_indices(module, step)
    assert found.losses == expected.losses and len(set(found.losses)) == 2 * STEPS
    assert [(n, rate) for n, rate, _ in found.seen] == [(n, rate) for n, rate, _ in expected.seen]
    for (*_, gradients), (*_, others) in zip(found.seen, expected.seen, strict=True):
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, atol=1e-12, rtol=1e-9)
    assert graph.replayed == (0 if fails else 2 * STEPS - captured.WARM_UP)
    [line] = [line for line in said.messages if "captured" in line]
    assert ("goes on compiled (operation not permitted when stream" in line) == fails


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_run_computes_what_a_compiled_one_does(tmp_path, monkeypatch):
    """In fp32, at a rate at which training does not blow rounding errors up."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found, steps = [], []
    for name, can in (("captured", True), ("compiled", False)):
        config = config_on_digits(tmp_path / name)
        config.model.compile, config.trainer.precision = "on", "32-true"
        config.optim = replace(config.optim, lr=1e-4)
        config.trainer.max_steps, recorder = 20, Recorder()
        monkeypatch.setattr("moco.training.build.capturable", lambda *_, can=can: can)
        recorder.on_train_end = lambda trainer, _: steps.extend(
            c.graph for c in trainer.callbacks if isinstance(c, CapturedStep)
        )
        run.pretrain(config, callbacks=[recorder])
        found.append(recorder.losses)
    [graph] = steps
    assert graph is not None
    assert found[0] == pytest.approx(found[1], abs=1e-5) and len(found[0]) == 20
