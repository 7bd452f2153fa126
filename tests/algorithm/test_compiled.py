"""What is compiled: the folded stem, and the options of a backend; no kernel is built here."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from moco.algorithm import folded_stem
from moco.algorithm.batch_norm import set_batch_norm
from moco.algorithm.folded_stem import FoldedStem, fold_stem
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "is_folded"), [((32, 48), True), ((32, 33), False), ((33, 32), False)]
)
def test_a_folded_stem_is_the_plain_convolution(channels, size, is_folded, monkeypatch):
    encoder = nn.Sequential(nn.Conv2d(channels, 5, 7, 2, 3).double())
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    expected = encoder(images)
    gradients = torch.autograd.grad(expected.square().sum(), [*encoder.parameters()])
    keys = list(encoder.state_dict())
    fold_stem(encoder)
    assert type(encoder[0]) is FoldedStem and list(encoder.state_dict()) == keys
    assert encoder(images).equal(expected), "without a compiler it is the plain one"
    seen = []
    monkeypatch.setattr(folded_stem, "_for_a_gpu", lambda images: True)
    monkeypatch.setattr(folded_stem, "conv2d", lambda *a: seen.append(1) or functional.conv2d(*a))
    found = encoder(images)
    assert bool(seen) == is_folded
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    others = torch.autograd.grad(found.square().sum(), [*encoder.parameters()])
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, 1, 1),
        nn.Conv2d(5, 4, 7, 2, 3),
        nn.Conv2d(3, 4, 7, 2, 3, padding_mode="reflect"),
        nn.Conv2d(3, 3, 7, 2, 3, groups=3),
        nn.Conv2d(3, 4, 7, 2, 3, dilation=2),
        nn.Conv2d(3, 4, 7, 1, 3),
        nn.Conv2d(3, 4, 7, 2, 2),
        timm.layers.Conv2dSame(3, 4, 7, 2, 3),
    ],
)
def test_other_convolutions_are_not_folded(layer):
    kind = type(layer)
    fold_stem(nn.Sequential(layer))
    assert type(layer) is kind


def test_a_folded_stem_is_exported_as_it_is():
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3))
    fold_stem(stem)
    sizes = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(stem, (torch.randn(2, 3, 32, 32),), dynamic_shapes=(sizes,))
    images = torch.randn(2, 3, 33, 35)
    torch.testing.assert_close(program.module()(images), stem(images))


def test_compiled_encoders_fold_their_stem_and_compute_the_same(monkeypatch):
    model = ModelConfig("resnet10t", width=0.125, embedding_dim=8, queue_size=16, key_bn="plain")
    module = MoCo(model, OptimConfig(), 3, 32).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = module.query_encoder(images)
    monkeypatch.setattr(folded_stem, "_for_a_gpu", lambda images: True)
    seen = []
    monkeypatch.setattr(
        folded_stem, "pixel_unshuffle", lambda *a: seen.append(1) or functional.pixel_unshuffle(*a)
    )
    module.compile_encoders("aot_eager")
    for encoder in (module.query_encoder, module.key_encoder):
        assert [type(m) for m in encoder.modules()].count(FoldedStem) == 1
    torch.testing.assert_close(module.query_encoder(images), expected, atol=1e-12, rtol=0)
    assert seen


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_what_is_compiled_gets_the_options_of_its_backend(backend, whole, monkeypatch):
    seen = []

    def compile_(*given, **options):
        seen.append((options["backend"], options["options"]))

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(nn.Module, "compile", compile_)
    module = MoCo(ModelConfig("resnet18", queue_size=16, key_bn="plain"), OptimConfig(), 3, 32)
    if whole:
        module.compile_step(backend, lambda images: images)
    else:
        module.compile_encoders(backend)
    expected = {"combo_kernels": True} if backend == "inductor" else None
    assert seen == [(backend, expected)] * (1 if whole else 3)
    assert type(module.query_encoder.backbone.conv1) is FoldedStem
    assert type(module.key_encoder.backbone.conv1) is FoldedStem


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_what_a_compiler_sees_of_a_split_layer_ends_in_no_view(kind):
    """ReLU works in place: on a view of the groups it costs two copies of each map backward."""
    layer = set_batch_norm(nn.BatchNorm2d(6), "split", 4).train()
    assert not layer._fused(torch.randn(8, 6, 3, 3).to(kind))._is_view()
