"""A step on a GPU that is pretended: all tensors are on it, and the host reads none of them.

torch's fake tensors have a shape and a device but no numbers, so they need no GPU. An operation on
two devices raises, and so does whatever the host would have to wait for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import MODEL, SIZE, make_module
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moco import distributed
from moco.algorithm import pretrain
from moco.config import DataConfig
from moco.evaluation import quality
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.steps import Indices
from moco.images.views import ViewMaker

COUNT = 16
V3 = replace(MODEL, queue_size=0, predictor="mlp", key_bn="plain")
CASES = {
    "queue": MODEL,
    "two queues, predictor, patches": replace(
        MODEL, queues=2, symmetric="mean", predictor="bottleneck", patches=2, combine=2
    ),
    "v3": replace(V3, symmetric="sum"),
}


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Make one of this shape and type on the GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def on_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Put fake tensors on a GPU in the place of all parameters and buffers."""
    for part in module.modules():
        for name, parameter in [*part.named_parameters(recurse=False)]:
            moved = torch.nn.Parameter(like(parameter), parameter.requires_grad)
            part.register_parameter(name, moved)
        for name, buffer in [*part.named_buffers(recurse=False)]:
            setattr(part, name, like(buffer))
    return module


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Stand in for a copy that a GPU can fetch by itself, of what the host has."""
    assert tensor.device.type == "cpu"
    return tensor


def take_step(model, kind: str = "device"):
    """Make a batch of views and take a step, on a GPU that is pretended; return its loss.

    The images are streamed, on the device or, in main memory, looked up by the host.
    """
    views = DataConfig(dataset="digits", image_size=SIZE, upscale=2.0, batch_size=COUNT, views="v3")
    data = PretrainData(views, 3, shuffle=True, symmetric=model.symmetric != "none")
    data.prepare(torch.device("cpu"))
    module, data.device = make_module(model).float(), torch.device("cuda")
    with FakeTensorMode() as mode:
        images = data.source.images
        images = mode.from_tensor(images) if kind == "memory" else like(images)
        data.source = replace(data.source, images=images)
        assert data.looks_up_on_host == (kind == "memory")
        mean, std = torch.empty(2, 3, device="cuda")
        data._make_view = ViewMaker(data.recipes, 0, SIZE, mean, std)
        index, crops = torch.arange(COUNT, device=images.device), None
        if kind == "streamed":
            shape = COUNT, 2, 3, SIZE, SIZE
            crops = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        size = 0 if kind == "streamed" else SIZE - 4  # of views that grow
        batch = data.make_batch(Indices(0, 0, index, crops, size))
        return on_gpu(module).training_step(batch, 0), module


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["device", "memory", "streamed"])
def test_a_step_stays_on_its_device_and_asks_nothing_of_it(case, kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    loss, module = take_step(CASES[case], kind)
    assert loss.device.type == "cuda"
    assert {value.device.type for value in module.metrics.values()} == {"cuda"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda keys: keys + torch.zeros(keys.shape[1]), RuntimeError, "two .*devices"),
        (lambda keys: keys * keys.max().item(), DataDependentOutputException, "scalar_dense"),
    ],
    ids=["another device", "a number that the host reads"],
)
def test_the_control_is_noticed(monkeypatch, change, error, words):
    restore = pretrain.restore
    monkeypatch.setattr(pretrain, "restore", lambda *given: change(restore(*given)))
    with pytest.raises(error, match=words):
        take_step(MODEL)


def test_held_out_images_that_are_streamed_are_measured_on_the_device(monkeypatch):
    """Nobody but Lightning, which is not there, moves the indices to the cuts."""
    config = DataConfig(dataset="digits", image_size=SIZE, upscale=2.0, batch_size=COUNT)
    data = PretrainData(replace(config, views="v2"), 3, shuffle=False, symmetric=False)
    data.prepare(torch.device("cpu"))
    data.device, data.source = torch.device("cuda"), replace(data.source, images=None)
    with FakeTensorMode():
        data._make_view = ViewMaker(data.recipes, 0, SIZE, *torch.empty(2, 3, device="cuda"))
        cuts = torch.zeros(COUNT, 2, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda")
        batches = [Indices(0, 0, torch.arange(COUNT), cuts)]
        monkeypatch.setattr(quality, "StepLoader", lambda *_: batches)
        features = quality.view_features(torch.nn.Flatten(), data)
    assert (features.device.type, *features.shape) == ("cuda", COUNT, 2, 3 * SIZE**2)


def test_one_image_of_a_set_on_the_device_is_read_to_main_memory():
    """There it is cut and drawn, for the pictures that loggers get."""
    with FakeTensorMode():
        images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda")
        assert ImageSource("on a GPU", images, [], None, [], 3).read(1).device.type == "cpu"


def test_cuts_change_places_without_waiting_for_the_device(monkeypatch):
    """Of own views, whose images and their order are in main memory."""
    order = torch.arange(COUNT).flip(0)
    moved = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(distributed, "key_order", lambda *_: order)
    monkeypatch.setattr(distributed, "exchange", lambda cuts, places: moved.append(places) or cuts)
    config = DataConfig(dataset="digits", image_size=SIZE, upscale=2.0, batch_size=COUNT)
    data = PretrainData(config, 3, shuffle=True, symmetric=False)
    data.prepare(torch.device("cpu"))
    data.device, data._make_view = torch.device("cuda"), lambda cuts, *_, **__: cuts
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuts = torch.zeros(COUNT, 2, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda")
        batch = data.make_batch(Indices(0, 0, torch.arange(COUNT), cuts))
    assert [places.device.type for places in moved] == ["cuda"]
    assert batch.key_order is moved[0], "one copy serves both"
