"""Fast-MoCo against a plain transcription of its definition (2207.08220), and its parts.

Shapes: N images per device, W devices, C embedding, S side of a view.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from steps import MODEL, PER_RANK, SIZE, as_rank, make_batches, make_module, make_views, train
from torch import nn
from torch.nn import functional

from moco.algorithm.contrast import info_nce
from moco.algorithm.encoder import build_encoder, build_predictor
from moco.algorithm.optim import build_optimizer, learning_rate
from moco.algorithm.patches import combinations_of, combine_features, cut_into_patches
from moco.config import ModelConfig, OptimConfig

STEPS = 12
FAST = replace(
    MODEL, head="mlp_bn_affine", head_layers=3, head_hidden_dim=24, predictor="bottleneck",
    patches=2, combine=2, queue_size=0, symmetric="mean", temperature=1.0, loss_times_2t=False,
    key_bn="plain", key_momentum=0.9, zero_init_residual=True,
)  # fmt: skip
OPTIM = OptimConfig(
    lr=0.2, weight_decay=1e-3, schedule="cosine", schedule_per="step", warmup_epochs=0.25,
    warmup_start=0.25, predictor_schedule="constant",
)  # fmt: skip


def quarters(x: torch.Tensor) -> list[torch.Tensor]:
    half = x.shape[2] // 2
    return [x[:, :, i : i + half, j : j + half] for i in (0, half) for j in (0, half)]


def transcription(module, pairs, world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run the definition with plain SGD, all ranks in one process, plain BatchNorm.

    Returns the mean over ranks of each step's loss, and the trained parameters.
    """
    config = module.optim_config
    f, h = copy.deepcopy(module.query_encoder), copy.deepcopy(module.predictor)
    f_k, t = copy.deepcopy(module.key_encoder), module.model_config.temperature
    named = {f"query_encoder.{n}": p for n, p in f.named_parameters()}
    named |= {f"predictor.{n}": p for n, p in h.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in named.items()}
    losses = []
    for step, (x1, x2) in enumerate(pairs):
        count, warmup = len(x1) // world, config.warmup_epochs * STEPS
        if step < warmup:
            rate = config.lr * (0.25 + 0.75 * step / warmup)
        else:
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        shares = [slice(rank * count, (rank + 1) * count) for rank in range(world)]

        def predict(x: torch.Tensor) -> list[torch.Tensor]:
            """Six predictions of N images each; BatchNorm sees all patches, then all of them."""
            pooled = f.backbone(torch.cat(quarters(x))).chunk(4)
            mixed = torch.cat([(a + b) / 2 for a, b in itertools.combinations(pooled, 2)])
            return h(f.head(mixed)).chunk(6)

        predictions = [[predict(x[rows]) for rows in shares] for x in (x1, x2)]
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f.parameters(), strict=True):
                k.copy_(0.9 * k + 0.1 * q)
            z1, z2 = (
                torch.cat(
                    [functional.normalize(f_k.head(f_k.backbone(x[rows]))) for rows in shares]
                )
                for x in (x1, x2)
            )
        loss = 0.0
        for of_view, keys in ((predictions[0], z2), (predictions[1], z1)):
            for rank, six in enumerate(of_view):
                labels = torch.arange(count) + count * rank
                for p in six:
                    logits = functional.normalize(p) @ keys.T / t
                    loss = loss + functional.cross_entropy(logits, labels) / 12 / world
        gradients = torch.autograd.grad(loss, list(named.values()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        scale = min(1.0, config.clip_grad_norm / (norm.item() + 1e-6) or 1.0)
        with torch.no_grad():
            for (name, p), g in zip(named.items(), gradients, strict=True):
                own = config.lr if name.startswith("predictor.") else rate
                velocity[name].mul_(0.9).add_(g * scale + config.weight_decay * p)
                p.sub_(own * velocity[name])
        losses.append(loss.item())
    return losses, named


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_twelve_steps_equal_the_definition(clip):
    optim = replace(OPTIM, clip_grad_norm=clip)
    module, pairs = make_module(FAST, optim=optim), make_views(PER_RANK, steps=STEPS)
    expected, named = transcription(module, pairs, world=1)
    losses = train(module, make_batches(pairs, 1, 0, False, True))
    assert losses == pytest.approx(expected, abs=1e-9)
    found = dict(module.named_parameters())
    for name, theirs in named.items():
        torch.testing.assert_close(found[name], theirs, atol=1e-9, rtol=0, msg=name)


def _train_on_rank(clip: float):
    rank, world = as_rank()
    module = make_module(FAST, optim=replace(OPTIM, clip_grad_norm=clip))
    pairs = make_views(world * PER_RANK, steps=STEPS)
    losses = train(module, make_batches(pairs, world, rank, False, True), world)
    return losses, {n: p.detach().numpy() for n, p in module.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_twelve_steps_on_two_ranks_equal_the_definition(two_ranks, clip):
    module = make_module(FAST, optim=replace(OPTIM, clip_grad_norm=clip))
    pairs = make_views(2 * PER_RANK, steps=STEPS)
    expected, named = transcription(module, pairs, world=2)
    (losses_0, ours), (losses_1, others) = two_ranks.run(_train_on_rank, clip)
    means = [(a + b) / 2 for a, b in zip(losses_0, losses_1, strict=True)]
    assert means == pytest.approx(expected, abs=1e-9)
    assert all((ours[name] == others[name]).all() for name in ours)
    for name, theirs in named.items():
        found = torch.from_numpy(ours[name])
        torch.testing.assert_close(found, theirs.detach(), atol=1e-9, rtol=0, msg=name)


def test_patches_of_an_image_stand_together():
    view = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    patches = cut_into_patches(view, 3)
    assert patches.shape == (18, 3, 2, 2)
    for image, row, column in itertools.product(range(2), range(3), range(3)):
        expected = view[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert patches[9 * image + 3 * row + column].equal(expected)


@pytest.mark.parametrize(("patches", "combine"), [(4, 1), (4, 2), (4, 4), (9, 2)])
def test_every_combination_is_averaged(patches, combine):
    features = torch.randn(5 * patches, 7, dtype=torch.float64)
    found = combine_features(features, combinations_of(patches, combine)).view(5, -1, 7)
    chosen = list(itertools.combinations(range(patches), combine))
    assert found.shape[1] == math.comb(patches, combine)
    for image, (row, some) in itertools.product(range(5), enumerate(chosen)):
        expected = sum(features[image * patches + one] for one in some) / combine
        torch.testing.assert_close(found[image, row], expected)


def test_the_gradient_of_combinations_is_the_same_each_time():
    features, grad = torch.randn(65 * 4, 512, requires_grad=True), torch.randn(65 * 6, 512)
    chosen, threads = combinations_of(4, 2), torch.get_num_threads()
    torch.set_num_threads(3)  # which would share the sum of a feature's gradients
    try:
        found = [
            torch.autograd.grad(combine_features(features, chosen), features, grad)[0]
            for _ in range(100)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(gradient.equal(found[0]) for gradient in found)


def test_several_queries_share_the_key_of_their_image():
    rows = torch.randn(12 + 4, 8, dtype=torch.float64)
    query, key = functional.normalize(rows, dim=1).split((12, 4))
    loss, logits = info_nce(query, key, key, 0.3, own_rows=0)
    own = torch.arange(4).repeat_interleave(3)
    expected = functional.cross_entropy(query @ key.T / 0.3, own)
    torch.testing.assert_close(loss, expected)
    assert logits.shape == (12, 5) and torch.isinf(logits).sum() == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"queue_size": 52, "symmetric": "none", "key_bn": "split", "predictor": "none"},
        {"queue_size": 52, "symmetric": "mean", "queues": 2, "key_bn": "split"},
        {"query_bn": "split", "combine": 3},
        {"patches": 4, "combine": 1},
    ],
)
def test_patches_mix_with_other_settings(changes):
    model = replace(FAST, **changes)
    symmetric = model.symmetric != "none"
    module = make_module(model)
    batches = make_batches(make_views(PER_RANK, steps=3), 1, 0, model.key_bn == "split", symmetric)
    losses = train(module, batches)
    assert losses[0] != losses[-1] and all(map(math.isfinite, losses))
    assert 0 <= module.metrics["train/contrast_top1"] <= 1


def test_chunks_of_patches_have_the_gradient_of_the_whole_batch():
    model = replace(FAST, head="mlp", head_layers=2, predictor="none", query_bn="plain")
    gradients = []
    for chunks in (1, 2):
        module = make_module(model, chunks=chunks)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()  # whose statistics would be a part's
        [batch] = make_batches(make_views(PER_RANK, steps=1), 1, 0, False, True)
        module.training_step(batch, 0).backward()
        gradients.append([p.grad for p in module.query_encoder.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-12, rtol=1e-9)


def test_keys_see_whole_views():
    module = make_module(FAST)
    view = make_views(2, steps=1)[0][0]
    assert module.key_encoder(view).shape == (2, FAST.embedding_dim)
    assert module.query_encoder(view).shape == (12, FAST.embedding_dim)


def test_shapes_of_head_and_predictor():
    model = ModelConfig(
        backbone="resnet50", head="mlp_bn_affine", head_layers=3, head_hidden_dim=2048,
        embedding_dim=2048, predictor="bottleneck",
    )  # fmt: skip
    with torch.device("meta"):
        encoder, predictor = build_encoder(model, 3, 224), build_predictor(model, 2048)
    kinds = [type(layer).__name__ for layer in encoder.head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is not None for layer in encoder.head if not isinstance(layer, nn.ReLU))
    assert [tuple(p.shape) for p in predictor.parameters()] == [
        (512, 2048), (512,), (512,), (512,), (2048, 512), (2048,)
    ]  # fmt: skip


def test_the_predictors_rate_stays():
    module = make_module(FAST, optim=OPTIM)
    optimizer = build_optimizer(
        module.query_encoder.parameters(), OPTIM, module.predictor.parameters()
    )
    assert [group.get("constant", False) for group in optimizer.param_groups] == [False, True]
    counts = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert counts[1] == sum(p.numel() for p in module.predictor.parameters())
    assert learning_rate(OPTIM, 0, STEPS, STEPS) == pytest.approx(0.05)
    assert learning_rate(OPTIM, 3, STEPS, STEPS) == pytest.approx(0.2)


def test_sizes_that_do_not_divide_are_refused():
    from moco.checks import check
    from moco.config import DataConfig, TrainConfig, UserError

    data = DataConfig(dataset="digits", image_size=SIZE, batch_size=32)
    config = TrainConfig(model=replace(FAST, patches=3), data=data)
    with pytest.raises(UserError, match=r"data\.image_size 16 does not divide.*take 15"):
        check(config)
    config.model = replace(FAST, combine=5)
    with pytest.raises(UserError, match=r"model\.combine 5 is above the 4 patches"):
        check(config)
    config.model = replace(FAST, patches=16, combine=8)  # the first step would never end
    with pytest.raises(UserError, match=r"make 409663695276000 queries of a view, above 1024"):
        check(config)
