"""Bugs that shipped in this field, each as a deliberately broken MoCo that a check must refuse.

Every check is run on MoCo itself, which passes, and on the broken one, which fails. Sources are
named where the bug was reported; elsewhere what it breaks.
Shapes: N images per device, C embedding, K queue, W devices.
"""

from __future__ import annotations

import copy

import pytest
import torch
from steps import MODEL, make_batches, make_views
from torch import Tensor, nn

from moco import distributed
from moco.algorithm import pretrain
from moco.algorithm.contrast import KeyQueue
from moco.algorithm.pretrain import MoCo
from moco.config import DataConfig, OptimConfig
from moco.evaluation.features import extract_features
from moco.evaluation.finetune import train_linear
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData, RandomCrops
from moco.judge_config import LinearConfig

IMAGE_SIZE, COUNT = 16, 8


def build(kind: type[MoCo] = MoCo, **changes) -> MoCo:
    torch.manual_seed(0)
    return kind(copy.copy(MODEL), OptimConfig(**changes), 3, IMAGE_SIZE).double()


def batches(steps: int = 2, symmetric: bool = False) -> list:
    pairs = make_views(COUNT, steps=steps)
    return make_batches(pairs, 1, 0, shuffled=True, symmetric=symmetric)


def move_query(module: MoCo) -> None:
    """Change the query encoder as training would, BatchNorm's statistics included."""
    with torch.no_grad():
        for tensor in [*module.query_encoder.parameters(), *module.query_encoder.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.5).add_(0.1)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> list[str]:
    return [n for n, tensor in module.state_dict().items() if not tensor.equal(before[n])]


# A query's own key among its negatives


def check_negatives(kind: type[MoCo], monkeypatch) -> None:
    """No negative of a step equals a key of the same step."""
    met, info_nce = [], pretrain.info_nce

    def watched(query, key, negatives, *others):
        met.append((key.clone(), negatives.clone()))
        return info_nce(query, key, negatives, *others)

    monkeypatch.setattr(pretrain, "info_nce", watched)
    module = build(kind)
    module.model_config.symmetric = "mean"
    module.training_step(batches(symmetric=True)[0], 0)
    keys = torch.cat([key for key, _ in met])
    for _, negatives in met:
        assert (torch.cdist(keys, negatives) > 1e-9).all(), "a key of this step is a negative"


class EnqueuesFirst(MoCo):
    """The keys enter the queue before the logits: stable-pretraining's MoCo v2."""

    def encode_keys(self, *arguments):
        keys = super().encode_keys(*arguments)
        self.queue.enqueue(keys)
        return keys


class EnqueuesBetween(MoCo):
    """The first pair's keys are negatives of the second's: lightly-ai/lightly, issue 564."""

    def training_step(self, batch, batch_idx):
        whole, losses = batch, []
        for view in range(2):
            part = copy.copy(whole)
            part.query_views = whole.query_views[view : view + 1]
            part.key_views = whole.key_views[view : view + 1]
            losses.append(super().training_step(part, batch_idx))
        return sum(losses) / 2


@pytest.mark.parametrize("broken", [EnqueuesFirst, EnqueuesBetween])
def test_own_key_among_the_negatives(broken, monkeypatch):
    check_negatives(MoCo, monkeypatch)
    with pytest.raises(AssertionError, match="a key of this step"):
        check_negatives(broken, monkeypatch)


# Keys that are no unit vectors


def check_unit_keys(kind: type[MoCo]) -> None:
    """The queue holds unit vectors, at the start and after a step."""
    module = build(kind)
    for batch in (None, batches()[0]):
        if batch is not None:
            module.training_step(batch, 0)
        norms = module.queue.keys.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


class RandomBank(MoCo):
    """The first keys are not normalised: lightly, pull request 1009."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.queue.keys.normal_()


class LongKeys(MoCo):
    """Keys are enqueued as the encoder gives them, without the official builder.py's normalize."""

    def encode_keys(self, *arguments):
        return 3 * super().encode_keys(*arguments)


@pytest.mark.parametrize("broken", [RandomBank, LongKeys])
def test_bank_not_normalised(broken):
    check_unit_keys(MoCo)
    with pytest.raises(AssertionError):
        check_unit_keys(broken)


# Validation that moves the key encoder or the queue


def check_reading(kind: type[MoCo]) -> None:
    """Features are taken without a trace, also of a query encoder that has moved on."""
    module = build(kind).train()
    move_query(module)
    before = state(module)
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    extract_features(module.query_encoder.backbone, [(images, torch.zeros(4, dtype=torch.long))])
    assert changed(before, module) == []
    assert module.query_encoder.backbone.training


