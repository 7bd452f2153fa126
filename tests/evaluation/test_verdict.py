"""The verdict: its errors against closed forms and simulation, its sentence, its width."""

import json
import math

import pytest
import torch

from moco.evaluation.verdict import RAW_PIXELS, UNREAD, UNTRAINED, by_image, compare

STARTED = "the weights it started from"


def hits(right, count=1000, first=0):
    """Mark `right` of the images as right, from the first on."""
    found = torch.zeros(count, dtype=torch.int8)
    found[first : first + right] = 1
    return found


def judged(trained, count=1000, **options):
    """Compare networks by how many of the first images each of them has right."""
    names = {"untrained": UNTRAINED, "pixels": RAW_PIXELS, "started": STARTED}
    rest = options.pop("ten_labels", None), options.pop("void", "")
    baselines = {names[name]: [hits(n, count) for n in each] for name, each in options.items()}
    return compare("kNN", torch.arange(count) % 4, hits(trained, count), baselines, *rest)


def test_the_errors_of_one_network_and_of_a_pair_are_those_of_the_binomial_and_of_mcnemar():
    # 780 and 700 right of 1,000; 60 are right for the second alone, 140 for the first alone.
    found = compare("kNN", torch.arange(1000) % 10, hits(780), {RAW_PIXELS: [hits(700, first=140)]})
    row = found.baselines[0]
    assert found.trained.top1 == pytest.approx(78.0) and found.chance == pytest.approx(10.0)
    assert found.trained.error == pytest.approx(100 * math.sqrt(0.78 * 0.22 / 1000))  # 1.3
    assert row.error == pytest.approx(100 * math.sqrt(0.7 * 0.3 / 1000))
    assert row.ahead == pytest.approx(8.0)
    # McNemar: (140 - 60) / sqrt(140 + 60) standard errors.
    assert row.ahead / row.ahead_error == pytest.approx((140 - 60) / math.sqrt(140 + 60))


def test_the_spread_among_draws_enters_as_that_of_a_further_draw():
    found = judged(900, untrained=[500, 520, 570])
    row = found.baselines[0]
    spread = torch.tensor([50.0, 52.0, 57.0]).std().item()
    # A hit less the mean hit: 0 for the first 500, 1/3 for 20, 2/3 for 50, 1 for 330 images.
    of_images = 100**2 * (20 / 9 + 50 * 4 / 9 + 330) / 1000**2
    assert (row.top1, row.ahead) == (pytest.approx(53.0), pytest.approx(37.0))
    assert row.draws == pytest.approx((50.0, 52.0, 57.0)) and row.spread == pytest.approx(spread)
    assert row.ahead_error == pytest.approx(math.sqrt(of_images + spread**2 * (1 + 1 / 3)))


def test_images_that_one_network_could_not_read_count_for_none():
    trained, pixels = hits(6, 10), hits(3, 10)
    trained[0], pixels[9] = UNREAD, UNREAD
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
    found = compare("kNN", labels, trained, {RAW_PIXELS: [pixels]})
    assert (found.images, found.chance) == (8, 62.5)
    assert (found.trained.top1, found.baselines[0].top1) == (62.5, 25.0)


def test_answers_are_put_in_the_order_of_the_images():
    found = by_image(torch.tensor([True, False, True]), torch.tensor([4, 0, 2]), 5)
    assert found.tolist() == [0, UNREAD, 1, UNREAD, 1] and found.dtype == torch.int8


@pytest.mark.parametrize(
    "draws,skill,least,most",
    [(1, 0.0, 1, 4), (3, 0.0, 0, 2.5), (3, 0.4, 6, 12), (5, 0.4, 3.5, 9), (10, 0.4, 1.5, 6)],
)
def test_where_nothing_was_learnt_the_verdict_is_rarely_better(draws, skill, least, most):
    """Networks that differ by chance alone: the share of verdicts in percent, in 1,000 trials."""
    generator = torch.Generator().manual_seed(draws)
    labels, better = torch.arange(1000) % 10, 0
    for _ in range(1000):
        hardness = torch.randn(1000, generator=generator)
        skills = skill * torch.randn(draws + 1, 1, generator=generator)
        chances = torch.sigmoid(0.4 + hardness + skills)
        found = (torch.rand(chances.shape, generator=generator) < chances).to(torch.int8)
        comparison = compare("kNN", labels, found[0], {UNTRAINED: list(found[1:])})
        better += comparison.baselines[0].side > 0
    assert least <= better / 10 <= most


@pytest.mark.parametrize("gain,least,most", [(0.0, 0, 5), (0.3, 30, 80), (1.0, 99, 100)])
def test_what_was_learnt_is_found_where_images_can_show_it(gain, least, most):
    """The first network has 0, 3 or 11 points more than the second, on 1,000 images."""
    generator = torch.Generator().manual_seed(7)
    labels, better = torch.arange(1000) % 10, 0
    for _ in range(400):
        chances = torch.sigmoid(
            3 * torch.randn(1000, generator=generator) + torch.tensor([[gain], [0]])
        )
        found = (torch.rand(chances.shape, generator=generator) < chances).to(torch.int8)
        better += bool(compare("kNN", labels, found[0], {RAW_PIXELS: [found[1]]}).is_better)
    assert least <= better / 4 <= most


