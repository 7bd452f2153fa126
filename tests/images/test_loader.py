"""Loaders: order, shards, mid-epoch starts; resident and streamed; the key shuffle; evaluation
batches.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import write_classes
from PIL import Image

from moco import distributed
from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.decode import decode
from moco.images.labelled import LabelledData, RandomCrops, open_data
from moco.images.loader import PretrainData
from moco.images.steps import StepLoader
from moco.random import permutation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


def make_data(folder, shuffle=True, symmetric=False, **changes) -> PretrainData:
    config = DataConfig(
        **{"root": str(folder), "image_size": 16, "batch_size": 8, "num_workers": 0} | changes
    )
    data = PretrainData(config, seed=3, shuffle=shuffle, symmetric=symmetric)
    data.prepare(CPU)
    return data


def take(data, position=0, count=None):
    """The loader's batches from `position` batches into the run."""
    return list(StepLoader(data, lambda: position))[:count]


def test_an_epoch_shows_every_image_of_its_full_batches_once(folder):
    data = make_data(folder)
    first, second = take(data, 0), take(data, 5)
    assert len(first) == len(second) == data.steps_per_epoch == 5
    for epoch, batches in enumerate((first, second)):
        indices = torch.cat([b.index for b in batches])
        assert sorted(indices.tolist()) == list(range(40))
        assert indices.equal(permutation(3, "order", epoch, 40)), "or no older run resumes exactly"
        assert [b.step for b in batches] == [5 * epoch + i for i in range(5)]
    assert not torch.cat([b.index for b in first]).equal(torch.cat([b.index for b in second]))


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_a_loader_that_starts_mid_epoch_continues_the_same_views(folder, resident):
    data = make_data(folder, resident=resident)
    whole = [data.on_after_batch_transfer(b, 0) for b in take(data, 5)]
    rest = [
        data.on_after_batch_transfer(b, 0) for b in take(make_data(folder, resident=resident), 8)
    ]
    assert len(rest) == 2
    for a, b in zip(whole[3:], rest, strict=True):
        assert a.query_views[0].equal(b.query_views[0])
        assert a.key_views[0].equal(b.key_views[0])
        assert a.key_order.equal(b.key_order)


def test_workers_do_not_change_the_views(folder):
    alone = make_data(folder, resident="off", num_workers=0)
    helped = make_data(folder, resident="off", num_workers=2)
    for a, b in zip(take(alone, 0), take(helped, 0), strict=True):
        assert a.crops.equal(b.crops)
        assert a.index.equal(b.index)


def test_streamed_views_equal_resident_ones_up_to_uint8_rounding(folder):
    held, streamed = make_data(folder, resident="memory"), make_data(folder, resident="off")
    assert streamed.source.images is None
    assert held.source.images.shape == (40, 3, 24, 20)
    for a, b in zip(take(held, 0, 2), take(streamed, 0, 2), strict=True):
        x, y = (d.on_after_batch_transfer(v, 0) for d, v in ((held, a), (streamed, b)))
        for first, second in (
            (x.query_views[0], y.query_views[0]),
            (x.key_views[0], y.key_views[0]),
        ):
            assert (first - second).abs().mean() < 0.02  # half a grey level is 0.009


def test_keys_are_the_other_views_in_shuffled_places(folder):
    plain, shuffled = make_data(folder, shuffle=False), make_data(folder, shuffle=True)
    batch = take(plain, 0, 1)[0]
    a, b = plain.on_after_batch_transfer(batch, 0), shuffled.on_after_batch_transfer(batch, 0)
    assert a.key_order is None
    assert a.query_views[0].equal(b.query_views[0])
    torch.testing.assert_close(b.key_views[0], a.key_views[0][b.key_order])
    assert not a.key_views[0].equal(a.query_views[0])


def test_symmetric_batches_swap_the_views(folder):
    data = make_data(folder, symmetric=True)
    batch = data.on_after_batch_transfer(take(data, 0, 1)[0], 0)
    assert len(batch.query_views) == len(batch.key_views) == 2
    for n in (0, 1):
        assert batch.key_views[n].equal(batch.query_views[1 - n][batch.key_order])


def _views_on_rank(root: str, resident: str, symmetric: bool):
    data = make_data(root, resident=resident, symmetric=symmetric)
    batch = data.on_after_batch_transfer(take(data, 0, 1)[0], 0)
    parts = [*batch.query_views, *batch.key_views]
    keys = [distributed.restore(v.flatten(1), batch.key_order) for v in batch.key_views]
    return [p.numpy() for p in parts], [k.numpy() for k in keys]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("resident", ["memory", "off"])
def test_two_ranks_make_the_views_of_one(two_ranks, folder, resident, symmetric):
    data = make_data(folder, shuffle=False, resident=resident, symmetric=symmetric)
    single = data.on_after_batch_transfer(take(data, 0, 1)[0], 0)
    (parts_0, keys_0), (parts_1, keys_1) = two_ranks.run(
        _views_on_rank, str(folder), resident, symmetric
    )
    for n, view in enumerate(single.query_views):
        both = np.concatenate([parts_0[n], parts_1[n]])
        np.testing.assert_allclose(both, view.numpy(), atol=1e-5)
    for n, view in enumerate(single.key_views):
        np.testing.assert_allclose(keys_0[n], view.flatten(1).numpy(), atol=1e-5)
        assert (keys_0[n] == keys_1[n]).all()


