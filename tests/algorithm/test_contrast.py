"""Contrast: the loss against loops, the queue against a deque, and what must carry no gradient."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from moco.algorithm.contrast import KeyQueue, contrast_accuracy, info_nce


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, dim, generator=generator), dim=1)


def marked(first: int, count: int) -> torch.Tensor:
    """Keys that can be told apart: row i holds the number first + i."""
    return torch.arange(first, first + count).float()[:, None].expand(count, 3).contiguous()


def loop_info_nce(query, key, negatives, temperature):
    """The papers' Algorithm 1 for one query at a time, in double precision."""
    query, key, negatives = (t.numpy().astype(np.float64) for t in (query, key, negatives))
    losses, rows = [], []
    for q, k in zip(query, key, strict=True):
        row = [float(np.sum(q * k)) / temperature]
        row += [float(np.sum(q * n)) / temperature for n in negatives]
        losses.append(math.log(sum(math.exp(x) for x in row)) - row[0])
        rows.append(row)
    return sum(losses) / len(losses), np.array(rows)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_equals_a_loop(temperature):
    query, key, negatives = unit(6, 16, 1), unit(6, 16, 2), unit(37, 16, 3)
    loss, logits = info_nce(query, key, negatives, temperature)
    expected, rows = loop_info_nce(query, key, negatives, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(logits.numpy(), rows, atol=1e-5)


def test_equal_logits_cost_log_of_one_plus_k():
    same = unit(1, 8).expand(5, 8)
    loss, logits = info_nce(same, same, unit(1, 8).expand(99, 8), 0.07)
    assert logits.shape == (5, 100)
    assert loss.item() == pytest.approx(math.log(100), abs=1e-5)


def test_the_own_key_is_class_0():
    query = unit(4, 8)
    loss, logits = info_nce(query, query, -query, 0.01)
    assert loss.item() < 1e-6
    assert (logits.argmax(1) == 0).all()


def test_only_the_query_gets_a_gradient():
    queue = KeyQueue(12, 8)
    query, key = unit(4, 8, 1).requires_grad_(), unit(4, 8, 2)
    negatives = queue.snapshot()
    info_nce(query, key, negatives, 0.2)[0].backward()
    assert query.grad is not None and query.grad.abs().sum() > 0
    assert not negatives.requires_grad and key.grad is None
    assert list(queue.parameters()) == []


def test_the_gradient_is_that_of_the_softmax():
    query, key, negatives = unit(5, 8, 1).requires_grad_(), unit(5, 8, 2), unit(9, 8, 3)
    loss, logits = info_nce(query, key, negatives, 0.5)
    loss.backward()
    shares = logits.detach().softmax(1)  # N 1+K
    expected = ((shares[:, :1] - 1) * key + shares[:, 1:] @ negatives) / (0.5 * 5)
    torch.testing.assert_close(query.grad, expected, atol=1e-6, rtol=0)


def test_enqueued_keys_leave_their_graph_behind():
    queue = KeyQueue(8, 4)
    queue.enqueue(unit(3, 4).requires_grad_() * 1.0)
    assert not queue.keys.requires_grad and queue.keys.grad_fn is None


def test_arithmetic_is_fp32_inside_autocast():
    query, key, negatives = unit(8, 64, 1), unit(8, 64, 2), unit(100, 64, 3)
    plain = info_nce(query, key, negatives, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(query, key, negatives, 0.07)
    for a, b in zip(plain, inside, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def test_half_precision_inputs_are_raised_to_fp32():
    query, key, negatives = (unit(n, 64, n).bfloat16() for n in (8, 9, 100))
    loss, logits = info_nce(query, key[:8], negatives, 0.07)
    expected, rows = loop_info_nce(query.float(), key[:8].float(), negatives.float(), 0.07)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(logits.numpy(), rows, atol=1e-4)


def test_queue_starts_with_random_unit_keys():
    queue = KeyQueue(500, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(500))
    assert queue.keys.mean(0).abs().max() < 0.06  # 0.25 / sqrt(500) = 0.011 each
    again = KeyQueue(500, 16, torch.Generator().manual_seed(0))
    assert torch.equal(queue.keys, again.keys)
    assert not torch.equal(queue.keys, KeyQueue(500, 16, torch.Generator().manual_seed(1)).keys)


@pytest.mark.parametrize(
    "size, batches",
    [
        (12, [4] * 10),
        (10, [4] * 10),  # the batch does not divide the queue
        (7, [3, 1, 7, 2, 5, 6, 4, 1, 7, 7, 3]),  # ragged, and as large as the queue
        (1, [1, 1, 1]),
    ],
)
def test_queue_is_first_in_first_out(size, batches):
    queue, expected, written = KeyQueue(size, 3), deque(maxlen=size), 0
    for count in batches:
        queue.enqueue(marked(written, count))
        expected.extend(range(written, written + count))
        written += count
        kept = queue.keys[:, 0].long().tolist()
        if written >= size:
            assert sorted(kept) == sorted(expected)
        for place in range(max(0, written - size), written):
            assert kept[place % size] == place
        assert queue.num_enqueued.item() == written
        assert queue.fill().item() == pytest.approx(min(written / size, 1.0))


def test_snapshot_is_not_changed_by_enqueue():
    queue = KeyQueue(6, 3)
    snapshot = queue.snapshot()
    before = snapshot.clone()
    queue.enqueue(marked(1000, 6))
    assert torch.equal(snapshot, before)
    assert not torch.equal(queue.snapshot(), before)


def test_gradient_survives_an_enqueue_between_loss_and_backward():
    queue, key = KeyQueue(6, 3), unit(2, 3, 2)
    grads = []
    for moves in (False, True):
        query = unit(2, 3, 1).requires_grad_()
        loss, _ = info_nce(query, key, queue.snapshot(), 0.2)
        if moves:
            queue.enqueue(unit(6, 3, 5))
        loss.backward()
        grads.append(query.grad)
    assert torch.equal(*grads)


def test_enqueue_above_the_queue_is_refused():
    queue = KeyQueue(4, 3)
    before = queue.snapshot()
    with pytest.raises(ValueError, match=r"5 .*4.*queue_size"):
        queue.enqueue(marked(0, 5))
    assert torch.equal(queue.keys, before) and queue.num_enqueued == 0


def test_queue_takes_keys_of_another_precision():
    queue = KeyQueue(4, 3)
    queue.enqueue(marked(0, 2).bfloat16())
    assert queue.keys.dtype == torch.float32 and queue.keys[1, 0] == 1


def test_state_dict_continues_the_ring():
    queue = KeyQueue(5, 3)
    queue.enqueue(marked(0, 4))
    state = queue.state_dict()
    assert set(state) == {"keys", "num_enqueued"}
    other = KeyQueue(5, 3)
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    for ring in (queue, other):
        ring.enqueue(marked(4, 3))
    assert torch.equal(queue.keys, other.keys)
    assert queue.keys[:, 0].tolist() == [5, 6, 2, 3, 4]
    assert other.num_enqueued == 7


def test_contrast_accuracy_equals_a_loop():
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    first = five = 0
    for row in logits.tolist():
        better = sum(1 for other in row[1:] if other > row[0])
        first, five = first + (better == 0), five + (better < 5)
    top1, top5 = contrast_accuracy(logits)
    assert top1.item() == pytest.approx(first / 200)
    assert top5.item() == pytest.approx(five / 200)
    assert 0 < first < five < 200


def test_contrast_accuracy_counts_a_tie_as_found_and_takes_few_negatives():
    top1, top5 = contrast_accuracy(torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]]))
    assert (top1.item(), top5.item()) == (0.5, 1.0)