SENTENCES = {
    "Better than the untrained networks and raw pixels by more than chance.": (
        judged(800, untrained=[500, 510, 520], pixels=[600]), True,
    ),
    "Better than an untrained network and raw pixels by more than chance (one draw of weights: "
    "others may differ by some points).": (judged(800, untrained=[500], pixels=[600]), True),
    "Better than the weights it started from, an untrained network and raw pixels by more than": (
        judged(800, started=[700], untrained=[600], pixels=[600]), True,
    ),
    "Not better than raw pixels by more than chance, better than the untrained networks: train "
    "longer": (judged(800, untrained=[500, 510, 520], pixels=[800]), False),
    "Worse than raw pixels, not better than the untrained networks by more than chance: train": (
        judged(500, untrained=[500, 510, 520], pixels=[800]), False,
    ),
    "Not better than raw pixels by more than chance, better than the untrained networks: train "
    "longer (trainer.max_epochs), and see that the views keep what tells the classes apart "
    "(data.crop_min, data.jitter); with ten labels of each class it has 93.0, raw pixels 87.2.": (
        judged(800, untrained=[500, 510, 520], pixels=[800], ten_labels=(93.0, 87.2)), False,
    ),
    "Not better than the untrained networks by more than chance: 3 untrained networks differ by "
    "4.0 points, so draw more (evaluation takes --untrained_draws 12).": (
        judged(960, untrained=[910, 940, 950]), False,
    ),
    "Not better than raw pixels by more than chance: score 1.4 times as many test images.": (
        judged(803, pixels=[800]), False,
    ),
    "Worse than raw pixels, not better than the untrained networks by more than chance: train "
    "longer (trainer": (judged(803, untrained=[800, 800, 800], pixels=[900]), False),
    "Not better than naming the largest class every time: train longer": (
        judged(255, untrained=[100, 110], pixels=[100]), False,
    ),
    "No verdict: the learning rate diverged.": (
        judged(800, pixels=[600], void="the learning rate diverged"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_sentence_of_each_case(sentence):
    comparison, is_better = SENTENCES[sentence]
    assert comparison.sentence().startswith(sentence)
    assert comparison.is_better is is_better


def test_what_was_found_is_told_ahead_of_general_advice():
    comparison = judged(800, pixels=[800])
    assert comparison.sentence(["the embeddings have collapsed", "the queue is long"]).startswith(
        "Not better than raw pixels by more than chance: the embeddings have collapsed; the queue "
        "is long; train longer "
    )
    assert "collapsed" not in judged(800, pixels=[500]).sentence(["collapsed"])


def test_few_labels_that_chance_may_have_favoured_are_not_told():
    comparison = judged(800, pixels=[800], ten_labels=(88.0, 87.0))
    assert "ten labels" not in comparison.sentence()


def test_a_table_fits_60_columns_whatever_its_numbers():
    images = 1_281_167
    draws = [hits(images, images), hits(0, images)] * 500
    widest = compare("kNN (k 10000)", torch.zeros(images).long(), hits(0, images), {
        UNTRAINED: draws[:2], RAW_PIXELS: [hits(images, images)], STARTED: [hits(3, images)],
    })  # fmt: skip
    for comparison in (widest, judged(2, 2, untrained=[0], pixels=[1]), judged(1, 3, void="no")):
        findings = [f"take --an-option-that-is-long {n} and a data.setting" for n in range(9)]
        lines = comparison.lines(findings)
        assert max(map(len, lines)) <= 60, lines
        told = lines[len(comparison.table()) :]
        assert " ".join(told) == comparison.sentence(findings), "no option is cut in two"
    table = judged(976, untrained=[909, 937, 948], pixels=[970]).table()
    assert [line.rstrip() for line in table] == [
        "kNN, 1,000 test images          top-1       ahead by",
        "  trained                        97.6 ± 0.5",
        "  untrained, mean of 3 draws     93.1 ± 1.4     +4.5 ± 2.4",
        "  raw pixels                     97.0 ± 0.5     +0.6 ± 0.2",
        "  the largest class every time   25.0",
    ]


def test_the_comparison_as_plain_values():
    found = judged(800, untrained=[500, 520], pixels=[600]).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["trained"] == {"top1": 80.0, "standard_error": 1.26, "draws": 1}
    assert found["untrained"]["top1"] == 51.0 and found["untrained"]["draws"] == 2
    assert found["untrained"]["top1_of_draws"] == [50.0, 52.0]
    assert found["raw_pixels"]["ahead_by"] == 20.0
    assert found["is_better"] is True and found["sentence"].startswith("Better than")
