"""The training step against a transcription of the pseudocode, and MoCo's invariants."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from steps import (
    MODEL,
    OPTIM,
    PER_RANK,
    STEPS,
    Recorder,
    as_rank,
    make_batches,
    make_module,
    make_views,
    train,
)
from torch import nn
from torch.nn import functional

from moco import distributed
from moco.algorithm import pretrain
from moco.algorithm.pretrain import MoCo
from moco.config import ModelConfig
from moco.random import stream_id


def transcription(module: MoCo, pairs, world: int, groups: int, symmetric: str) -> list[float]:
    """Run Algorithm 1 of 1911.05722 as it is printed, all ranks in one process.

    Returns the mean over ranks of each step's loss. `groups` is the number of key BatchNorm groups.
    """
    model, rate = module.model_config, OPTIM.lr
    f_q, f_k = copy.deepcopy(module.query_encoder), copy.deepcopy(module.query_encoder)
    queue, pointer = module.queue.keys.T.clone(), 0
    velocity = [torch.zeros_like(p) for p in f_q.parameters()]
    losses = []
    for step, (x_1, x_2) in enumerate(pairs):
        count = len(x_1) // world
        with torch.no_grad():
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                p_k.copy_(model.key_momentum * p_k + (1 - model.key_momentum) * p_q)
        order = distributed.key_order(stream_id(0, "shuffle"), step, count, world)
        loss, enqueued = 0.0, []
        for x_q, x_k in [(x_1, x_2), (x_2, x_1)][: 1 if symmetric == "none" else 2]:
            with torch.no_grad():
                shuffled = torch.cat([f_k(part) for part in x_k[order].chunk(groups)])
                k = torch.empty_like(shuffled)
                k[order] = shuffled
                k = functional.normalize(k, dim=1)
            for rank in range(world):
                rows = slice(rank * count, (rank + 1) * count)
                q = functional.normalize(f_q(x_q[rows]), dim=1)
                l_pos = torch.einsum("nc,nc->n", q, k[rows])[:, None]
                l_neg = torch.einsum("nc,ck->nk", q, queue)
                logits = torch.cat([l_pos, l_neg], 1) / model.temperature
                target = torch.zeros(count, dtype=torch.long)
                loss = loss + functional.cross_entropy(logits, target) / world
            enqueued.append(k)
        loss = loss / 2 if symmetric == "mean" else loss
        gradients = torch.autograd.grad(loss, list(f_q.parameters()))
        with torch.no_grad():
            for p, g, v in zip(f_q.parameters(), gradients, velocity, strict=True):
                v.mul_(OPTIM.sgd_momentum).add_(g + OPTIM.weight_decay * p)
                p.sub_(rate * v)
            for column in torch.cat(enqueued):
                queue[:, pointer] = column
                pointer = (pointer + 1) % queue.shape[1]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("symmetric", ["none", "mean", "sum"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_ten_steps_equal_the_pseudocode(head, symmetric):
    module = make_module(replace(MODEL, head=head, symmetric=symmetric))
    pairs = make_views(2 * PER_RANK)
    expected = transcription(module, pairs, world=1, groups=2, symmetric=symmetric)
    losses = train(module, make_batches(pairs, 1, 0, True, symmetric != "none"))
    assert losses == pytest.approx(expected, abs=1e-7)
    assert len(set(losses)) == STEPS


def _train_on_rank(model: ModelConfig):
    rank, world = as_rank()
    module = make_module(model)
    pairs = make_views(world * PER_RANK)
    shuffled = model.key_bn == "shuffle"
    batches = make_batches(pairs, world, rank, shuffled, model.symmetric != "none")
    losses = train(module, batches, world)
    state = {k: v.numpy() for k, v in module.state_dict().items() if "running" not in k}
    return losses, state


@pytest.mark.parametrize(("head", "symmetric"), [("linear", "none"), ("mlp", "mean")])
def test_ten_steps_on_two_ranks_equal_the_pseudocode(two_ranks, head, symmetric):
    model = replace(MODEL, head=head, key_bn="shuffle", symmetric=symmetric)
    module, pairs = make_module(model), make_views(2 * PER_RANK)
    expected = transcription(module, pairs, world=2, groups=2, symmetric=symmetric)
    (losses_0, state_0), (losses_1, state_1) = two_ranks.run(_train_on_rank, model)
    means = [(a + b) / 2 for a, b in zip(losses_0, losses_1, strict=True)]
    assert means == pytest.approx(expected, abs=1e-7)
    different = [name for name in state_0 if (state_0[name] != state_1[name]).any()]
    assert not different, "queue, key encoder and query encoder are the same on all ranks"


def test_two_ranks_without_batch_norm_equal_one_process(two_ranks):
    model = replace(MODEL, backbone="test_vit", stem="imagenet", width=1.0, key_bn="plain")
    pairs = make_views(2 * PER_RANK)
    single = make_module(model)
    losses = train(single, make_batches(pairs, 1, 0, False, False))
    (losses_0, state), (losses_1, _) = two_ranks.run(_train_on_rank, model)
    means = [(a + b) / 2 for a, b in zip(losses_0, losses_1, strict=True)]
    assert means == pytest.approx(losses, abs=1e-7)
    for name, value in single.state_dict().items():
        torch.testing.assert_close(value, torch.from_numpy(state[name]), atol=2e-5, rtol=1e-4)


def test_key_encoder_starts_as_the_query_encoder_head_included():
    module = make_module()
    query, key = module.query_encoder.state_dict(), module.key_encoder.state_dict()
    assert query.keys() == key.keys()
    assert all(query[name].equal(key[name]) for name in query)
    assert any(name.startswith("head.") for name in query)


def test_first_key_update_changes_nothing_and_later_ones_follow_the_closed_form():
    module = make_module()
    before = copy.deepcopy(module.key_encoder.state_dict())
    module.update_key_encoder()
    for name, value in module.key_encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-7, rtol=0)
    with torch.no_grad():
        for parameter in module.query_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in module.query_encoder.buffers():
            buffer.add_(1)
    for _ in range(5):
        module.update_key_encoder()
    kept = MODEL.key_momentum**5
    queries = dict(module.query_encoder.named_parameters())
    for name, value in module.key_encoder.named_parameters():
        expected = kept * before[name] + (1 - kept) * queries[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    for name, buffer in module.key_encoder.named_buffers():
        assert buffer.equal(before[name]), "BatchNorm buffers are the key encoder's own"


def test_keys_get_no_gradient_and_no_optimiser_state():
    module = make_module()
    train(module, make_batches(make_views(16, steps=2), 1, 0, True, False))
    assert all(p.grad is None and not p.requires_grad for p in module.key_encoder.parameters())
    owned = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert owned == {id(p) for p in module.query_encoder.parameters()}


def test_own_keys_are_never_among_the_negatives_and_are_enqueued_afterwards(monkeypatch):
    module, seen = make_module(replace(MODEL, symmetric="mean")), []

    def spy(query, key, negatives, *others):
        nearest = (key @ negatives.T).max().item()
        seen.append((nearest, key.clone(), negatives.clone()))
        return info_nce(query, key, negatives, *others)

    info_nce = pretrain.info_nce
    monkeypatch.setattr(pretrain, "info_nce", spy)
    train(module, make_batches(make_views(16, steps=3), 1, 0, True, True))
    assert max(nearest for nearest, _, _ in seen) < 1 - 1e-5
    assert seen[0][2].equal(seen[1][2]), "both losses of a step see one snapshot"
    queued = seen[2][2]  # the second step's negatives: both key sets of the first stand in front
    assert queued[:32].equal(torch.cat([seen[0][1], seen[1][1]]))


def test_accumulation_moves_the_key_encoder_once_per_optimiser_step(monkeypatch):
    calls = []
    update = MoCo.update_key_encoder
    monkeypatch.setattr(MoCo, "update_key_encoder", lambda self: (calls.append(1), update(self)))
    module = make_module()
    module.accumulate = 3
    batches = make_batches(make_views(16, steps=7), 1, 0, True, False)
    train(module, batches, accumulate_grad_batches=3)
    assert len(calls) == 3  # batches 0-2, 3-5 and the rest
    assert int(module.queue.num_enqueued) == 7 * 16


def test_a_shorter_last_window_is_divided_by_its_own_length():
    """4 batches, 3 to a step: the second step has one batch and the whole of its gradient."""
    batches = make_batches(make_views(16, steps=4), 1, 0, True, False)
    before, found = [], []

    class Look(Recorder):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            before.append(copy.deepcopy(module.state_dict()))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            found.append([p.grad.clone() for p in module.query_encoder.parameters()])

    module = make_module()
    module.accumulate = 3
    train(module, batches, recorder=Look(), accumulate_grad_batches=3)
    for step, window in enumerate((range(3), range(3, 4))):
        expected = []
        for number in window:
            alone = make_module()
            alone.load_state_dict(before[number])
            if number % 3:  # the key encoder moves with the first batch of a step
                alone.update_key_encoder = lambda: None
            alone.training_step(batches[number], 0).backward()
            expected.append([p.grad for p in alone.query_encoder.parameters()])
        for gradient, *parts in zip(found[step], *expected, strict=True):
            torch.testing.assert_close(gradient, sum(parts) / len(parts))


def _masks_on_rank() -> list:
    """Return what a dropout in front of the query head keeps in each batch."""
    rank, world = as_rank()
    module, masks, dropout = make_module(), [], nn.Dropout()
    dropout.register_forward_hook(lambda _, given, out: masks.append((out != 0).numpy()))
    module.query_encoder.head = nn.Sequential(dropout, module.query_encoder.head)
    train(module, make_batches(make_views(16, steps=2), world, rank, True, False), world)
    return masks


def test_masks_belong_to_the_seed_the_step_the_batch_and_the_rank(monkeypatch):
    module, drawn = make_module(), {}
    module.optimizers = lambda **_: SimpleNamespace(param_groups=[])
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    for place in [*places, *places]:
        module.seed, step, batch, number = place
        monkeypatch.setattr(pretrain, "rank", lambda number=number: number)
        monkeypatch.setattr(MoCo, "global_step", step)
        module.on_train_batch_start(None, batch)
        drawn.setdefault(place, []).append(torch.rand(3).tolist())
    assert all(first == again for first, again in drawn.values())
    assert len({tuple(first) for first, _ in drawn.values()}) == len(places)


def test_each_rank_and_each_batch_draws_its_own_masks(two_ranks):
    ranks = two_ranks.run(_masks_on_rank)
    first, other = ranks
    again, _ = two_ranks.run(_masks_on_rank)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for one, two in (*zip(first, other, strict=True), first, other):
        assert 0.3 < (one == two).mean() < 0.7


def test_golden_losses():
    """Renewed only on purpose: a refactor must not move them."""
    losses = train(make_module(), make_batches(make_views(16), 1, 0, True, False))
    assert losses == pytest.approx(GOLDEN, abs=1e-6)


GOLDEN = [
    1.2420223, 2.3680872, 3.0212992, 3.0722538, 3.1201201,
    2.9679018, 2.7539117, 3.0368838, 2.3748526, 2.7998279,
]  # fmt: skip
