"""Formats behind extras: read right where the package is there, named in one line where not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save
from PIL import Image, features

from moco.config import DataConfig, UserError
from moco.images import formats, sources, values
from moco.images.decode import BadImage, decode, read_header
from moco.images.own import open_own
from moco.images.scaling import PLAIN, Reading
from moco.pixels import to_uint8

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)


def folder(root: Path, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


def without(monkeypatch, *endings: str) -> None:
    """Make it so that no package reads files of these endings."""
    monkeypatch.setattr(formats, "needed", lambda ending: "a-package" if ending in endings else "")
    monkeypatch.setattr("moco.images.decode.needed", formats.needed)


@pytest.mark.parametrize("ending", ["avif", "jp2", "heic"])
def test_modern_formats_equal_pillow(tmp_path, ending):
    if ending == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif not features.check({"avif": "avif", "jp2": "jpg_2000"}[ending]):
        pytest.skip("this Pillow was built without it")
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RGB).save(path)
    wanted = np.asarray(Image.open(path).convert("RGB"))
    assert torch.equal(decode(str(path), 3).permute(1, 2, 0), torch.from_numpy(wanted.copy()))
    assert read_header(str(path))[:2] == (16, 24)
    assert len(sources.open_source(folder(tmp_path), "train")) == 1


def test_only_their_own_endings_meet_further_decoders(tmp_path):
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow was built without it")
    Image.fromarray(RGB).save(tmp_path / "a.jp2")
    (tmp_path / "a.jp2").rename(tmp_path / "a.png")
    with pytest.raises(BadImage, match="is no image of a known format"):
        decode(str(tmp_path / "a.png"), 3)


def test_what_looks_like_an_image_and_is_not_read_is_counted_once_by_ending(
    tmp_path, monkeypatch, caplog
):
    without(monkeypatch, ".heic", ".dcm")
    caplog.set_level("INFO", logger="moco")
    for number, ending in enumerate(["png", "jfif", "heic", "HEIC", "dcm", "svg", "txt", "csv"]):
        (tmp_path / f"sub{number % 2}").mkdir(exist_ok=True)
        path = tmp_path / f"sub{number % 2}" / f"{number}.{ending}"
        save(path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    source = sources.open_source(folder(tmp_path), "train")
    assert sorted(Path(path).suffix for path in source.paths) == [".jfif", ".png"]
    lines = [text for text in caplog.messages if "passed over" in text]
    assert len(lines) == 1 and lines[0].endswith(
        "not read here: 2 .heic (pip install a-package), 1 .dcm (pip install a-package), 1 .svg"
    )
    for path in source.paths:
        Path(path).unlink()
    with pytest.raises(UserError, match=r"no images .*there are 2 .heic \(pip install a-package"):
        sources.open_source(folder(tmp_path), "train")


def test_a_file_whose_package_is_missing_names_it(tmp_path, monkeypatch):
    without(monkeypatch, ".heic")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(BadImage, match="a.heic: cannot be read here: pip install a-package"):
        decode(str(tmp_path / "a.heic"), 3)


def test_packages_that_are_named_are_those_of_the_requirements():
    root = Path(__file__).parent.parent.parent
    listed = (root / "requirements-extra.txt").read_text() + (root / "requirements.txt").read_text()
    for name in ("pillow-heif", "pydicom", "imagecodecs", "pillow>=11.3"):
        assert f"\n{name}" in listed
    named = {package for _, package in formats._PACKAGES.values()}
    assert named == {"pillow-heif", "pydicom"}


# DICOM


def write_dicom(path: Path, pixels: np.ndarray, **tags) -> Path:
    """Write H W, or frames H W, or H W 3, as an uncompressed DICOM file."""
    path.parent.mkdir(exist_ok=True)
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    colour = pixels.shape[-1] == 3
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = len(pixels)
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


CT = {"RescaleSlope": 1, "RescaleIntercept": -1024}


def test_dicom_is_rescaled_to_its_units(tmp_path):
    stored = RNG.integers(0, 4000, (12, 10), dtype=np.uint16)
    path = str(write_dicom(tmp_path / "a.dcm", stored, **CT))
    wanted = to_uint8(stored[None].astype(np.int32) - 1024, (-1024.0,), (3071.0,))
    reading = Reading((-1024.0,), (3071.0,))
    assert torch.equal(decode(path, 1, reading), torch.from_numpy(wanted))
    assert torch.equal(decode(path, 3, reading), torch.from_numpy(wanted.repeat(3, 0)))
    assert read_header(path, 1)[:2] == (12, 10)
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert source.reading.low == (-1024,) and source.reading.high == (4095,)


def test_dicom_is_shown_through_its_window_unless_that_is_turned_off(tmp_path, caplog):
    stored = RNG.integers(0, 4000, (12, 10), dtype=np.uint16)
    path = str(write_dicom(tmp_path / "a.dcm", stored, WindowCenter=40, WindowWidth=400, **CT))
    units = stored.astype(float) - 1024
    wanted = np.clip(((units - 39.5) / 399 + 0.5) * 255, 0, 255)  # PS3.3 C.11.2.1.2.1
    found = decode(path, 1, Reading(windowed=True))[0].numpy()
    assert np.abs(found - wanted).max() <= 0.5 + 1e-6
    assert read_header(path, 1, Reading(windowed=True)).dtype == np.uint8
    caplog.set_level("INFO", logger="moco")
    assert sources.open_source(folder(tmp_path, channels=1), "train").reading.reason == ""
    assert sum("shown through their own window" in text for text in caplog.messages) == 1
    data = folder(tmp_path, channels=1, dicom_window=False)
    assert sources.open_source(data, "train").reading.low == (-1024,)


def test_dicom_whose_lowest_value_is_white_is_inverted(tmp_path):
    stored = np.array([[0, 100], [255, 1]], np.uint8)
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    path = str(write_dicom(tmp_path / "a.dcm", stored, **tags))
    assert decode(path, 1).flatten().tolist() == [255, 155, 0, 254]


@pytest.mark.parametrize("windowed", [False, True])
def test_a_table_of_units_in_dicom_is_applied(tmp_path, windowed):
    pydicom = pytest.importorskip("pydicom")
    stored = RNG.integers(0, 4096, (12, 10), dtype=np.uint16)
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 16])
    table.add_new("ModalityLUTType", "LO", "US")
    units = (np.arange(4096)[::-1] * 16).astype(np.uint16)
    table.add_new("LUTData", "US", units.tolist())
    tags = {"ModalityLUTSequence": [table], "BitsStored": 12, "HighBit": 11}
    tags |= {"WindowCenter": 32_768, "WindowWidth": 65_536} if windowed else {}
    path = str(write_dicom(tmp_path / "a.dcm", stored, **tags))
    found = decode(path, 1, Reading(windowed=windowed))[0].numpy()
    assert np.abs(found - units[stored] * (255 / 65_535)).max() < 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_palette_in_dicom_gives_its_colours(tmp_path, depth):
    stored = RNG.integers(0, 256, (12, 10), dtype=np.uint8)
    tables = RNG.integers(0, 2**depth, (3, 256)).astype(f"<u{depth // 8}")
    path = write_dicom(tmp_path / "a.dcm", stored)
    data = pytest.importorskip("pydicom").dcmread(path)
    data.PhotometricInterpretation = "PALETTE COLOR"
    for colour, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        name = f"{colour}PaletteColorLookupTable"
        data.add_new(f"{name}Descriptor", "US", [256, 0, depth])
        data.add_new(f"{name}Data", "OW", table.tobytes())
    data.save_as(path, enforce_file_format=True)
    wanted = torch.from_numpy((tables[:, stored] >> (depth - 8)).astype(np.uint8))
    assert torch.equal(decode(str(path), 3), wanted)
    assert sources.open_source(folder(tmp_path, channels="auto"), "train").channels == 3


def test_masks_and_signed_bytes_in_dicom(tmp_path):
    pixels = pytest.importorskip("pydicom.pixels")
    stored = RNG.integers(0, 2, (16, 16), dtype=np.uint8)
    bits = {"PixelData": pixels.pack_bits(stored.ravel()), "BitsAllocated": 1, "BitsStored": 1}
    mask = str(write_dicom(tmp_path / "a.dcm", stored, HighBit=0, **bits))
    assert torch.equal(decode(mask, 1)[0], torch.from_numpy(stored * 255))
    stored = RNG.integers(-128, 128, (16, 16)).astype(np.int8)
    signed = str(write_dicom(tmp_path / "b.dcm", stored))
    assert read_header(signed, 1).dtype != np.uint8
    found = decode(signed, 1, Reading((-128.0,), (127.0,)))
    assert torch.equal(found[0].int(), torch.from_numpy(stored.astype(np.int32) + 128))


def test_colours_in_dicom(tmp_path):
    path = str(write_dicom(tmp_path / "a.dcm", RGB))
    assert torch.equal(decode(path, 3).permute(1, 2, 0), torch.from_numpy(RGB))


def test_frames_of_dicom_are_images(tmp_path):
    frames = RNG.integers(0, 256, (4, 12, 10), dtype=np.uint8)
    path = write_dicom(tmp_path / "a.dcm", frames)
    write_dicom(tmp_path / "b.dcm", frames[0])
    names = [f"{path}#frame={number}" for number in range(4)]
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert source.paths == [*names, str(tmp_path / "b.dcm")]
    for number in range(4):
        assert torch.equal(source.read(number)[0], torch.from_numpy(frames[number]))


def test_broken_dicom_is_bad(tmp_path):
    pytest.importorskip("pydicom")
    (tmp_path / "a.dcm").write_bytes(b"no DICOM" * 40)
    (tmp_path / "b.dcm").touch()
    write_dicom(tmp_path / "c.dcm", RGB[..., 0])
    whole = (tmp_path / "c.dcm").read_bytes()
    (tmp_path / "c.dcm").write_bytes(whole[:-50])
    for name, reason in (("a", "cannot be decoded"), ("b", "is empty"), ("c", "cannot be decoded")):
        with pytest.raises(BadImage, match=f"{name}.dcm: {reason}"):
            decode(str(tmp_path / f"{name}.dcm"), 1)


# What the sample says


def test_turned_pictures_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    for number in range(10):
        exif = Image.Exif()
        exif[0x0112] = 6 if number < 3 else 1
        Image.fromarray(RGB).save(tmp_path / f"{number}.jpg", exif=exif)
    for exif, words in (("apply", "turned upright"), ("ignore", "lie as they are stored")):
        caplog.clear()
        source = sources.open_source(folder(tmp_path, exif=exif), "train")
        assert sum("3 of 10 pictures looked at have an EXIF" in x and words in x
                   for x in caplog.messages) == 1  # fmt: skip
        size = (24, 16) if exif == "apply" else (16, 24)
        assert source.read(0).shape[1:] == size and source.read(9).shape[1:] == (16, 24)


def test_files_that_cannot_be_read_leave_the_sample(tmp_path):
    (tmp_path / "a.png").touch()
    save(tmp_path / "b.png")
    assert (
        len(values.look([str(tmp_path / "a.png"), str(tmp_path / "b.png")], 3, PLAIN).headers) == 1
    )


def test_emptied_tags_of_dicom_are_none(tmp_path, caplog):
    stored = RNG.integers(0, 4000, (12, 10), dtype=np.uint16)
    whole = str(write_dicom(tmp_path / "set/a.dcm", stored, **CT))
    emptied = {"WindowCenter": None, "WindowWidth": None}
    path = str(write_dicom(tmp_path / "set/b.dcm", stored, **emptied, **CT))
    reading = Reading((-1024.0,), (3071.0,), windowed=True)
    assert torch.equal(decode(path, 1, reading), decode(whole, 1, reading))
    assert read_header(path, 1, reading).dtype == np.int32
    caplog.set_level("INFO", logger="moco")
    assert sources.open_source(folder(tmp_path / "set", channels=1), "train").reading.low == (
        -1024,
    )
    assert not any("window" in text for text in caplog.messages)
    unscaled = {"RescaleSlope": None, "RescaleIntercept": None, "VOILUTSequence": []}
    write_dicom(tmp_path / "other/c.dcm", stored, **emptied, **unscaled)
    source = sources.open_source(folder(tmp_path / "other", channels=1), "train")
    assert source.reading.high == (4095,)
    assert torch.equal(source.read(0), torch.from_numpy(to_uint8(stored[None], (0,), (4095,))))


def test_frames_of_a_listed_or_labelled_dicom_are_images(tmp_path):
    frames = RNG.integers(0, 256, (3, 12, 10), dtype=np.uint8)
    paths = [write_dicom(tmp_path / f"set/{name}.dcm", frames) for name in "ab"]
    names = [f"{path}#frame={number}" for path in paths for number in range(3)]
    (tmp_path / "t.csv").write_text("a.dcm,ant\nb.dcm,bee\n")
    (tmp_path / "f.txt").write_text("b.dcm\na.dcm#frame=1\n")
    data = folder(tmp_path / "set", channels=1, labels=str(tmp_path / "t.csv"))
    source = sources.open_source(data, "train")
    assert source.paths == names and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    data = folder(tmp_path / "set", channels=1, files=str(tmp_path / "f.txt"))
    assert sources.open_source(data, "train").paths == [*names[3:], names[1]]
    assert open_own([str(path) for path in paths], DataConfig(channels=1)).paths == names


def test_archives_and_images_without_an_ending_are_counted_too(tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    for number in range(3):
        save(tmp_path / f"{number}.png").rename(tmp_path / f"1.2.840.{number}")
    for name in ("README", "LICENSE", "more.zip", "more.tar.gz", "list.txt"):
        (tmp_path / name).write_bytes(b"PK and so on")
    with pytest.raises(UserError, match="there are 5 without an image's ending, 1 .gz"):
        sources.open_source(folder(tmp_path), "train")
    for number in range(3):
        (tmp_path / f"1.2.840.{number}").rename(tmp_path / f"{number}")
    save(tmp_path / "a.png")
    assert len(sources.open_source(folder(tmp_path), "train")) == 1
    words = "not read here: 5 without an image's ending, 1 .gz (an archive), 1 .zip (an archive)"
    assert sum(words in line for line in caplog.messages) == 1


def test_names_are_drawn_on_one_line_in_letters_that_the_font_has():
    names = {"K\u00e4fer": "Kafer", "Ka\u0308fer": "Kafer", "a\nb\t": "a\\nb\\t", "\ufb01n": "fin"}
    assert {name: formats.lettered(name) for name in names} == names
    assert formats.lettered("\udcff") == "\\xff"