class UpdatesInForward(MoCo):
    """Every forward pass updates the key encoder: Lightning-Universe/lightning-bolts, issue 630."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.query_encoder.backbone.register_forward_hook(lambda *_: self.update_key_encoder())


class EnqueuesInForward(MoCo):
    """Every forward pass enqueues: Lightning-Universe/lightning-bolts, issue 419."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.query_encoder.backbone.register_forward_hook(
            lambda *_: self.queue.enqueue(self.queue.keys[:2].flip(1))
        )


class ReadsInTrainMode(MoCo):
    """BatchNorm takes the statistics of images that are only to be judged."""

    def __init__(self, *arguments):
        super().__init__(*arguments)

        def train(network, _):
            network.train()

        self.query_encoder.backbone.register_forward_pre_hook(train)


@pytest.mark.parametrize("broken", [UpdatesInForward, EnqueuesInForward, ReadsInTrainMode])
def test_validation_that_moves_something(broken):
    check_reading(MoCo)
    with pytest.raises(AssertionError):
        check_reading(broken)


# A probe that trains BatchNorm


def check_probe(kind: type[MoCo]) -> None:
    """A linear classifier is trained on images, and the encoder below it stays as it is."""
    module = build(kind).float().train()
    before = state(module)
    pixels = torch.randint(0, 255, (12, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    source = ImageSource("set", pixels, [], torch.arange(12) % 2, ["a", "b"], 3)
    images = LabelledData(source, DataConfig(image_size=IMAGE_SIZE))
    networks = {"encoder": (module.query_encoder.backbone, [0.1])}
    settings = LinearConfig(epochs=1, batch_size=6, milestones=[])
    train_linear(networks, RandomCrops(images, 0.5, seed=0), settings, torch.device("cpu"))
    assert changed(before, module) == []


def test_probe_that_trains_batch_norm():
    """As in kdexd/virtex, issue 16, and lightly-ai/lightly, issue 1438."""
    check_probe(MoCo)
    with pytest.raises(AssertionError):
        check_probe(ReadsInTrainMode)


# A gradient divided by the world


class PlainEncoder(nn.Module):
    """An encoder without BatchNorm, so that ranks do not matter to what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Flatten(), nn.Linear(3 * IMAGE_SIZE**2, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class DividesByWorld(MoCo):
    """R ranks move R times too little: KevinMusgrave/pytorch-metric-learning, issue 363."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / distributed.world_size()


def gradient(kind: type[MoCo], world: int, rank: int) -> Tensor:
    """Return the gradient of a step on this rank's share of one global batch."""
    module = build(kind)
    torch.manual_seed(1)
    module.query_encoder = PlainEncoder().double()
    module.key_encoder = copy.deepcopy(module.query_encoder).requires_grad_(False)
    batch = make_batches(make_views(COUNT, steps=1), world, rank, True, False)[0]
    module.training_step(batch, 0).backward()
    return module.query_encoder.head.weight.grad


def _gradient_on_rank(kind: type[MoCo]):
    found = gradient(kind, distributed.world_size(), distributed.rank())
    torch.distributed.all_reduce(found)  # as DistributedDataParallel does: the mean of the ranks
    return (found / distributed.world_size()).numpy()


def check_gradient(kind: type[MoCo], two_ranks) -> None:
    """The mean gradient of two ranks is that of one process with the whole batch."""
    alone = gradient(kind, 1, 0)
    for found in two_ranks.run(_gradient_on_rank, kind):
        torch.testing.assert_close(torch.from_numpy(found), alone, rtol=1e-9, atol=1e-12)


def test_gradient_divided_by_the_world(two_ranks):
    check_gradient(MoCo, two_ranks)
    with pytest.raises(AssertionError):
        check_gradient(DividesByWorld, two_ranks)


# A shuffle that keeps groups together


def check_shuffle(key_order) -> None:
    """Every rank encodes keys of several ranks; each key goes to one place."""
    world = 4
    order = key_order(0, 3, COUNT, world)
    assert order.sort().values.tolist() == list(range(world * COUNT))
    for place in order.view(world, COUNT):
        assert len({row // COUNT for row in place.tolist()}) == world


def ring_shift(seed: int, step: int, count: int, world: int) -> Tensor:
    """All of a rank's keys go to its neighbour, and the leak with them (1911.05722, 3.3)."""
    return torch.arange(world * count).roll(count)


def identity(seed: int, step: int, count: int, world: int) -> Tensor:
    """Keys stay: the leak that dddzg/MoCo, issue 5, is about."""
    return torch.arange(world * count)


@pytest.mark.parametrize("broken", [ring_shift, identity])
def test_shuffle_that_keeps_groups_together(broken):
    check_shuffle(distributed.key_order)
    with pytest.raises(AssertionError):
        check_shuffle(broken)


# The key encoder


def check_update(kind: type[MoCo]) -> None:
    """The update moves parameters by the closed form and leaves BatchNorm's statistics alone."""
    module = build(kind)
    move_query(module)
    before = state(module)
    module.update_key_encoder()
    momentum = module.model_config.key_momentum
    parameters = dict(module.key_encoder.named_parameters())
    for name, after in module.key_encoder.state_dict().items():
        old = before[f"key_encoder.{name}"]
        if name in parameters:
            expected = momentum * old + (1 - momentum) * before[f"query_encoder.{name}"]
            torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-14)
        else:
            assert after.equal(old), f"the statistics {name} were averaged"


class AveragesStatistics(MoCo):
    """Statistics follow the query encoder: asked for in facebookresearch/moco, issue 70."""

    def update_key_encoder(self):
        super().update_key_encoder()
        with torch.no_grad():
            buffers = zip(self.key_encoder.buffers(), self.query_encoder.buffers(), strict=True)
            for key, query in buffers:
                if key.is_floating_point():
                    key.lerp_(query, 1 - self.model_config.key_momentum)


class StaleHead(MoCo):
    """The head stays behind: Lightning-Universe/lightning-bolts, issue 1059."""

    def update_key_encoder(self):
        head = copy.deepcopy(self.key_encoder.head.state_dict())
        super().update_key_encoder()
        self.key_encoder.head.load_state_dict(head)


class TurnsAround(MoCo):
    """The shares of key and query are swapped, against equation 2 of 1911.05722."""

    def update_key_encoder(self):
        with torch.no_grad():
            pairs = zip(self.key_encoder.parameters(), self.query_encoder.parameters(), strict=True)
            for key, query in pairs:
                key.lerp_(query, self.model_config.key_momentum)


@pytest.mark.parametrize("broken", [AveragesStatistics, StaleHead, TurnsAround])
def test_update_of_the_key_encoder(broken):
    check_update(MoCo)
    with pytest.raises(AssertionError):
        check_update(broken)


def check_start(kind: type[MoCo]) -> None:
    """At the start the key encoder equals the query encoder, head included, and cannot learn."""
    module = build(kind)
    query, key = module.query_encoder.state_dict(), module.key_encoder.state_dict()
    assert query.keys() == key.keys()
    assert [name for name in query if not query[name].equal(key[name])] == []
    assert not any(p.requires_grad for p in module.key_encoder.parameters())
    optimised = {id(p) for g in module.configure_optimizers().param_groups for p in g["params"]}
    assert not optimised & {id(p) for p in module.key_encoder.parameters()}
    assert optimised == {id(p) for p in module.query_encoder.parameters()}


class FreshHead(MoCo):
    """The key encoder has a head of its own: Algorithm 1 (1911.05722) begins with f_k = f_q."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for layer in self.key_encoder.head.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


class LearningKeys(MoCo):
    """The key encoder is trained by gradient, which section 3.2 of 1911.05722 rules out."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.key_encoder.requires_grad_(True)


@pytest.mark.parametrize("broken", [FreshHead, LearningKeys])
def test_start_of_the_key_encoder(broken):
    check_start(MoCo)
    with pytest.raises(AssertionError):
        check_start(broken)


# A queue that is not saved


def check_saved_queue(kind: type[MoCo]) -> None:
    """A module that loads another's state goes on with its queue and its place in it."""
    module = build(kind)
    module.training_step(batches()[0], 0)
    other = build(kind)
    other.load_state_dict(module.state_dict())
    assert other.queue.keys.equal(module.queue.keys)
    assert other.queue.num_enqueued == module.queue.num_enqueued == COUNT


class ForgetfulQueue(KeyQueue):
    """Its keys and its place are in no checkpoint."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(size, dim, torch.Generator().manual_seed(0))
        for name in ("keys", "num_enqueued"):
            tensor = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, tensor, persistent=False)


class Forgets(MoCo):
    """The queue starts anew after a resume; the official builder.py registers it as a buffer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.queue = ForgetfulQueue(*self.queue.keys.shape)


def test_queue_that_is_not_saved():
    check_saved_queue(MoCo)
    with pytest.raises(AssertionError):
        check_saved_queue(Forgets)
