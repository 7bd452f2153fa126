"""Sources: real small files in every format, broken ones, odd trees, and what the user is told."""

import hashlib
import os
import pickle
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.sources import BadImage, ImageSource, MixedSizes

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # H W C


def folder(root: Path, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


def save(path: Path, size: tuple[int, int] = (4, 4), value: int | None = None) -> Path:
    """Write a grey image of one value, random if not given, in the format of the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = int(RNG.integers(0, 256)) if value is None else value
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def tiff(path: Path, array: np.ndarray, order: str = "<") -> Path:
    """Write H W C as an uncompressed TIFF whose bands beyond RGB are of no stated meaning."""
    height, width, bands = array.shape
    bits, offset = 8 * array.itemsize, 8 + 2 * bands
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 2)]
    tags += [(273, 4, 0), (277, 3, bands), (278, 3, height), (279, 4, array.nbytes)]
    tags += [(338, 3, 0)] if bands == 4 else []
    data = offset + 2 + 12 * len(tags) + 4
    rows = b""
    for tag, kind, value in tags:
        value, count = (data if tag == 273 else value), (bands if tag == 258 else 1)
        if tag == 258 and bands > 2:
            rows += struct.pack(order + "HHII", tag, kind, count, 8)
        else:
            rows += struct.pack(
                order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, count, value
            )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", offset)
    pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    depth = struct.pack(order + "H", bits) * bands
    count = struct.pack(order + "H", len(tags))
    path.write_bytes(head + depth + count + rows + bytes(4) + pixels)
    return path


def bomb(path: Path) -> Path:
    """Write a PNG of 70 bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def expect(pixels: np.ndarray) -> torch.Tensor:
    """H W C as the C H W tensor that decode should give."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


# Decoding


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "TIFF", "webp", "ppm"])
def test_lossless_formats_are_pixel_exact(tmp_path, extension):
    path = str(tmp_path / f"a.{extension}")
    options = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(RGB).save(path, **options)
    image = sources.decode(path, 3, 65535)
    assert image.dtype == torch.uint8 and image.permute(1, 2, 0).is_contiguous()
    assert torch.equal(image, expect(RGB))
    assert sources.image_size(path) == (5, 7)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "gif", "pgm", "pbm"])
def test_other_formats_equal_pillow(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    mode = {"gif": "P", "pgm": "L", "pbm": "1"}.get(extension, "RGB")
    Image.fromarray(RGB).convert(mode).save(path)
    wanted = np.array(Image.open(path).convert("RGB"))
    assert torch.equal(sources.decode(str(path), 3, 65535), expect(wanted))
    grey = np.array(Image.open(path).convert("L"))[..., None]
    assert torch.equal(sources.decode(str(path), 1, 65535), expect(grey))


def test_palette_with_transparency_gives_its_colours(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]], np.uint8)
    palette.save(tmp_path / "p.png", transparency=bytes([255, 0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sources.decode(str(tmp_path / "p.png"), 3, 65535), expect(colours))
        rgba = sources.decode(str(tmp_path / "p.png"), 4, 65535)
    assert torch.equal(rgba[:3], expect(colours))
    assert rgba[3].tolist() == [[255, 0], [128, 0]]


def test_alpha_is_dropped_for_rgb_and_kept_for_four_channels(tmp_path):
    rgba = np.dstack([RGB, RNG.integers(0, 256, (5, 7), dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert torch.equal(sources.decode(str(tmp_path / "a.png"), 3, 65535), expect(RGB))
    assert torch.equal(sources.decode(str(tmp_path / "a.png"), 4, 65535), expect(rgba))
    Image.fromarray(rgba[..., 2:]).save(tmp_path / "la.png")
    grey = np.repeat(RGB[..., 2:], 3, axis=2)
    assert torch.equal(sources.decode(str(tmp_path / "la.png"), 3, 65535), expect(grey))
    assert torch.equal(sources.decode(str(tmp_path / "la.png"), 2, 65535), expect(rgba[..., 2:]))


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg")
    wanted = np.array(Image.open(tmp_path / "a.jpg").convert("RGB"))
    assert torch.equal(sources.decode(str(tmp_path / "a.jpg"), 3, 65535), expect(wanted))


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_rounded_and_clipped(tmp_path, extension):
    values = np.array([[0, 1000, 2000], [4000, 4095, 65535]], np.uint16)
    path = str(tmp_path / f"a.{extension}")
    Image.fromarray(values).save(path)
    wanted = [[0, 62, 125], [249, 255, 255]]  # rint(v * 255 / 4095), clipped
    image = sources.decode(path, 3, 4095)
    assert image.shape == (3, 2, 3) and all(band.tolist() == wanted for band in image)
    assert sources.decode(path, 1, 65535)[0].tolist() == [[0, 4, 8], [16, 16, 255]]


def test_maximum_named_by_a_pgm_is_applied_once(tmp_path):
    body = np.array([0, 2048, 4095], ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + body)
    for max_value in (4095, 65535):
        assert sources.decode(str(tmp_path / "a.pgm"), 1, max_value).flatten().tolist() == [
            0,
            128,
            255,
        ]


def test_32_bit_and_float_tiff(tmp_path):
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.array([[0, 500, 1000, -3]], dtype)).save(tmp_path / "a.tif")
        assert sources.decode(str(tmp_path / "a.tif"), 1, 1000).flatten().tolist() == [
            0,
            128,
            255,
            0,
        ]


def test_16_bit_colour_png_refuses_a_maximum_that_pillow_would_lose(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    pixel = struct.pack(">BHHH", 0, 65535, 0x1234, 0)
    data = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert sources.decode(str(tmp_path / "a.png"), 3, 65535).flatten().tolist() == [255, 0x12, 0]
    with pytest.raises(BadImage, match=r"cuts to 8"):
        sources.decode(str(tmp_path / "a.png"), 3, 4095)


def test_exif_orientation_is_not_applied_and_gif_gives_its_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(sources.decode(str(tmp_path / "a.png"), 3, 65535), expect(RGB))
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert sources.decode(str(tmp_path / "a.gif"), 1, 65535).flatten().tolist() == [10] * 4


@pytest.mark.parametrize("layout", ["HWC", "CHW", "fortran"])
def test_npy_of_many_bands_in_either_layout(tmp_path, layout):
    array = RNG.integers(0, 256, (20, 16, 13), dtype=np.uint8)
    stored = {"HWC": array, "CHW": array.transpose(2, 0, 1), "fortran": np.asfortranarray(array)}
    np.save(tmp_path / "a.npy", stored[layout])
    path = str(tmp_path / "a.npy")
    assert torch.equal(sources.decode(path, 13, 65535), expect(array))
    assert sources.image_size(path, 13) == sources.image_size(path) == (20, 16)
    with pytest.raises(BadImage, match=r"has 13 bands: set --data.channels 13"):
        sources.decode(path, 3, 65535)


def test_npy_values(tmp_path):
    path = str(tmp_path / "a.npy")
    cases = [
        (np.array([[0, 0.5, 1.0, 1.2, -1, np.nan]], np.float32), [0, 128, 255, 255, 0, 0]),
        (np.array([[0, 500, 1000, 2000, 1, 3]], np.uint16), [0, 128, 255, 255, 0, 1]),
        (np.array([[True, False]]), [255, 0]),
    ]
    for array, wanted in cases:
        np.save(path, array)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a NaN must not reach the cast
            assert sources.decode(path, 1, 1000).flatten().tolist() == wanted
        assert sources.decode(path, 3, 1000)[2].flatten().tolist() == wanted
    np.save(path, np.full((4, 4), 255.0))
    with pytest.raises(BadImage, match=r"above 1"):
        sources.decode(path, 1, 65535)
    np.save(path, np.array([{}, None]), allow_pickle=True)
    with pytest.raises(BadImage):
        sources.decode(path, 1, 65535)
    np.save(path, RGB)
    grey = np.array(Image.fromarray(RGB).convert("L"))
    assert torch.equal(sources.decode(path, 1, 65535)[0], torch.from_numpy(grey))
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(BadImage):
        sources.image_size(path)


def test_many_band_tiff_names_what_to_set(tmp_path, caplog):
    path = str(tiff(tmp_path / "a.tif", np.zeros((4, 6, 13), np.uint16)))
    assert sources.image_size(path) == (4, 6)
    with pytest.raises(BadImage, match=r"a.tif: has 13 bands: set --data.channels 13$"):
        sources.decode(path, 3, 65535)
    with pytest.raises(BadImage, match=r"has 3 bands: set --data.channels 3"):
        sources.decode(str(tiff(tmp_path / "b.tif", RGB)), 13, 65535)
    assert not caplog.records


@pytest.mark.parametrize("order", ["<", ">"])
def test_many_band_tiff_through_tifffile(tmp_path, order):
    deep = RNG.integers(0, 10_000, (4, 6, 13), dtype=np.uint16)
    path = str(tiff(tmp_path / "a.tif", deep, order))
    wanted = expect(np.rint(deep * (255 / 10_000)).astype(np.uint8))
    assert torch.equal(sources.decode(path, 13, 10_000), wanted)
    path = str(tiff(tmp_path / "b.tif", deep[..., :3], order))
    assert torch.equal(sources.decode(path, 3, 10_000), wanted[:3])
    near_infrared = np.dstack([RGB, RGB[..., :1]])  # Pillow alone would make it an opaque alpha
    path = str(tiff(tmp_path / "c.tif", near_infrared, order))
    assert torch.equal(sources.decode(path, 4, 65535), expect(near_infrared))


@pytest.mark.parametrize("broken", ["truncated.jpg", "truncated.png", "truncated.npy"])
def test_truncated_files_are_bad(tmp_path, broken):
    path = tmp_path / broken
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.save(path, noise) if path.suffix == ".npy" else Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match=f"{broken}: cannot be decoded"):
        sources.decode(str(path), 3, 65535)


def test_empty_foreign_missing_and_huge_files_are_bad(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "ghost.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    (tmp_path / "short.tif").write_bytes(b"II*\0\x08")
    bomb(tmp_path / "bomb.png")
    flat = np.zeros((2, 2, 5), np.uint8)
    raw = tiff(tmp_path / "bomb.tif", flat).read_bytes()
    raw = raw.replace(struct.pack("<HHIH", 256, 3, 1, 2), struct.pack("<HHIH", 256, 3, 1, 65535))
    raw = raw.replace(struct.pack("<HHIH", 257, 3, 1, 2), struct.pack("<HHIH", 257, 3, 1, 65535))
    (tmp_path / "bomb.tif").write_bytes(raw)
    reasons = {
        "empty.png": "is empty",
        "text.jpg": "no image",
        "ghost.png": "no image",
        "short.tif": "cannot be decoded",
        "bomb.png": "pixels",
        "bomb.tif": "65535 x 65535 pixels, above the limit",
        "gone.png": "No such file",
    }
    for name, reason in reasons.items():
        for read in (lambda path: sources.decode(path, 3, 65535), sources.image_size):
            with pytest.raises(BadImage, match=f"{name}.*{reason}") as caught:
                read(str(tmp_path / name))
            assert "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)


# Data sets


def test_digits_are_scaled_and_split_the_same_way_every_time():
    data = DataConfig(dataset="digits", channels=1)
    train, test = sources.open_labelled(data)
    assert train.images.shape == (1257, 1, 8, 8) and test.images.shape == (540, 1, 8, 8)
    assert train.images.max() == 255 and len(train) == 1257
    again = sources.open_source(data, "test")
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)
    assert test.labels[:8].tolist() == [
        1,
        4,
        5,
        6,
        9,
        1,
        2,
        2,
    ]  # the split must never move: results depend on it
    counts = torch.bincount(test.labels) / (
        torch.bincount(train.labels) + torch.bincount(test.labels)
    )
    assert ((counts - 0.3).abs() < 0.01).all()  # stratified
    rgb = sources.open_source(DataConfig(dataset="digits", channels=3), "train")
    assert torch.equal(rgb.images, train.images.expand(-1, 3, -1, -1))
    assert torch.equal(rgb.read(5), rgb.images[5])
    with pytest.raises(UserError, match=r"data.channels is 4"):
        sources.open_source(DataConfig(dataset="digits", channels=4), "train")


def cifar(root: Path, kind: type, monkeypatch) -> np.ndarray:
    """Write CIFAR's files with four images each, and make theirs the checksums asked for."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    lists = {"train_list": [], "test_list": []}
    images = RNG.integers(0, 256, (4 * 6, 3072), dtype=np.uint8)
    label = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    names = [("train_list", n) for n, _ in kind.train_list] + [
        ("test_list", n) for n, _ in kind.test_list
    ]
    for number, (group, name) in enumerate(names):
        part = {"data": images[4 * number : 4 * number + 4], label: [0, 1, 2, number]}
        (base / name).write_bytes(pickle.dumps(part))
        lists[group].append([name, hashlib.md5((base / name).read_bytes()).hexdigest()])
    meta = {**kind.meta}
    (base / meta["filename"]).write_bytes(
        pickle.dumps({meta["key"]: [f"class {i}" for i in range(10)]})
    )
    meta["md5"] = hashlib.md5((base / meta["filename"]).read_bytes()).hexdigest()
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)
    return images.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("name, num_train", [("cifar10", 20), ("cifar100", 4)])
