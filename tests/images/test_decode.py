"""Decoding: real small files in every format, and broken ones."""

import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from moco.images.decode import BadImage, decode, read_header
from moco.images.scaling import Reading
from moco.pixels import to_uint8

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # H W C


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


def upto(high: float, low: float = 0.0) -> Reading:
    """Values of low..high become 0..255."""
    return Reading((float(low),), (float(high),))


def image_size(path: str, channels: int = 3) -> tuple[int, int]:
    header = read_header(path, channels)
    return header.height, header.width


def expect(pixels: np.ndarray) -> torch.Tensor:
    """H W C as the C H W tensor that decode should give."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "TIFF", "webp", "ppm"])
def test_lossless_formats_are_pixel_exact(tmp_path, extension):
    path = str(tmp_path / f"a.{extension}")
    options = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(RGB).save(path, **options)
    image = decode(path, 3)
    assert image.dtype == torch.uint8 and image.permute(1, 2, 0).is_contiguous()
    assert torch.equal(image, expect(RGB))
    assert image_size(path) == (5, 7)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "gif", "pgm", "pbm"])
def test_other_formats_equal_pillow(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    mode = {"gif": "P", "pgm": "L", "pbm": "1"}.get(extension, "RGB")
    Image.fromarray(RGB).convert(mode).save(path)
    wanted = np.array(Image.open(path).convert("RGB"))
    assert torch.equal(decode(str(path), 3), expect(wanted))
    grey = np.array(Image.open(path).convert("L"))[..., None]
    assert torch.equal(decode(str(path), 1), expect(grey))


def test_palette_with_transparency_gives_its_colours(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode=None).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]], np.uint8)
    palette.save(tmp_path / "p.png", transparency=bytes([255, 0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(str(tmp_path / "p.png"), 3), expect(colours))
        rgba = decode(str(tmp_path / "p.png"), 4)
    assert torch.equal(rgba[:3], expect(colours))
    assert rgba[3].tolist() == [[255, 0], [128, 0]]


def test_alpha_is_dropped_for_rgb_and_kept_for_four_channels(tmp_path):
    rgba = np.dstack([RGB, RNG.integers(0, 256, (5, 7), dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert torch.equal(decode(str(tmp_path / "a.png"), 3), expect(RGB))
    assert torch.equal(decode(str(tmp_path / "a.png"), 4), expect(rgba))
    Image.fromarray(rgba[..., 2:]).save(tmp_path / "la.png")
    grey = np.repeat(RGB[..., 2:], 3, axis=2)
    assert torch.equal(decode(str(tmp_path / "la.png"), 3), expect(grey))
    assert torch.equal(decode(str(tmp_path / "la.png"), 2), expect(rgba[..., 2:]))


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg")
    wanted = np.array(Image.open(tmp_path / "a.jpg").convert("RGB"))
    assert torch.equal(decode(str(tmp_path / "a.jpg"), 3), expect(wanted))


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_rounded_and_clipped(tmp_path, extension):
    values = np.array([[0, 1000, 2000], [4000, 4095, 65535]], np.uint16)
    path = str(tmp_path / f"a.{extension}")
    Image.fromarray(values).save(path)
    wanted = [[0, 62, 125], [249, 255, 255]]  # rint(v * 255 / 4095), clipped
    image = decode(path, 3, upto(4095))
    assert image.shape == (3, 2, 3) and all(band.tolist() == wanted for band in image)
    assert decode(path, 1)[0].tolist() == [[0, 4, 8], [16, 16, 255]]


def test_maximum_named_by_a_pgm_is_applied_once(tmp_path):
    body = np.array([0, 2048, 4095], ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + body)
    for max_value in (4095, 65535):
        assert decode(str(tmp_path / "a.pgm"), 1, upto(max_value)).flatten().tolist() == [
            0,
            128,
            255,
        ]


def test_32_bit_and_float_tiff(tmp_path):
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.array([[0, 500, 1000, -3]], dtype)).save(tmp_path / "a.tif")
        assert decode(str(tmp_path / "a.tif"), 1, upto(1000)).flatten().tolist() == [0, 128, 255, 0]


def deep_colour_png(path: Path, pixels: np.ndarray) -> str:
    """Write H W 3 uint16 as a PNG, which Pillow cannot."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return str(path)


def test_16_bit_colour_png_needs_imagecodecs_for_a_range_that_pillow_would_lose(
    tmp_path, monkeypatch
):
    path = deep_colour_png(tmp_path / "a.png", np.array([[[65535, 0x1234, 0]]], np.uint16))
    assert decode(path, 3).flatten().tolist() == [255, 0x12, 0]  # as Pillow cuts it
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(BadImage, match=r"cuts to 8: pip install imagecodecs"):
            decode(path, 3, upto(4095))
    pytest.importorskip("imagecodecs")
    deep = RNG.integers(0, 4096, (5, 7, 3), dtype=np.uint16)
    path = deep_colour_png(tmp_path / "b.png", deep)
    assert torch.equal(decode(path, 3, upto(4095)), expect(to_uint8(deep, (0.0,), (4095.0,))))


