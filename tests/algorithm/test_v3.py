"""MoCo v3 against a plain transcription of its pseudocode (2104.02057, Algorithm 1), and its parts.

Shapes: N images per device, W devices, C embedding.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from steps import MODEL, PER_RANK, as_rank, make_batches, make_module, make_views, train
from torch import nn
from torch.nn import functional

from moco.algorithm.encoder import build_backbone
from moco.algorithm.optim import LARS, build_optimizer, key_momentum, learning_rate
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig, OptimConfig

STEPS = 12
RESNET = replace(
    MODEL, head="mlp_bn", head_hidden_dim=24, predictor="mlp", queue_size=0, symmetric="sum",
    temperature=0.7, key_bn="plain", key_momentum=0.9, key_momentum_end=1.0,
    key_momentum_schedule="cosine", zero_init_residual=True,
)  # fmt: skip
VIT = replace(
    RESNET, backbone="vit_tiny_patch16_224", stem="imagenet", patch_size=4, depth=2, num_heads=4,
    width=1 / 12, head_layers=3, predictor_last_bn=True, positions="sincos", vit_init="xavier",
    freeze_patch_embed=True, zero_init_residual=False, temperature=0.2,
)  # fmt: skip
SCHEDULE = {"schedule": "cosine", "schedule_per": "step", "warmup_epochs": 0.25}
WITH_LARS = OptimConfig(name="lars", lr=0.6, weight_decay=1e-3, **SCHEDULE)
WITH_ADAMW = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, **SCHEDULE)
RECIPES = [(RESNET, WITH_LARS), (VIT, WITH_ADAMW)]


class PaperLARS:
    """LARS as 2104.02057 uses it, one parameter after another."""

    def __init__(self, parameters, config: OptimConfig):
        self.parameters, self.config = parameters, config
        self.velocity = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients, rate: float) -> None:
        for p, g, v in zip(self.parameters, gradients, self.velocity, strict=True):
            if p.ndim > 1:
                g = g + self.config.weight_decay * p
                if p.norm() > 0 and g.norm() > 0:
                    g = g * (0.001 * p.norm() / g.norm())
            v.mul_(self.config.sgd_momentum).add_(g)
            p.sub_(rate * v)


class PaperAdamW:
    """AdamW (1711.05101, Algorithm 2), one parameter after another."""

    def __init__(self, parameters, config: OptimConfig):
        self.parameters, self.config, self.steps = parameters, config, 0
        self.means = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients, rate: float) -> None:
        config, self.steps = self.config, self.steps + 1
        b1, b2 = config.adam_beta1, config.adam_beta2
        moments = zip(self.parameters, gradients, self.means, self.squares, strict=True)
        for p, g, m, s in moments:
            m.mul_(b1).add_((1 - b1) * g)
            s.mul_(b2).add_((1 - b2) * g * g)
            p.mul_(1 - rate * config.weight_decay)
            spread = (s / (1 - b2**self.steps)).sqrt() + 1e-8
            p.sub_(rate * m / (1 - b1**self.steps) / spread)


def transcription(module: MoCo, pairs, world: int) -> tuple[list[float], nn.Module]:
    """Run Algorithm 1 of 2104.02057 as it is printed, all ranks in one process, plain BatchNorm.

    Returns the mean over ranks of each step's loss, and the last base encoder.
    """
    model, config = module.model_config, module.optim_config
    f_q = nn.Sequential(*copy.deepcopy([module.query_encoder, module.predictor]))
    f_k, t = copy.deepcopy(module.key_encoder), model.temperature
    trained = [p for p in f_q.parameters() if p.requires_grad]
    kinds = {"lars": PaperLARS, "adamw": PaperAdamW}
    optimizer = kinds[config.name](trained, config)
    losses = []
    for step, (x1, x2) in enumerate(pairs):
        count = len(x1) // world
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - model.key_momentum)
        warmup = config.warmup_epochs * STEPS
        rate = config.lr * step / warmup
        if step >= warmup:
            rate = config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        shares = [slice(rank * count, (rank + 1) * count) for rank in range(world)]
        queries = [[functional.normalize(f_q(x[rows])) for rows in shares] for x in (x1, x2)]
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f_q[0].parameters(), strict=True):
                k.copy_(m * k + (1 - m) * q)
            k1, k2 = (
                torch.cat([functional.normalize(f_k(x[rows])) for rows in shares]) for x in (x1, x2)
            )
        loss = 0.0
        for query, keys in ((queries[0], k2), (queries[1], k1)):
            for rank, q in enumerate(query):
                labels = torch.arange(count) + count * rank
                loss = loss + 2 * t * functional.cross_entropy(q @ keys.T / t, labels) / world
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            optimizer.step(gradients, rate)
        losses.append(loss.item())
    return losses, f_q[0]


@pytest.mark.parametrize(("model", "optim"), RECIPES, ids=["resnet, lars", "vit, adamw"])
def test_twelve_steps_equal_the_pseudocode(model, optim):
    module, pairs = make_module(model, optim=optim), make_views(2 * PER_RANK, steps=STEPS)
    expected, encoder = transcription(module, pairs, world=1)
    frozen = {n: p.clone() for n, p in module.query_encoder.named_parameters()}
    losses = train(module, make_batches(pairs, 1, 0, False, True))
    assert losses == pytest.approx(expected, abs=1e-9)
    for (name, ours), theirs in zip(
        module.query_encoder.named_parameters(), encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0, msg=name)
        assert ours.requires_grad != ours.equal(frozen[name]), name


def _train_on_rank(model: ModelConfig, optim: OptimConfig, chunks: int = 1):
    rank, world = as_rank()
    module = make_module(model, optim=optim, chunks=chunks)
    pairs = make_views(world * PER_RANK, steps=STEPS)
    losses = train(module, make_batches(pairs, world, rank, False, True), world)
    return losses, {n: p.detach().numpy() for n, p in module.named_parameters()}


@pytest.mark.parametrize(("model", "optim"), RECIPES, ids=["resnet, lars", "vit, adamw"])
def test_twelve_steps_on_two_ranks_equal_the_pseudocode(two_ranks, model, optim):
    module, pairs = make_module(model, optim=optim), make_views(2 * PER_RANK, steps=STEPS)
    expected, encoder = transcription(module, pairs, world=2)
    (losses_0, ours), (losses_1, others) = two_ranks.run(_train_on_rank, model, optim)
    means = [(a + b) / 2 for a, b in zip(losses_0, losses_1, strict=True)]
    assert means == pytest.approx(expected, abs=1e-9)
    assert all((ours[name] == others[name]).all() for name in ours)
    for name, theirs in encoder.named_parameters():
        found = torch.from_numpy(ours[f"query_encoder.{name}"])
        torch.testing.assert_close(found, theirs.detach(), atol=1e-9, rtol=0, msg=name)


def test_two_queues_hold_the_keys_of_one_view_each():
    model = replace(MODEL, queues=2, symmetric="mean", key_bn="plain", queue_size=24)
    module, pairs = make_module(model), make_views(PER_RANK, steps=3)
    batches = make_batches(pairs, 1, 0, False, True)
    first, second = module.queue.keys.clone(), module.second_queue.keys.clone()
    twin = copy.deepcopy(module)
    module.training_step(batches[0], 0)
    keys = [twin.encode_keys(view, None) for view in batches[0].key_views]
    queries = [functional.normalize(twin.query_encoder(v)) for v in batches[0].query_views]
    assert module.queue.keys[:PER_RANK].equal(keys[0])
    assert module.second_queue.keys[:PER_RANK].equal(keys[1])
    expected = 0.0
    for query, key, queue in zip(queries, keys, (first, second), strict=True):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1)
        labels = torch.zeros(len(query), dtype=torch.long)
        expected += functional.cross_entropy(logits / model.temperature, labels) / 2
    assert module.metrics["train/loss"].item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("changes", [{"predictor": "mlp"}, {"head": "mlp_bn", "head_layers": 3}])
def test_parts_of_v3_mix_with_a_queue(changes):
    model = replace(MODEL, **changes)
    losses = train(make_module(model), make_batches(make_views(8), 1, 0, True, False))
    assert losses[0] != losses[-1]
    assert all(map(math.isfinite, losses))


# A batch in chunks


WITHOUT_STATISTICS = replace(VIT, head="mlp", predictor="none", head_layers=2)


@pytest.mark.parametrize("queue_size", [0, 52])
def test_the_gradient_of_four_chunks_is_the_whole_batchs(queue_size):
    model = replace(WITHOUT_STATISTICS, queue_size=queue_size)
    gradients = []
    for chunks in (1, 4):
        module = make_module(model, chunks=chunks)
        [batch] = make_batches(make_views(16, steps=1), 1, 0, False, True)
        module.training_step(batch, 0).backward()
        gradients.append([p.grad for p in module.query_encoder.parameters() if p.requires_grad])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-12, rtol=1e-9)


def test_chunks_on_two_ranks_equal_whole_batches(two_ranks):
    [(losses, whole), _] = two_ranks.run(_train_on_rank, WITHOUT_STATISTICS, WITH_ADAMW)
    [(again, parts), _] = two_ranks.run(_train_on_rank, WITHOUT_STATISTICS, WITH_ADAMW, 4)
    assert losses == pytest.approx(again, abs=1e-9)
    for name, value in whole.items():
        torch.testing.assert_close(
            torch.from_numpy(value), torch.from_numpy(parts[name]), atol=1e-8, rtol=0, msg=name
        )


def test_the_second_pass_of_a_chunk_moves_no_statistics_and_repeats_the_dropout():
    module = make_module(RESNET, chunks=2)
    module.predictor.insert(3, nn.Dropout(0.5))
    masks = []
    module.predictor[3].register_forward_hook(lambda *hook: masks.append(hook[2] == 0))
    [batch] = make_batches(make_views(8, steps=1), 1, 0, False, True)
    loss = module.training_step(batch, 0)
    before = {n: b.clone() for n, b in module.named_buffers()}
    assert before["query_encoder.backbone.bn1.num_batches_tracked"] == 4  # 2 views, 2 chunks
    first = list(masks)
    loss.backward()
    assert len(masks) == 8
    again = masks[4:]
    assert all(any(a.equal(b) for b in again) for a in first)
    assert not first[0].equal(first[1])
    assert all(before[n].equal(b) for n, b in module.named_buffers())


# Optimisers and schedules


def test_lars_follows_the_paper_and_leaves_norms_and_biases_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    nn.init.zeros_(network[2].weight)  # a weight of norm 0 keeps the plain rate
    config = OptimConfig(name="lars", lr=0.3, weight_decay=0.01)
    theirs = [p.detach().clone() for p in network.parameters()]
    paper = PaperLARS(theirs, config)
    optimizer = build_optimizer(network.parameters(), config)
    for _ in range(5):
        loss = network(torch.randn(7, 5, dtype=torch.float64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        paper.step([p.grad.clone() for p in network.parameters()], 0.3)
        optimizer.step()
        for p, expected in zip(network.parameters(), theirs, strict=True):
            torch.testing.assert_close(p.detach(), expected, atol=1e-13, rtol=0)


def test_lars_returns_the_loss_and_skips_what_has_no_gradient():
    used, unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([used, unused], lr=1.0)

    def closure():
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert unused.equal(torch.ones(2, 2))
    assert not used.equal(torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_norms_and_biases_can_be_left_out_of_weight_decay(name):
    layer = nn.Linear(3, 3).double()
    nn.init.ones_(layer.bias)
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer.parameters(), config)
    layer(torch.zeros(2, 3, dtype=torch.float64)).sum().mul(0).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * 0.95, atol=1e-12, rtol=0)
    assert layer.bias.equal(torch.ones(3, dtype=torch.float64))


def test_gradients_are_clipped_to_the_norm():
    seen = []

    class Watched(MoCo):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            norms = [p.grad.norm() for p in self.query_encoder.parameters()]
            seen.append(torch.stack(norms).norm().item())

    for limit in (0.0, 1e-3):
        torch.manual_seed(0)
        optim = OptimConfig(lr=0.01, schedule="constant", clip_grad_norm=limit)
        module = Watched(MODEL, optim, 3, 16).double()
        train(module, make_batches(make_views(8, steps=2), 1, 0, True, False))
    assert min(seen[:2]) > 1e-2
    assert seen[2:] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_rate_and_momentum_are_counted_as_the_reference_counts_them():
    per_epoch, epochs, config = 7, 5, OptimConfig(lr=2.0, warmup_epochs=2, schedule_per="step")
    model = ModelConfig(key_momentum=0.99, key_momentum_end=1, key_momentum_schedule="cosine")
    for step in range(per_epoch * epochs):
        e = step / per_epoch
        rate = 2.0 * e / 2 if e < 2 else 1.0 * (1 + math.cos(math.pi * (e - 2) / 3))
        m = 1 - 0.5 * (1 + math.cos(math.pi * e / epochs)) * 0.01
        total = per_epoch * epochs
        assert learning_rate(config, step, per_epoch, total) == pytest.approx(rate, abs=1e-12)
        assert key_momentum(model, step, total) == pytest.approx(m, abs=1e-12)


# Vision transformers


def test_positions_follow_the_papers_formula():
    vit, dim = build_backbone(VIT, 3, 16)
    omega = [1 / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
    for h, w in itertools.product(range(4), range(4)):
        angles = [[f(place * o) for f in (math.sin, math.cos) for o in omega] for place in (h, w)]
        found = vit.pos_embed[0, 1 + h * 4 + w]
        torch.testing.assert_close(found, torch.tensor(angles[0] + angles[1]))


def test_a_vit_starts_as_v3s_do():
    torch.manual_seed(0)
    model = replace(VIT, depth=1, width=1.0, num_heads=12)
    vit, dim = build_backbone(model, 3, 32)
    assert (dim, vit.blocks[0].attn.num_heads, len(vit.blocks)) == (192, 12, 1)
    assert vit.pos_embed.shape == (1, 65, 192)
    assert vit.pos_embed[0, 0].abs().max() == 0
    assert vit.cls_token.detach().abs().max() < 1e-5
    bounds = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 16 + 192)),
        "blocks.0.attn.qkv.weight": math.sqrt(6 / (192 + 192)),
        "blocks.0.attn.proj.weight": math.sqrt(6 / (192 + 192)),
        "blocks.0.mlp.fc1.weight": math.sqrt(6 / (192 + 768)),
    }
    parameters = dict(vit.named_parameters())
    for name, bound in bounds.items():
        assert parameters[name].detach().abs().max() == pytest.approx(bound, rel=0.01), name
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    assert sorted(frozen) == ["patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed"]
    images = torch.randn(2, 3, 32, 32)
    assert vit(images).equal(vit.forward_features(images)[:, 0])


def test_a_patch_projection_without_bias_starts_as_v3s_does():
    model = ModelConfig(backbone="vit_base_patch16_clip_224", vit_init="xavier", depth=1)
    projection = build_backbone(model, 3, 32)[0].patch_embed.proj
    assert projection.bias is None
    bound = math.sqrt(6 / (3 * 256 + 768))
    assert projection.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
