"""Resident sets: all images at once, the bad ones among them, and what they would take."""

import os
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import save
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from moco.config import DataConfig, UserError
from moco.images import resident, sources
from moco.images.bad_files import without_bad
from moco.images.decode import read_header
from moco.images.formats import shown
from moco.images.image_source import ImageSource
from moco.images.loader import PretrainData
from moco.images.resident import MixedSizes, estimate_bytes, load_all, make_resident

RNG = np.random.default_rng(0)


def folder(root: Path, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


def test_load_all_equals_reading_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "FILES_PER_TASK", 4)
    for number in range(11):
        Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(
            tmp_path / f"{number:02}.png"
        )
    for number in (0, 7):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    source = sources.open_source(folder(tmp_path), "train")
    images, bad = load_all(source)
    assert bad == [(0, "is empty"), (7, "is empty")]
    assert images.shape == (11, 3, 6, 5) and images.dtype == torch.uint8
    good = [index for index in range(11) if index not in (0, 7)]
    assert all(torch.equal(images[index], source.read(index)) for index in good)
    kept = without_bad(source, bad, 0.2, None)
    assert torch.equal(load_all(kept)[0], images[good])


def test_load_all_without_a_good_image_and_of_arrays(tmp_path):
    (tmp_path / "a.png").touch()
    source = sources.open_source(folder(tmp_path), "train")
    assert load_all(source) == (None, [(0, "is empty")])
    digits = sources.open_source(DataConfig(dataset="digits", channels=1), "train")
    assert load_all(digits) == (digits.images, [])


def test_mixed_sizes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "FILES_PER_TASK", 2)
    for number in range(8):
        save(tmp_path / f"{number}.png", size=(4, 9) if number in (5, 7) else (4, 4))
    source = sources.open_source(folder(tmp_path), "train")
    with pytest.raises(MixedSizes, match=r"5.png has \(4, 9\) pixels .* have \(4, 4\)"):
        load_all(source)
    num_bytes, sizes = estimate_bytes(source)
    assert num_bytes == 3 * (6 * 16 + 2 * 36) and set(sizes) == {(4, 4), (4, 9)}
    assert source.read(5).shape == (3, 4, 9)


def test_estimate_bytes(tmp_path):
    for number in range(10):
        save(tmp_path / f"{number}.png", size=(4, 6))
    (tmp_path / "0.png").write_bytes(b"")
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert estimate_bytes(source, samples=5) == (10 * 24, [(4, 6)] * 4)
    digits = sources.open_source(DataConfig(dataset="digits", channels=3), "train")
    assert estimate_bytes(digits) == (1257 * 3 * 64, [(8, 8)])


def test_images_smaller_than_the_views_are_refused_or_told_where_sizes_are_mixed(tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    for number in range(9):
        save(tmp_path / f"{number}.png", size=(3, 3) if number < 5 else (40, 50 + number))
    data = folder(tmp_path, channels=1, image_size=32)
    cpu = torch.device("cpu")
    source = sources.open_source(data, "train")
    with pytest.raises(
        UserError, match=r"above 5 of 9 images', 3 pixels: allow .*data.upscale 10.67$"
    ):
        make_resident(source, data, cpu, None)
    assert make_resident(source, folder(tmp_path, upscale=11, image_size=32), cpu, None)
    save(tmp_path / "4.png", size=(33, 32))
    assert make_resident(source, data, cpu, None)[1] == "streamed"
    lines = [line for line in caplog.messages if "smaller than the views of 32 pixels" in line]
    assert len(lines) == 1 and "4 of 9 images" in lines[0] and "the smallest from 3" in lines[0]


def test_check_files_thresholds(tmp_path):
    labels = torch.arange(10) % 2
    paths = [f"/images/{number}.png" for number in range(10)]
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)  # all were read: no other is looked for
    source = ImageSource("folder /images", images, paths, labels, ["a", "b"], 3)
    report = tmp_path / "bad_files.txt"
    assert without_bad(source, [], 0.0, str(report)) is source and not report.exists()
    bad = [(1, "is empty"), (4, "truncated")]
    kept = without_bad(source, bad, 0.2, str(report))
    assert report.read_text() == "/images/1.png\tis empty\n/images/4.png\ttruncated\n"
    assert kept.paths == [path for path in paths if path[8] not in "14"]
    assert kept.labels.tolist() == [0, 0, 1, 1, 0, 1, 0, 1] and kept.classes == ["a", "b"]
    message = (
        r"2 of 10 images of folder /images \(20 %\).*1.png: is empty.*bad_files.*max_bad_fraction"
    )
    with pytest.raises(UserError, match=message) as caught:
        without_bad(source, bad, 0.19, str(report))
    assert "\n" not in str(caught.value) and len(source) == 10
    with pytest.raises(UserError, match=r"10 of 10"):
        without_bad(source, [(index, "is empty") for index in range(10)], 1.0, None)