def test_16_bit_png_with_an_alpha_and_an_orientation_is_read_as_its_8_bits_are(tmp_path):
    """By a range of its own, and by Pillow without one."""
    pytest.importorskip("imagecodecs")
    from imagecodecs import png_encode

    for bands in (2, 3, 4):
        deep = RNG.integers(0, 65536, (5, 7, bands), dtype=np.uint16)
        raw = png_encode(deep)
        about = Image.Exif()
        about[0x0112] = 6
        body = b"eXIf" + about.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path = tmp_path / "a.png"
        path.write_bytes(raw[:33] + chunk + raw[33:])
        for channels in (1, 3, 4):
            for turn in (False, True):
                near = Reading((0.0,), (65534.0,), turn=turn)
                by_range = decode(str(path), channels, near).int()
                by_pillow = decode(str(path), channels, Reading(turn=turn)).int()
                assert by_range.shape == by_pillow.shape
                assert (by_range - by_pillow).abs().max() <= 1 + (bands > 2 and channels == 1)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied_where_asked_for(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{ending}"
        Image.fromarray(RGB).save(path, exif=exif, **options)
        as_stored = np.array(Image.open(path).convert("RGB"))
        upright = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        for turn, wanted in ((False, as_stored), (True, upright)):
            assert torch.equal(decode(str(path), 3, Reading(turn=turn)), expect(wanted))
            header = read_header(str(path), 3, Reading(turn=turn))
            assert header[:2] == wanted.shape[:2] and header.turned == (orientation > 1)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(str(tmp_path / "a.gif"), 1).flatten().tolist() == [10] * 4


ORDINARY = {
    **{f"{m}-{q}-{s}.jpg": (m, {"quality": q, "subsampling": s})
       for m in ("L", "RGB", "CMYK") for q, s in ((95, 0), (75, 2))},
    "progressive.jpg": ("RGB", {"progressive": True}),
    "RGB.jfif": ("RGB", {"format": "JPEG"}),
    **{f"{m.replace(';', '')}.png": (m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "fast.png": ("RGB", {"compress_level": 1}),
    **{f"{m}.bmp": (m, {}) for m in ("1", "L", "P", "RGB")},
    **{f"{m}.gif": (m, {}) for m in ("1", "L", "P")},
    **{f"{m}-{c}.tif": (m, {"compression": c}) for m in ("1", "L", "P", "RGB", "RGBA", "CMYK")
       for c in ("raw", "tiff_lzw")},
    **{f"RGB-{c}.tif": ("RGB", {"compression": c})
       for c in ("tiff_adobe_deflate", "packbits", "jpeg")},
    **{f"RGB-{q}.webp": ("RGB", {"quality": q}) for q in (50, 100)},
    "RGBA.webp": ("RGBA", {"lossless": True}),
    "1.pbm": ("1", {}), "L.pgm": ("L", {}), "RGB.ppm": ("RGB", {}),
}  # fmt: skip


def test_ordinary_files_are_read_as_pillow_reads_them(tmp_path):
    assert len(ORDINARY) >= 40
    rgba = RNG.integers(0, 256, (17, 23, 4), dtype=np.uint8)
    for name, (mode, options) in ORDINARY.items():
        source = Image.fromarray(rgba)
        source = source.convert("L") if mode in ("1", "L") else source
        source = source.convert("RGB") if mode not in ("LA", "RGBA") else source
        source.convert(mode).save(tmp_path / name, **options)
        for channels, wanted in ((1, "L"), (3, "RGB"), (4, "RGBA")):
            by_pillow = np.asarray(Image.open(tmp_path / name).convert(wanted))
            ours = decode(str(tmp_path / name), channels)
            assert torch.equal(ours, expect(by_pillow.reshape(17, 23, channels).copy())), (
                name,
                wanted,
            )


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as a large image meets Pillow's own
    path = str(tmp_path / "a.png")
    Image.fromarray(np.zeros((20, 15), np.uint8)).save(path)
    for most in (40, 120, 299):
        with pytest.raises(BadImage, match=f"above the limit of {most}.*: raise data.max_pixels"):
            decode(path, 1, Reading(max_pixels=most))
    assert decode(path, 1, Reading(max_pixels=300)).shape == (1, 20, 15)


@pytest.mark.parametrize("height", [20, 5])
@pytest.mark.parametrize("layout", ["HWC", "CHW", "fortran"])
def test_npy_of_many_bands_in_either_layout(tmp_path, layout, height):
    array = RNG.integers(0, 256, (height, 16, 13), dtype=np.uint8)
    stored = {"HWC": array, "CHW": array.transpose(2, 0, 1), "fortran": np.asfortranarray(array)}
    np.save(tmp_path / "a.npy", stored[layout])
    path = str(tmp_path / "a.npy")
    assert torch.equal(decode(path, 13), expect(array))
    assert image_size(path, 13) == (height, 16)
    for read in (decode, read_header) if height > 13 else ():
        with pytest.raises(BadImage, match=r"has 13 bands: set --data.channels 13"):
            read(path, 3)


def test_npy_values(tmp_path):
    path = str(tmp_path / "a.npy")
    cases = [
        (np.array([[0, 0.5, 1.0, 1.2, -1, np.nan]], np.float32), 1, [0, 128, 255, 255, 0, 0]),
        (np.array([[0, 500, 1000, 2000, 1, 3]], np.uint16), 1000, [0, 128, 255, 255, 0, 1]),
        (np.array([[True, False]]), 1000, [255, 0]),
    ]
    for array, top, wanted in cases:
        np.save(path, array)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a NaN must not reach the cast
            assert decode(path, 1, upto(top)).flatten().tolist() == wanted
        assert decode(path, 3, upto(top))[2].flatten().tolist() == wanted
    np.save(path, np.array([[-1000.0, 0.0, 1000.0, np.nan, -np.inf, np.inf]]))
    assert decode(path, 1, upto(1000, -1000)).flatten().tolist() == [0, 128, 255, 0, 0, 255]
    np.save(path, np.array([[[0, 10]], [[0, 100]]], np.int64).transpose(1, 2, 0))
    own = Reading((0.0, -100.0), (10.0, 155.0))
    assert decode(path, 2, own).tolist() == [[[0, 255]], [[100, 200]]]
    np.save(path, np.array([[0, 10, 150]], np.int64))  # grey, brought to channels of three ranges
    own = Reading((0.0,), (10.0, 100.0, 200.0))
    assert decode(path, 3, own).flatten(1).tolist() == [[0, 255, 255], [0, 26, 255], [0, 13, 191]]
    np.save(path, np.array([{}, None]), allow_pickle=True)
    with pytest.raises(BadImage):
        decode(path, 1)
    np.save(path, RGB)
    grey = np.array(Image.fromarray(RGB).convert("L"))
    assert torch.equal(decode(path, 1)[0], torch.from_numpy(grey))
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(BadImage):
        image_size(path)


def test_many_band_tiff_names_what_to_set(tmp_path, caplog):
    path = str(tiff(tmp_path / "a.tif", np.zeros((4, 6, 13), np.uint16)))
    assert image_size(path, 13) == (4, 6)
    for read in (decode, read_header):
        with pytest.raises(BadImage, match=r"a.tif: has 13 bands: set --data.channels 13$"):
            read(path, 3)
    with pytest.raises(BadImage, match=r"has 3 bands: set --data.channels 3"):
        decode(str(tiff(tmp_path / "b.tif", RGB)), 13)
    assert not caplog.records


@pytest.mark.parametrize("order", ["<", ">"])
def test_many_band_tiff_through_tifffile(tmp_path, order):
    deep = RNG.integers(0, 10_000, (4, 6, 13), dtype=np.uint16)
    path = str(tiff(tmp_path / "a.tif", deep, order))
    wanted = expect(np.rint(deep * (255 / 10_000)).astype(np.uint8))
    assert torch.equal(decode(path, 13, upto(10_000)), wanted)
    path = str(tiff(tmp_path / "b.tif", deep[..., :3], order))
    assert torch.equal(decode(path, 3, upto(10_000)), wanted[:3])
    near_infrared = np.dstack([RGB, RGB[..., :1]])  # Pillow alone would make it an opaque alpha
    path = str(tiff(tmp_path / "c.tif", near_infrared, order))
    assert torch.equal(decode(path, 4), expect(near_infrared))


@pytest.mark.parametrize("broken", ["truncated.jpg", "truncated.png", "truncated.npy"])
def test_truncated_files_are_bad(tmp_path, broken):
    path = tmp_path / broken
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.save(path, noise) if path.suffix == ".npy" else Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match=f"{broken}: cannot be decoded"):
        decode(str(path), 3)


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
        for read in (lambda path: decode(path, 3), image_size):
            with pytest.raises(BadImage, match=f"{name}.*{reason}") as caught:
                read(str(tmp_path / name))
            assert "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason) == (caught.value.path, caught.value.reason)