def test_unreadable_files_are_left_out_with_their_rows(folder, tmp_path, said):
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "train" / "cat" / "11.png").write_bytes(b"no image")
    data = make_data(root, max_bad_fraction=0.1)
    assert len(data.source) == len(data.source.images) == 39
    assert any("1 of 40 images" in line and "11.png: is no image" in line for line in said)
    for i in (0, 5, 38):
        assert data.source.images[i].equal(decode(data.source.paths[i], 3, data.source.reading))
    with pytest.raises(UserError, match="max_bad_fraction"):
        make_data(root)


def test_images_of_mixed_sizes_are_streamed(folder, tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    for i in range(12):
        Image.new("RGB", (20 + i, 24)).save(root / f"{i}.png")
    data = make_data(root, batch_size=4)
    assert data.source.images is None
    assert take(data, 0, 1)[0].crops.shape == (4, 2, 3, 16, 16)
    with pytest.raises(UserError, match="data.resident"):
        make_data(root, batch_size=4, resident="memory")


def test_views_larger_than_the_images_are_refused(folder):
    with pytest.raises(UserError, match="data.image_size 32 is above the images' 20 pixels"):
        make_data(folder, image_size=32)
    assert make_data(folder, image_size=32, upscale=1.6).source.images is not None


def test_evaluation_takes_every_image_once_in_order(folder):
    config = DataConfig(root=str(folder), image_size=16, num_workers=0)
    for source, count in zip(sources.open_labelled(config), (40, 10), strict=True):
        held, streamed = open_data(source, config, CPU, None), LabelledData(source, config)
        assert held.source.images is not None and streamed.source.images is None
        images, rows = (torch.cat(x) for x in zip(*held.batches(CPU, 7), strict=True))
        again, _ = (torch.cat(x) for x in zip(*streamed.batches(CPU, 7), strict=True))
        assert len(images) == len(again) == count
        assert held.labels(rows).tolist() == source.labels.tolist()
        assert (images - again).abs().mean() < 0.02


def test_unreadable_files_are_left_out_of_streamed_evaluation(folder, tmp_path, said):
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "train" / "cat" / "11.png").write_bytes(b"no image")
    (root / "train" / "cat" / "12.png").write_bytes(b"")
    config = DataConfig(root=str(root), image_size=16, num_workers=0, max_bad_fraction=0.1)
    bank, _ = sources.open_labelled(config)
    bad = [bank.paths.index(str(root / f"train/cat/{n}.png")) for n in (11, 12)]
    good = [row for row in range(40) if row not in bad]
    data = LabelledData(bank, config)
    assert torch.cat([rows for _, rows in data.batches(CPU, 7)]).tolist() == good
    assert (data.num_read, data.num_unread) == (38, 2)
    crops = RandomCrops(data, 0.2, 0)
    shares = [torch.arange(40)[:20], torch.tensor(bad), torch.arange(40)[20:]]
    images, rows = zip(*crops.batches(0, shares, CPU), strict=True)
    assert torch.cat(rows).tolist() == good and len(torch.cat(images)) == 38
    assert len(images) == 3 and images[1].shape == (0, 3, 16, 16)
    assert sum("11.png: is no image" in line for line in said) == 1
    known = LabelledData(bank, config).readable(CPU)
    assert known.source.paths == [bank.paths[row] for row in good] and known.num_unread == 2
    assert known.labels(torch.arange(38)).equal(bank.labels[good])


def _labels_on_rank(root: str):
    config = DataConfig(root=root, image_size=16, num_workers=0)
    data = LabelledData(sources.open_labelled(config)[1], config)
    return torch.cat([data.labels(rows) for _, rows in data.batches(CPU, 3)]).tolist()


def test_two_ranks_share_the_evaluation_without_repeats(two_ranks, folder):
    first, second = two_ranks.run(_labels_on_rank, str(folder))
    assert len(first) + len(second) == 10
    assert sorted(first + second) == [0] * 5 + [1] * 5


def _refused_on_rank(root: str, most: float, crops: bool = False) -> str:
    config = DataConfig(root=root, image_size=16, num_workers=0, max_bad_fraction=most)
    data = LabelledData(sources.open_labelled(config)[0], config)
    batches = data.batches(CPU, 20)
    if crops:
        batches = RandomCrops(data, 0.2, 0).batches(0, [torch.arange(40)], CPU)
    try:
        return str([len(rows) for _, rows in batches] + [data.num_unread])
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("crops", [False, True])
def test_a_file_that_one_rank_cannot_read_is_told_on_both(two_ranks, folder, tmp_path, crops):
    root = shutil.copytree(folder, tmp_path / "copy")
    (root / "train" / "cat" / "11.png").write_bytes(b"no image")
    counts = two_ranks.run(_refused_on_rank, str(root), 0.1, crops)
    assert sorted(counts) == ["[19, 1]", "[20, 1]"]
    first, second = two_ranks.run(_refused_on_rank, str(root), 0.0, crops)
    assert first == second and "11.png: is no image" in first and "1 of 40 images" in first


def test_a_batch_above_the_set_is_refused(folder):
    with pytest.raises(UserError, match="data.batch_size 41 is above the 40 images"):
        make_data(folder, batch_size=41)


def test_a_gpu_is_at_most_some_steps_behind_the_loader(monkeypatch):
    """Each batch that waits there takes its memory."""

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append((self.number, len(begun)))

    waited, begun = [], []
    stream = SimpleNamespace(record_event=lambda: begun.append(Event(len(begun))) or begun[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    loader = StepLoader(SimpleNamespace(device="cuda"), lambda: 0)
    loader._stay_close()
    assert not begun, "images that are resident take no memory"
    loader._stream = stream
    for _ in range(6):
        loader._stay_close()
    assert waited == [(0, 4), (1, 5), (2, 6)]
