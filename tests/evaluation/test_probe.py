"""The linear probe and fine-tuning: against autograd and scikit-learn, on two ranks."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moco.checkpoints.matching import checksum
from moco.config import DataConfig, UserError
from moco.evaluation import finetune
from moco.evaluation.finetune import train_linear, train_whole
from moco.evaluation.labels import few_labels, hold_out
from moco.evaluation.probe import SWEEP, LinearProbe, RateResult, Stack, choose, rate_results
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData, RandomCrops
from moco.judge_config import LinearConfig

DATA = DataConfig(dataset="digits", channels=3, image_size=8, flip=0.5)
CPU = torch.device("cpu")


def blobs(count, dim=20, classes=4, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % classes
    noise = torch.randn(count, dim, generator=generator)
    # Features of very different scales, as networks have them.
    scale = torch.logspace(-2, 2, dim)
    return (centres[labels] + spread * noise) * scale + 3 * scale, labels


def images(count=70, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    pixels[torch.arange(count), labels] += 80  # each class has its colour
    pixels = pixels.to(torch.uint8)
    source = ImageSource("blobs train", pixels, [], labels, ["r", "g", "b"][:classes], 3)
    return LabelledData(source, DATA)


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    net = nn.Sequential(*layers)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def train_on(crops, net, rates, **settings):
    config = LinearConfig(**{"epochs": 2, "batch_size": 16, "milestones": [1]} | settings)
    return train_linear({"encoder": (net, rates)}, crops, config, CPU)["encoder"]


def fine_tune(net, crops, rate=0.1, epochs=3):
    config = LinearConfig(epochs=epochs, batch_size=16)
    return train_whole(net, crops, rate, config, CPU)


def fit_linear(net, rates=(3.0, 1.0), **settings):
    return train_on(RandomCrops(images(), 0.3, seed=1), net, rates, **settings)


def test_the_stack_takes_the_steps_of_autograd_and_torch_sgd():
    features, labels = blobs(24, classes=3)
    features = features / features.std(0)
    rates = (0.5, 0.01)
    stack = Stack(20, 3, rates, 0.9, CPU, initial_std=0.01, seed=3)
    for number, rate in enumerate(rates):
        layer = nn.Linear(20, 3)
        weight, bias = Stack(20, 3, rates, 0.9, CPU, 0.01, 3).classifier(number)
        layer.load_state_dict({"weight": weight, "bias": bias})
        optimiser = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        fresh = Stack(20, 3, rates, 0.9, CPU, 0.01, 3)
        for factor in (1.0, 0.7, 0.1):
            optimiser.param_groups[0]["lr"] = rate * factor
            loss = cross_entropy(layer(features), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses = fresh.backward(features, labels, len(labels)) / len(labels)
            fresh.update(factor)
            assert losses[number].item() == pytest.approx(loss.item(), rel=1e-5)
        weight, bias = fresh.classifier(number)
        assert torch.allclose(weight, layer.weight, atol=1e-6)
        assert torch.allclose(bias, layer.bias, atol=1e-6)
    assert stack.weight.std().item() == pytest.approx(0.01, rel=0.3) and not stack.bias.any()


def test_the_stack_equals_a_loop_in_numpy():
    rates = (0.5, 0.01, 7.0)
    torch.set_default_dtype(torch.float64)
    try:
        features, labels = blobs(24, classes=3)
        features = features / features.std(0)
        stack = Stack(20, 3, rates, 0.9, CPU, initial_std=0.01, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    x, y = features.numpy(), np.eye(3)[labels.numpy()]
    ws = [stack.classifier(n)[0].numpy() for n in range(3)]
    bs, vs, us = [np.zeros(3)] * 3, [np.zeros((3, 20))] * 3, [np.zeros(3)] * 3
    for factor, total in ((1.0, 24), (0.7, 24), (0.1, 30)):  # 30: six rows are on other ranks
        losses = stack.backward(features, labels, total)
        stack.update(factor)
        for n, rate in enumerate(rates):
            scores = np.exp(x @ ws[n].T + bs[n])
            p = scores / scores.sum(1, keepdims=True)
            assert losses[n].item() == pytest.approx(-np.log((p * y).sum(1)).sum(), rel=1e-12)
            vs[n] = 0.9 * vs[n] + (p - y).T @ x / total
            us[n] = 0.9 * us[n] + (p - y).sum(0) / total
            ws[n], bs[n] = ws[n] - rate * factor * vs[n], bs[n] - rate * factor * us[n]
    for n in range(3):
        weight, bias = stack.classifier(n)
        np.testing.assert_allclose(weight.numpy(), ws[n], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(bias.numpy(), bs[n], rtol=1e-10, atol=1e-12)


def test_the_probe_agrees_with_scikit_learn_at_its_best_c():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = blobs(3000, spread=1.5)
    queries, targets = blobs(4000, spread=1.5, seed=1)
    scaler = StandardScaler().fit(features)
    best = max(
        LogisticRegression(C=c, max_iter=300)
        .fit(scaler.transform(features), labels)
        .score(scaler.transform(queries), targets)
        for c in (0.001, 0.01, 0.1, 1, 10)
    )
    probe = LinearProbe(epochs=30, batch_size=256).fit(features, labels)
    found = (probe.predict(queries) == targets).double().mean().item()
    assert 0.6 < best < 0.99  # a task on which classifiers differ
    assert abs(found - best) < 0.005
    assert probe.weight.shape == (4, 20) and probe.rate in SWEEP


def test_the_rate_is_chosen_without_the_test_images_and_on_rows_not_trained_on():
    # Labels that only memory gets right: the held-out score of every rate is near chance.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 200, generator=generator)
    labels = torch.randint(0, 2, (60,), generator=generator)
    probe = LinearProbe((0.01, 1.0), epochs=60, batch_size=60, held_out=0.3).fit(features, labels)
    assert (probe.predict(features) == labels).all()
    assert all(result.held_out_top1 < 85 for result in probe.results)


def test_a_diverging_rate_is_reported_and_left_out():
    features, labels = blobs(400)
    probe = LinearProbe((0.1, 1e30, 1e38), epochs=5, batch_size=64).fit(features, labels)
    assert [result.diverged for result in probe.results] == [False, True, True]
    alone = LinearProbe((0.1,), epochs=5, batch_size=64).fit(features, labels)
    assert probe.rate == 0.1 and torch.equal(probe.weight, alone.weight)
    with pytest.raises(UserError, match=r"knows nothing \(1e\+30, 1e\+38\): they diverged, so"):
        LinearProbe((1e30, 1e38), epochs=3, batch_size=64).fit(features, labels)


def test_the_smaller_of_equal_rates_is_chosen():
    results = [RateResult(r, 0.5, 90.0, False) for r in (1.0, 0.1, 10.0)]
    assert choose([*results, RateResult(0.001, 0.5, 99.0, True)]) == 1
    assert rate_results([1.0], torch.tensor([math.nan]), None, 3)[0].diverged


def test_a_constant_feature_and_views_are_taken():
    features, labels = blobs(200)
    features = torch.cat([features, torch.full((200, 1), 7.0)], 1)
    probe = LinearProbe((0.1,), epochs=5).fit(torch.stack([features, features + 0.01]), labels)
    assert probe.weight.isfinite().all()
    assert (probe.predict(features) == labels).float().mean() > 0.5


def test_senseless_features_and_labels_are_errors():
    features, labels = blobs(40)
    with pytest.raises(UserError, match="one class"):
        LinearProbe(epochs=1).fit(features, torch.zeros(40, dtype=torch.int64))
    with pytest.raises(UserError, match="held out"):
        LinearProbe(epochs=1).fit(features[:4], labels[:4])
    features[3, 1] = float("inf")
    with pytest.raises(UserError, match="1 of 40"):
        LinearProbe(epochs=1).fit(features, labels)


def test_parts_keep_the_shares_of_the_classes():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2])
    held = hold_out(labels, 0.1, seed=0)
    assert torch.bincount(labels[held], minlength=3).tolist() == [10, 2, 0]
    assert not torch.equal(held, hold_out(labels, 0.1, seed=1))
    rows = few_labels(labels, 0.05, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [5, 1, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_the_backbone_stays_bit_identical_with_batch_norm():
    net = network().train()
    before = checksum(net)
    trained = fit_linear(net)
    assert checksum(net) == before
    assert trained.stack.weight.std() > 0.01  # it did learn
    net.train()(torch.randn(8, 3, 8, 8))
    assert checksum(net) != before  # what train mode would have done


def test_held_out_images_do_not_reach_the_trial():
    held = hold_out(images().source.labels, 0.2, seed=1)
    trained = fit_linear(network(), held_out=0.2)
    more = fit_linear(network(), held_out=0.4)
    assert torch.equal(trained.held, held) and more.held.sum() > held.sum()
    assert torch.equal(trained.stack.weight, more.stack.weight)
    assert not torch.allclose(trained.trial.weight, trained.stack.weight)
    assert not torch.allclose(trained.trial.weight, more.trial.weight)
    assert fit_linear(network(), rates=(3.0,)).trial is None
    # Other labels on the held-out images change the whole classifier, not the trial.
    crops = RandomCrops(images(), 0.3, seed=1)
    labels = crops.images.source.labels.clone()
    labels[held] = (labels[held] + 1) % 3
    crops.images.labels = lambda rows: labels[rows]
    other = train_on(crops, network(), (3.0, 1.0), held_out=0.2)
    assert torch.equal(other.trial.weight, trained.trial.weight)
    assert not torch.allclose(other.stack.weight, trained.stack.weight)


def test_the_trial_averages_over_the_images_that_it_sees():
    trained = fit_linear(network(), epochs=1, batch_size=70, held_out=0.4)
    crops = RandomCrops(images(), 0.3, seed=1)
    pixels, rows = next(crops.batches(0, [crops.order(0)], CPU))
    seen = ~trained.held[rows]
    stack = Stack(24, 3, (3.0, 1.0), 0.9, CPU, 0.01, seed=1)
    with torch.no_grad():
        features = network().eval()(pixels)[seen]
    stack.backward(features, crops.images.labels(rows)[seen], int(seen.sum()))
    stack.update(1.0)
    assert torch.allclose(trained.trial.weight, stack.weight, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_the_initial_weights():
    """A rate this small leaves the weights where they started."""
    starts = [
        train_on(RandomCrops(images(), 0.3, seed), network(), (1e-9,), epochs=1).stack.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(starts[0], starts[1])
    assert (starts[0] - starts[2]).abs().max() > 0.001


def test_the_rate_of_v3s_protocol_falls_along_a_cosine_epoch_by_epoch(monkeypatch):
    factors, step = [], finetune.Classifiers.step

    def watched(self, *arguments):
        factors.append(arguments[-1])
        step(self, *arguments)

    monkeypatch.setattr(finetune.Classifiers, "step", watched)
    train_on(RandomCrops(images(), 0.3, 0), network(), (0.1,), epochs=4, protocol="v3")
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [round(f, 12) for f in dict.fromkeys(factors)] == [round(f, 12) for f in cosine]


def test_milestones_divide_the_rate_by_ten():
    slow = fit_linear(network(), rates=(0.0001,), epochs=1)
    torch.manual_seed(0)
    start = Stack(24, 3, (1.0,), 0.9, CPU, 0.01, seed=1).weight
    crops = RandomCrops(images(), 0.3, seed=1)
    slower = train_on(crops, network(), (0.0001,), epochs=1, milestones=[0])
    ratio = (slow.stack.weight - start).norm() / (slower.stack.weight - start).norm()
    assert ratio.item() == pytest.approx(10, rel=0.02)


def fit_share():
    net = network().train()
    before = checksum(net)
    # 70 images in batches of 23: the last has one image, so that one of two ranks has none.
    trained = fit_linear(net, batch_size=23)
    weights = torch.cat([trained.stack.weight, trained.trial.weight])
    return weights, trained.losses, checksum(net) == before


def test_two_ranks_train_the_classifier_of_one(two_ranks):
    weight, losses, same = fit_share()
    assert same
    for other, other_losses, other_same in two_ranks.run(fit_share):
        assert other_same
        assert torch.allclose(other, weight, rtol=1e-4, atol=1e-5)
        assert torch.allclose(other_losses, losses, rtol=1e-4)


def finetune_share(batch_norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    net = network() if batch_norm else nn.Sequential(*layers)
    before = checksum(net)
    crops = RandomCrops(images(), 0.3, seed=1)
    model, result = fine_tune(net, crops)
    assert checksum(net) == before  # a copy was trained
    return checksum(model), [p.detach() for p in model.parameters()], result


def test_finetuning_learns_and_two_ranks_do_as_one(two_ranks):
    _, parameters, result = finetune_share(False)
    assert result.loss < 1.0 < math.log(3) and not result.diverged
    found = two_ranks.run(finetune_share, False)
    assert found[0][0] == found[1][0]
    for mine, other in zip(parameters, found[0][1], strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)
    assert found[0][2].loss == pytest.approx(result.loss, rel=1e-4)


def test_finetuned_ranks_end_alike_with_batch_norm(two_ranks):
    found = two_ranks.run(finetune_share, True)
    assert found[0][0] == found[1][0]


def test_too_few_labels_for_a_batch_norm_are_an_error():
    crops = RandomCrops(images(1), 0.3, seed=1)
    with pytest.raises(UserError, match="fewer than 2"):
        fine_tune(network(), crops)