def test_real_photographs_decode(tmp_path):
    if "MOCO_TEST_IMAGES" not in os.environ:
        pytest.skip("MOCO_TEST_IMAGES names no folder of real images")
    folder_of_sets = Path(os.environ["MOCO_TEST_IMAGES"])
    with tarfile.open(folder_of_sets / "imagenet-sample-250.tar") as archive:
        members = [member for member in archive.getmembers() if member.isfile()][::6]
        archive.extractall(tmp_path, members=members, filter="data")
    source = sources.open_source(folder(tmp_path), "train")
    assert len(source) == len(members) > 20 and source.labels is None
    for index, path in enumerate(source.paths):
        image = source.read(index)
        assert image.shape == (3, *read_header(path)[:2]) and image.float().std() > 5
    with pytest.raises(MixedSizes):
        load_all(source)


def test_names_in_any_encoding_work(tmp_path):
    name = os.fsdecode(b"\xff\tline\nbreak.png")
    try:
        save(tmp_path / "a.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses the name")
    (tmp_path / os.fsdecode(b"\xfe.png")).write_text("broken")
    save(tmp_path / "good.png")
    source = sources.open_source(folder(tmp_path), "train")
    images, bad = load_all(source)
    assert len(images) == 3 and len(bad) == 1
    report = tmp_path / "bad_files.txt"
    assert len(without_bad(source, bad, 0.5, str(report))) == 2
    assert report.read_bytes() == bytes(tmp_path) + b"/\xfe.png\tis no image of a known format\n"
    with pytest.raises(UserError, match=r"\\xfe.png") as caught:
        without_bad(source, bad, 0.0, None)
    str(caught.value).encode()  # printable anywhere
    assert shown(name) == "\\xff\\tline\\nbreak.png"


@pytest.mark.parametrize("where", ["memory", "off"])
def test_a_set_of_one_value_is_warned_of(tmp_path, caplog, where):
    caplog.set_level("INFO", logger="moco")
    for number in range(6):
        save(tmp_path / f"{number}.png", size=(8, 8))
    config = folder(tmp_path, channels=1, image_size=8, batch_size=2, resident=where, views="cifar")
    for count in (1, 0):
        caplog.clear()
        data = PretrainData(config, seed=0, shuffle=False, symmetric=False)
        data.prepare(torch.device("cpu"))
        words = "warning: every pixel of the 6 images looked at is 128: nothing can be learnt"
        assert sum(line.startswith(words) for line in caplog.messages) == count
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "5.png")


@pytest.mark.parametrize(
    ("wanted", "budget", "total", "place"),
    [
        ("auto", 1.0, 0, "device"),
        ("auto", 1e-6, 1 << 20, "device"),  # a quarter of the GPU holds them
        ("auto", 1e-6, 1 << 10, "memory"),
        ("device", 1e-6, 0, "device"),
        ("memory", 1.0, 1 << 20, "memory"),
    ],
)
def test_arrays_lie_on_a_gpu_that_has_room(monkeypatch, wanted, budget, total, place):
    """Here 192 KiB of them, and a pretended GPU."""
    gpu = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    settings = DataConfig(dataset="own", image_size=32, resident=wanted, resident_budget=budget)
    with FakeTensorMode(allow_non_fake_inputs=True):
        source = ImageSource("own", images, [], None, [], 3)
        source, found = make_resident(source, settings, torch.device("cuda"), None)
    assert found == place
    assert source.images.device.type == ("cuda" if place == "device" else "cpu")


def test_what_does_not_fit_on_a_gpu_is_said(monkeypatch):
    def full(*_) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    gpu = SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    source = ImageSource("own", torch.zeros(64, 3, 32, 32, dtype=torch.uint8), [], None, [], 3)
    settings = DataConfig(dataset="own", image_size=32, resident="device")
    with pytest.raises(UserError, match="data.resident is device, and 0.000183 GiB of images do"):
        make_resident(source, settings, torch.device("cuda"), None)
    left = replace(settings, resident="auto")
    assert make_resident(source, left, torch.device("cuda"), None) == (source, "memory")
