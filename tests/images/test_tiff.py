"""TIFF: whatever tifffile writes is read as tifffile reads it, without a difference."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from moco.config import DataConfig
from moco.images.decode import BadImage, decode, read_header, read_values
from moco.images.scaling import Reading
from moco.images.values import choose_channels, settle
from moco.pixels import to_uint8

BANDS, TYPES, SIZE = (1, 2, 3, 4, 5), ("u1", "u2", "i2", "f4"), (18, 35)
COMPRESSIONS = ("none", "lzw", "deflate")


def image(bands: int, kind: str) -> np.ndarray:
    """Make C H W values that fill the range of a type."""
    rng = np.random.default_rng(bands)
    if kind == "f4":
        return rng.random((bands, *SIZE), dtype=np.float32)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, (bands, *SIZE), endpoint=True).astype(kind)


def scaled(values: np.ndarray, reading: Reading) -> torch.Tensor:
    return torch.from_numpy(to_uint8(values, reading.low, reading.high))


def full_range(kind: str) -> Reading:
    if kind == "f4":
        return Reading((0.0,), (1.0,))
    return Reading((float(np.iinfo(kind).min),), (float(np.iinfo(kind).max),))


def assert_read(path: Path, values: np.ndarray) -> None:
    """The file reads as these C H W values, in any number of channels that they can become."""
    reading, bands = full_range(values.dtype.str[1:]), len(values)
    assert np.array_equal(read_values(str(path), bands), values)
    assert torch.equal(decode(str(path), bands, reading), scaled(values, reading))
    header = read_header(str(path), bands)
    assert header[:2] == values.shape[1:] and header.dtype.newbyteorder("=") == values.dtype


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bands", BANDS)
def test_every_layout_is_read_as_tifffile_reads_it(tmp_path, bands, kind, compression):
    if compression != "none":
        pytest.importorskip("imagecodecs")  # to write them
    values, path = image(bands, kind), tmp_path / "a.tif"
    planes = ("contig", "separate") if bands > 1 else (None,)
    colours = ("minisblack", "rgb") if bands > 2 else ("minisblack",)
    layouts = itertools.product(planes, colours, "<>", (False, True), (None, (16, 16)))
    for plane, colour, order, big, tile in layouts:
        stored = values if plane == "separate" else values.transpose(1, 2, 0)
        options = {} if compression == "none" else {"compression": compression}
        options |= {"tile": tile} if tile else {"rowsperstrip": 5}
        tifffile.imwrite(
            path, stored[..., 0] if bands == 1 else stored, photometric=colour, planarconfig=plane,
            byteorder=order, bigtiff=big, metadata=None, **options,
        )  # fmt: skip
        assert np.array_equal(tifffile.imread(path), stored[..., 0] if bands == 1 else stored)
        assert_read(path, values)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bands", BANDS)
def test_stacks_of_imagej_and_ome_are_bands(tmp_path, bands, kind):
    values = image(bands, kind)
    for options in ({"ome": True}, {"ome": True, "bigtiff": True}, {"imagej": True}):
        if options == {"imagej": True} and kind == "i2":
            continue  # it knows no such type
        name = tmp_path / ("a.ome.tif" if "ome" in options else "a.tif")
        tifffile.imwrite(
            name, values, metadata={"axes": "CYX"}, photometric="minisblack", **options
        )
        assert_read(name, values)


@pytest.mark.parametrize("bands", (2, 3, 4, 5))
def test_plain_pages_are_bands_where_there_are_as_many_as_channels(tmp_path, bands):
    values, path = image(bands, "u2"), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for band in values:
            file.write(band, photometric="minisblack", metadata=None)
    if bands != 3:
        assert_read(path, values)
    first = scaled(values[:1], Reading())
    assert torch.equal(decode(str(path), 1), first)
    assert torch.equal(decode(str(path), 3), first.repeat(3, 1, 1))  # three pages may be a document


def test_pages_that_are_not_read_are_said_unless_channels_name_them(tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    for number in range(3):
        tifffile.imwrite(tmp_path / f"{number}.tif", image(13, "u2"), photometric="minisblack")
    line = "3 of 3 files looked at have 13 pages or more, of which the first is read"
    data = DataConfig(
        root=str(tmp_path), channels=choose_channels([str(tmp_path / "0.tif")], DataConfig())
    )
    settle(sorted(map(str, tmp_path.glob("*.tif"))), data)
    assert data.channels == 1 and line in caplog.text
    caplog.clear()
    settle(sorted(map(str, tmp_path.glob("*.tif"))), DataConfig(channels=13))
    assert "pages" not in caplog.text


def test_a_stack_in_time_and_depth_gives_the_bands_of_its_first_place(tmp_path):
    values = np.stack([image(3, "u1") + n for n in range(4)]).reshape(2, 2, 3, *SIZE)  # T Z C Y X
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, metadata={"axes": "TZCYX"})
    tifffile.imwrite(
        tmp_path / "b.ome.tif", values, ome=True, photometric="minisblack", compression="deflate",
        metadata={"axes": "TZCYX"},
    )  # fmt: skip
    for name in ("a.tif", "b.ome.tif"):
        assert np.array_equal(read_values(str(tmp_path / name), 3), values[0, 0])


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "float32"])
def test_a_tiff_whose_lowest_value_is_white_is_inverted_at_any_depth(
    tmp_path, kind, pages, compression
):
    top = 1.0 if kind == "float32" else float(np.iinfo(kind).max)
    values = (np.linspace(0, 1, 24).reshape(4, 6) * top).astype(kind)
    found = []
    for lowest in ("minisblack", "miniswhite"):
        path = str(tmp_path / f"{lowest}.tif")
        stored = np.stack([values] * pages) if pages > 1 else values
        tifffile.imwrite(path, stored, photometric=lowest, compression=compression)
        found.append(decode(path, 1, Reading(high=(top,))).int())
    black, white = found
    assert black[0, 0, 0] == 0 and black[0, 3, 5] == 255 and (white == 255 - black).all()
    if kind == "float32":
        values[1, 1] = np.nan
        tifffile.imwrite(path, values, photometric="miniswhite", compression=compression)
        assert decode(path, 1, Reading(high=(top,)))[0, 1, 1] == 0, "NaN is 0 everywhere"


def test_two_named_channels_are_no_grey_picture(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(2, "u2"), imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(BadImage, match=r"has 2 bands: set --data.channels 2"):
        decode(str(path), 3)


def test_alpha_is_dropped_from_deep_colours_and_grey(tmp_path):
    values = image(4, "u2")
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, values.transpose(1, 2, 0), photometric="rgb", extrasamples=["unassalpha"]
    )
    assert torch.equal(decode(str(path), 3), scaled(values[:3], Reading()))
    tifffile.imwrite(
        path, values[:2].transpose(1, 2, 0), photometric="minisblack", planarconfig="contig",
        extrasamples=["unassalpha"],
    )  # fmt: skip
    assert torch.equal(decode(str(path), 1), scaled(values[:1], Reading()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_applied_alike_by_both_readers(tmp_path, orientation):
    grey = image(1, "u1")[0]
    tag = [(274, "H", 1, orientation, False)]
    for name, array in (("a.tif", grey), ("b.tif", grey.astype(np.float32))):
        tifffile.imwrite(tmp_path / name, array, metadata=None, extratags=tag)
    by_pillow, by_tifffile = (read_values(str(tmp_path / n), 1) for n in ("a.tif", "b.tif"))
    about = Image.Exif()
    about[274] = orientation
    Image.fromarray(grey).save(tmp_path / "c.png", exif=about)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "c.png")))[None]
    assert np.array_equal(by_pillow, upright) and np.array_equal(by_tifffile, upright)
    header = read_header(str(tmp_path / "b.tif"), 1)
    assert header[:2] == by_tifffile.shape[1:] == read_header(str(tmp_path / "a.tif"), 1)[:2]


@pytest.mark.parametrize("mode", ["P", "CMYK", "LAB", "1", "L", "LA", "RGB", "RGBA"])
def test_turned_pictures_have_their_colours_or_are_refused(tmp_path, mode):
    """Uncompressed ones, which Pillow cannot turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture = Image.frombytes(mode, (24, 16), pixels) if mode == "LAB" else picture.convert(mode)
    picture.save(tmp_path / "upright.tif")
    picture.save(tmp_path / "turned.tif", tiffinfo={274: 6})
    if mode in ("CMYK", "LAB"):
        with pytest.raises(
            BadImage, match="turned.tif: .* colours that are not read here: save as RGB"
        ):
            decode(str(tmp_path / "turned.tif"), 3)
        return
    upright = np.asarray(Image.open(tmp_path / "upright.tif").convert("RGB"))
    found = decode(str(tmp_path / "turned.tif"), 3).permute(1, 2, 0)
    assert np.array_equal(found, np.rot90(upright, -1))


@pytest.mark.parametrize(
    "kind, extra, wanted",
    [("u1", "unassalpha", 3), ("u2", "unassalpha", 3), ("u1", "unspecified", 4),
     ("u2", "unspecified", 4), ("f4", "assocalpha", 3)],
)  # fmt: skip
def test_a_fourth_band_counts_unless_the_file_calls_it_alpha(tmp_path, kind, extra, wanted):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(
        path, image(4, kind).transpose(1, 2, 0), photometric="rgb", extrasamples=[extra]
    )
    data = DataConfig(root=str(tmp_path), channels="auto")
    assert choose_channels([path], data) == wanted
    assert len(decode(path, wanted)) == wanted


def test_a_compression_that_needs_imagecodecs_names_it(tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(3, "u2"), photometric="rgb", compression="lzw")

    def missing(self):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    with pytest.raises(BadImage, match="'imagecodecs' package: pip install imagecodecs"):
        decode(str(path), 3)