def test_cifar(tmp_path, monkeypatch, name, num_train):
    images = cifar(tmp_path, getattr(datasets, name.upper()), monkeypatch)
    train, test = sources.open_labelled(DataConfig(dataset=name, root=str(tmp_path)))
    assert torch.equal(train.images, torch.from_numpy(images[:num_train]))
    assert torch.equal(test.images, torch.from_numpy(images[num_train : num_train + 4]))
    assert test.labels.tolist() == [0, 1, 2, num_train // 4] and test.labels.dtype == torch.int64
    assert train.classes[3] == "class 3" and train.name == f"{name} train"
    with pytest.raises(UserError, match=r"data.channels is 1.*set it to 3"):
        sources.open_source(DataConfig(dataset=name, root=str(tmp_path), channels=1), "train")


def test_cifar_is_not_unpickled_when_a_checksum_differs(tmp_path, monkeypatch):
    cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    evil = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    evil.write_bytes(b"cos\nmkdir\n(S'" + os.fsencode(tmp_path / "pwned") + b"'\ntR.")
    with pytest.raises(UserError, match=r"data.root.*checksum.*--data.download true"):
        sources.open_source(DataConfig(dataset="cifar10", root=str(tmp_path)), "test")
    assert not (tmp_path / "pwned").exists()


def test_missing_cifar_names_path_and_remedy_and_a_failed_download_its_reason(
    tmp_path, monkeypatch
):
    data = DataConfig(dataset="cifar10", root=str(tmp_path))
    with pytest.raises(UserError, match=r"cifar-10-batches-py.data_batch_1.*--data.download true"):
        sources.open_source(data, "train")

    def offline(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    data.download = True
    with pytest.raises(UserError, match=r"cannot be fetched \(no route\\nto host\)"):
        sources.open_source(data, "train")


def test_stl10_trains_on_its_unlabelled_split(tmp_path, monkeypatch):
    base = tmp_path / "stl10_binary"
    base.mkdir()
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    images = {name: RNG.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
              for name, n in (("train", 3), ("test", 2), ("unlabeled", 4))}  # fmt: skip
    for name, array in images.items():
        array.tofile(base / f"{name}_X.bin")
    np.array([1, 10, 2], np.uint8).tofile(base / "train_y.bin")
    np.array([3, 1], np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    data = DataConfig(dataset="stl10", root=str(tmp_path))
    train = sources.open_source(data, "train")
    assert train.labels is None and len(train) == 4
    assert torch.equal(train.images, torch.from_numpy(images["unlabeled"]).transpose(2, 3))
    bank, queries = sources.open_labelled(data)
    assert bank.labels.tolist() == [0, 9, 1] and queries.labels.tolist() == [2, 0]
    assert torch.equal(queries.images, torch.from_numpy(images["test"]).transpose(2, 3))
    assert queries.classes == list("abcdefghij")
    assert torch.equal(sources.open_source(data, "test").labels, queries.labels)


# Folders


def relative(source: ImageSource, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in source.paths]


def test_flat_folder_is_unlabelled_sorted_and_ignores_hidden_and_foreign_files(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "__MACOSX/c.png", ".cache/d.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # would block whoever opens it
    os.mkfifo(tmp_path / ".cache/pipe.png")
    (tmp_path / "link to pipe.png").symlink_to(".cache/pipe.png")
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["a.jpg", "b.PNG"]
    assert source.labels is None and source.classes == [] and source.images is None
    assert sources.open_source(folder(tmp_path), "test") is None
    assert sources.open_labelled(folder(tmp_path)) is None


def test_subfolders_are_labels_unless_mixed_or_single(tmp_path):
    save(tmp_path / "cat/deep/er/1.png")
    assert sources.open_source(folder(tmp_path), "train").labels is None
    save(tmp_path / "ant/2.png")
    source = sources.open_source(folder(tmp_path), "train")
    assert source.classes == ["ant", "cat"] and source.labels.tolist() == [0, 1]
    save(tmp_path / "stray.png")
    assert sources.open_source(folder(tmp_path), "train").labels is None


@pytest.mark.parametrize(
    "train_name, held_out", [("train", "val"), ("Train", "TEST"), ("train", "validation")]
)
def test_splits_share_the_class_numbers_of_train(tmp_path, train_name, held_out):
    for name in ("ant", "bee", "cat"):
        save(tmp_path / train_name / name / "1.png")
    save(tmp_path / held_out / "cat/2.png")
    (tmp_path / "notes").mkdir()
    bank, queries = sources.open_labelled(folder(tmp_path))
    assert len(bank) == 3 and queries.labels.tolist() == [2]
    assert queries.classes == bank.classes == ["ant", "bee", "cat"]
    assert sources.open_labelled(folder(tmp_path), bank)[0] is bank
    save(tmp_path / held_out / "Bee/3.png")
    for opener in (sources.open_labelled, lambda data: sources.open_source(data, "test")):
        with pytest.raises(UserError, match=r"1 class folders .*not in the train split \(Bee\)"):
            opener(folder(tmp_path))


def test_unlabelled_test_split_and_a_class_called_train(tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png"):
        save(tmp_path / name)
    assert sources.open_source(folder(tmp_path), "train").classes == ["ant", "bee"]
    save(tmp_path / "test/1.png")
    assert sources.open_source(folder(tmp_path), "test").labels is None
    assert sources.open_labelled(folder(tmp_path)) is None
    for name in ("ant", "bee"):
        save(tmp_path / f"test/{name}/1.png")
    (tmp_path / "test/1.png").rename(tmp_path / "train/stray.png")
    assert sources.open_source(folder(tmp_path), "test").labels is None  # nothing to map them by
    (tmp_path / "test").rename(tmp_path / "plane")
    assert sources.open_source(folder(tmp_path), "train").classes == ["plane", "train"]


def test_links_in_circles_and_twice_list_every_file_once(tmp_path):
    root = tmp_path / "root"
    real = save(root / "a/1.png")
    save(tmp_path / "outside/2.png")
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    (root / "c").symlink_to(tmp_path / "outside", target_is_directory=True)
    (root / "a/0 again.png").symlink_to(real)
    (root / "d.png").symlink_to(tmp_path / "outside/2.png")
    source = sources.open_source(folder(root), "train")
    assert relative(source, root) == ["a/1.png", "c/2.png"]


def test_linked_files_from_elsewhere_come_once_and_dangling_ones_are_named_bad(tmp_path):
    store = save(tmp_path / "store/object.png")
    root = tmp_path / "root"
    (root / "x").mkdir(parents=True)
    (root / "x/1.png").symlink_to(store)
    (root / "x/2.png").symlink_to(store)
    (root / "x/3.png").symlink_to("nowhere.png")
    (root / "x/4.png").symlink_to("4.png")
    source = sources.open_source(folder(root), "train")
    assert relative(source, root) == ["x/1.png", "x/3.png", "x/4.png"]
    _, bad = sources.load_all(source)
    assert [index for index, _ in bad] == [1, 2] and "No such file" in bad[0][1]


def test_names_in_any_encoding_work(tmp_path):
    name = os.fsdecode(b"\xff\tline\nbreak.png")
    try:
        save(tmp_path / "a.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses the name")
    (tmp_path / os.fsdecode(b"\xfe.png")).write_text("broken")
    save(tmp_path / "good.png")
    source = sources.open_source(folder(tmp_path), "train")
    images, bad = sources.load_all(source)
    assert len(images) == 3 and len(bad) == 1
    report = tmp_path / "bad_files.txt"
    assert len(sources.check_files(source, bad, 0.5, str(report))) == 2
    assert report.read_bytes() == bytes(tmp_path) + b"/\xfe.png\tis no image of a known format\n"
    with pytest.raises(UserError, match=r"\\xfe.png") as caught:
        sources.check_files(source, bad, 0.0, None)
    str(caught.value).encode()  # printable anywhere
    assert sources.shown(name) == "\\xff\\tline\\nbreak.png"


def test_unreadable_subfolder_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog):
    save(tmp_path / "open/1.png")
    save(tmp_path / "closed/2.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = sources.open_source(folder(tmp_path), "train")
    assert relative(source, tmp_path) == ["open/1.png"]
    assert "1 folders cannot be read" in caplog.text and "closed: Permission denied" in caplog.text
    with pytest.raises(UserError, match=r"closed' cannot be read \(Permission denied\)"):
        sources.open_source(folder(tmp_path / "closed"), "train")


def test_roots_that_give_nothing_are_refused_in_one_line(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "images.tar").touch()
    cases = {
        "picture": "data.root '.*picture' does not exist: did you mean '.*pictures'",
        "zzz": "data.root '.*zzz' does not exist: give a folder",
        "images.tar": "data.root '.*images.tar' is a file",
        "pictures": r"data.root '.*pictures' holds no images \(looked for .jpg .*.npy in all",
        "nul\0byte": "data.root .* cannot be read",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            sources.open_source(folder(tmp_path / name), "train")
        assert "\n" not in str(caught.value)


def test_imagenet_wants_its_layout(tmp_path):
    data = DataConfig(dataset="imagenet", root=str(tmp_path))
    save(tmp_path / "train/n01/1.JPEG")
    save(tmp_path / "train/n02/1.JPEG")
    with pytest.raises(UserError, match=r"lacks train/ or val/.*train/CLASS/\*.JPEG"):
        sources.open_source(data, "train")
    flat = save(tmp_path / "val/1.JPEG")
    with pytest.raises(UserError, match=r"one subfolder per class"):
        sources.open_source(data, "test")
    flat.unlink()
    save(tmp_path / "val/n02/1.JPEG")
    bank, queries = sources.open_labelled(data)
    assert bank.labels.tolist() == [0, 1] and queries.labels.tolist() == [1]


# All images at once, and the bad ones


def test_load_all_equals_reading_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILES_PER_TASK", 4)
    for number in range(11):
        Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(
            tmp_path / f"{number:02}.png"
        )
    for number in (0, 7):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    source = sources.open_source(folder(tmp_path), "train")
    seen = []
    images, bad = sources.load_all(source, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)]
    assert bad == [(0, "is empty"), (7, "is empty")]
    assert images.shape == (11, 3, 6, 5) and images.dtype == torch.uint8
    good = [index for index in range(11) if index not in (0, 7)]
    assert all(torch.equal(images[index], source.read(index)) for index in good)
    kept = sources.check_files(source, bad, 0.2, None)
    assert torch.equal(sources.load_all(kept)[0], images[good])


def test_load_all_without_a_good_image_and_of_arrays(tmp_path):
    (tmp_path / "a.png").touch()
    source = sources.open_source(folder(tmp_path), "train")
    assert sources.load_all(source) == (None, [(0, "is empty")])
    digits = sources.open_source(DataConfig(dataset="digits", channels=1), "train")
    assert sources.load_all(digits) == (digits.images, [])


def test_mixed_sizes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FILES_PER_TASK", 2)
    for number in range(8):
        save(tmp_path / f"{number}.png", size=(4, 9) if number in (5, 7) else (4, 4))
    source = sources.open_source(folder(tmp_path), "train")
    with pytest.raises(MixedSizes, match=r"5.png") as caught:
        sources.load_all(source)
    assert (caught.value.first, caught.value.other) == ((4, 4), (4, 9))
    assert caught.value.path == source.paths[5]
    num_bytes, common = sources.estimate_bytes(source)
    assert num_bytes == 3 * (6 * 16 + 2 * 36) and common is None
    assert source.read(5).shape == (3, 4, 9)


def test_estimate_bytes(tmp_path):
    for number in range(10):
        save(tmp_path / f"{number}.png", size=(4, 6))
    (tmp_path / "0.png").write_bytes(b"")
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert sources.estimate_bytes(source, samples=5) == (10 * 24, (4, 6))
    digits = sources.open_source(DataConfig(dataset="digits", channels=3), "train")
    assert sources.estimate_bytes(digits) == (1257 * 3 * 64, (8, 8))


def test_check_files_thresholds(tmp_path):
    labels = torch.arange(10) % 2
    paths = [f"/images/{number}.png" for number in range(10)]
    source = ImageSource("folder /images", None, paths, labels, ["a", "b"], 3, 65535)
    report = tmp_path / "bad_files.txt"
    assert sources.check_files(source, [], 0.0, str(report)) is source and not report.exists()
    bad = [(1, "is empty"), (4, "truncated")]
    kept = sources.check_files(source, bad, 0.2, str(report))
    assert report.read_text() == "/images/1.png\tis empty\n/images/4.png\ttruncated\n"
    assert kept.paths == [path for path in paths if path[8] not in "14"]
    assert kept.labels.tolist() == [0, 0, 1, 1, 0, 1, 0, 1] and kept.classes == ["a", "b"]
    message = (
        r"2 of 10 images of folder /images \(20 %\).*1.png: is empty.*bad_files.*max_bad_fraction"
    )
    with pytest.raises(UserError, match=message) as caught:
        sources.check_files(source, bad, 0.19, str(report))
    assert "\n" not in str(caught.value) and len(source) == 10
    with pytest.raises(UserError, match=r"10 of 10"):
        sources.check_files(source, [(index, "is empty") for index in range(10)], 1.0, None)


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
        assert image.shape == (3, *sources.image_size(path)) and image.float().std() > 5
    with pytest.raises(MixedSizes):
        sources.load_all(source)
