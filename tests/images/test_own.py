"""Images of more than 8 bits from Python: read as the files of a folder that holds them are."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from moco.config import DataConfig, UserError
from moco.images import sources
from moco.images.decode import BadImage
from moco.images.own import open_own, open_pair

RNG = np.random.default_rng(0)
RAMP = np.linspace(0, 1, 12 * 10 * 3).reshape(12, 10, 3) ** 2


def deep(low: float, high: float, kind: str, count: int = 20) -> np.ndarray:
    """Make N x H x W x C values of low..high, that reach both ends in each image."""
    values = np.stack([low + (high - low) * RNG.permutation(RAMP) for _ in range(count)])
    return values.astype(kind) if "f" in kind else np.rint(values).astype(kind)


def spotted() -> np.ndarray:
    """Make floats with NaN and infinities among them."""
    values = deep(-2, 2, "f4")
    values[:, :3, :2], values[:, 4, 4, 1], values[:, 5, 5] = np.nan, np.inf, -np.inf
    return values


def marked() -> np.ndarray:
    """Make heights, with a value that marks no data."""
    values = deep(0, 900, "f4")
    values[:, :2] = -9999
    return values


VALUES = {
    "uint16": lambda: deep(0, 4095, "u2"),
    "big endian": lambda: deep(0, 4095, ">u2"),
    "int16": lambda: deep(-1024, 2976, "i2"),
    "int32": lambda: deep(0, 150_000, "i4"),
    "int64": lambda: deep(0, 255, "i8"),
    "float16": lambda: deep(0, 1, "f2"),
    "float32": lambda: deep(0, 1, "f4"),
    "float64": lambda: deep(-3, 3, "f8"),
    "NaN": spotted,
    "marks": marked,
    "few levels": lambda: deep(300, 310, "f4"),
}


def saved(root, images) -> DataConfig:
    """Save images as files of a folder."""
    for number, image in enumerate(images):
        np.save(root / f"{number:03d}.npy", image)
    return DataConfig(dataset="folder", root=str(root), channels="auto")


def assert_alike(source, wanted):
    assert (source.channels, len(source)) == (wanted.channels, len(wanted))
    for index in range(len(wanted)):
        image, other = source.read(index), wanted.read(index)
        assert image.dtype == torch.uint8 and image.equal(other)
        assert image.stride() == other.stride()


@pytest.mark.parametrize("name", VALUES)
def test_values_are_scaled_as_those_of_files(tmp_path, name, caplog):
    caplog.set_level("INFO", logger="moco")
    images, last = VALUES[name](), (0, 3, 1, 2)
    data = saved(tmp_path, images)
    wanted = sources.open_source(data, "train")
    said = [record.getMessage() for record in caplog.records]
    assert wanted.reading.reason and len(wanted.read(0).unique()) > 2
    mapped = np.lib.format.open_memmap(tmp_path / "all", "w+", images.dtype, images.shape)
    mapped[:] = images
    native = images.astype(images.dtype.newbyteorder("="))
    pairs = [(image, 0) for image in images]
    given = [images, images.transpose(last), torch.from_numpy(native), mapped, pairs, [*native]]
    given += [images[:, ::-1][:, ::-1], [{"image": torch.from_numpy(each)} for each in native]]
    for each in given:
        caplog.clear()
        source = open_own(each, DataConfig(channels="auto"))
        assert source.reading == wanted.reading
        assert [record.getMessage() for record in caplog.records] == said
        assert source.images is None
        assert_alike(source, wanted)


@pytest.mark.parametrize("low, high", [(10.0, 90.0), ([0.0, 5.0, 9.0], [50.0, 60.0, 200.0])])
def test_a_range_that_is_set_counts(tmp_path, low, high):
    for images in (deep(0, 100, "f4"), deep(0, 100, "f4")[..., 0]):
        ends = {"min_value": low, "max_value": high, "channels": 3}
        wanted = sources.open_source(
            DataConfig(dataset="folder", root=saved(tmp_path, images).root, **ends), "train"
        )
        for given in (images, [*images], torch.from_numpy(images)):
            source = open_own(given, DataConfig(**ends))
            assert source.reading == wanted.reading and "as set" in source.reading.reason
            assert_alike(source, wanted)


def test_arrays_in_grey_and_in_many_bands(tmp_path):
    many = RNG.normal(size=(8, 20, 9, 9)).astype("f4")
    for images, channels in ((deep(0, 4095, "u2")[..., 0], "auto"), (many, 20)):
        folder = tmp_path / str(channels)
        folder.mkdir()
        data = saved(folder, images)
        data = DataConfig(dataset="folder", root=data.root, channels=channels)
        for given in (images, images[:, None] if channels == "auto" else [*images]):
            source = open_own(given, DataConfig(channels=channels))
            assert_alike(source, sources.open_source(data, "train"))


@pytest.mark.parametrize(
    "mode, kind, high", [("I;16", "u2", 4095), ("I", "i4", 150_000), ("F", "f4", 1)]
)
def test_pictures_of_more_than_8_bits_are_read_as_their_files(tmp_path, mode, kind, high):
    images = deep(0, high, kind)[..., 0]
    for number, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{number:03d}.tif", image)
    pictures = [Image.open(path) for path in sorted(tmp_path.glob("*.tif"))]
    assert {picture.mode for picture in pictures} == {mode}
    for channels in ("auto", 3, 4):
        data = DataConfig(dataset="folder", root=str(tmp_path), channels=channels)
        wanted = sources.open_source(data, "train")
        source = open_own(pictures, DataConfig(channels=channels))
        assert source.reading == wanted.reading
        assert_alike(source, wanted)


def test_bytes_stay_as_they_are_and_are_no_values_to_scale(caplog):
    caplog.set_level("INFO", logger="moco")
    images = RNG.integers(0, 9, (8, 12, 10, 3), dtype=np.uint8)
    for given in (images, [*images], torch.from_numpy(images)):
        source = open_own(given, DataConfig(channels="auto"))
        assert source.reading.reason == "" and caplog.text == ""
        assert source.read(3).equal(torch.from_numpy(images[3]).permute(2, 0, 1))
    for given in (images, [*images]):
        open_own(given, DataConfig(max_value=255.0))
        assert caplog.text.count("do nothing here: the images looked at have 8 bits") == 1
        caplog.clear()


def test_test_images_have_the_range_of_the_training_images():
    train, labels = deep(0, 4095, "u2"), [0, 1] * 10
    for test in (train // 8, [*train // 8], torch.from_numpy(train // 8)):
        test = (test, labels) if not isinstance(test, list) else [*zip(test, labels, strict=True)]
        bank, queries = open_pair(((train, labels), test), DataConfig(channels="auto"))
        assert queries.reading is bank.reading and bank.reading.high == (4095,)
        assert 25 < queries.read(0).max() < 40


def test_test_images_of_floats_have_the_range_that_is_set_beside_training_images_of_bytes():
    train, labels = RNG.integers(0, 255, (20, 12, 10, 3), dtype=np.uint8), [0, 1] * 10
    for bank in ((train, labels), [*zip(train, labels, strict=True)]):
        pair = bank, (train / 255, labels)
        images, queries = open_pair(pair, DataConfig(min_value=0.0, max_value=1.0))
        assert queries.read(3).equal(images.read(3))
        with pytest.raises(BadImage, match="hold 8 bits: give all of one type, or set data.min"):
            open_pair(pair, DataConfig())[1].read(3)


def test_values_without_a_range_are_no_images():
    images = [*RNG.integers(0, 255, (200, 12, 10, 3), dtype=np.uint8)]
    whole, images[1] = images[1], images[1] / 255
    source = open_own(images, DataConfig())  # which looks at some of them, not at this one
    with pytest.raises(
        BadImage, match="item 1: holds float64 values, and the .* hold 8 bits: give"
    ):
        source.read(1)
    source = open_own(images, DataConfig(max_value=1.0))
    assert source.read(1).equal(torch.from_numpy(whole).permute(2, 0, 1))


@pytest.mark.parametrize(
    "images, line",
    [
        (deep(0, 1, "f4") > 0.5, r"images holds bool values: give uint8, as 255 \* x.astype"),
        ([*(deep(0, 1, "f4") > 0.5)], "images: item 0: holds bool values: give uint8"),
        (torch.zeros(4, 9, 9, dtype=torch.bool), "images holds bool values: give uint8"),
        (deep(0, 9, "i4").astype(object), "item 0: holds object values: give numbers of one type"),
        (deep(0, 9, "f4") * 1j, "images holds complex64 values: give integers or floats"),
        ([*deep(0, 1, "f4"), *deep(0, 9, "u2")], "auto but the images hold float32 and uint16"),
        (np.full((9, 8, 8), 7, "f4"), "every value of the 9 images looked at becomes"),
        (np.full((9, 8, 8), np.nan), "none of them is a finite number, give images"),
        (np.full((9, 8, 3), 7, "f4"), "is one image H x W x C: give many"),
        (deep(0, 1, "f4")[0, 0, 0], "has the shape"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_give(images, line):
    with pytest.raises(UserError, match=line):
        open_own(images, DataConfig(channels="auto"))


def test_floats_that_numpy_lacks_are_read_as_they_are():
    values = torch.from_numpy(deep(0, 1, "f4")).bfloat16()
    wanted = open_own(values.float(), DataConfig())
    for given in (values, [*values]):
        assert_alike(open_own(given, DataConfig()), wanted)
    assert_alike(open_own(values.float().requires_grad_(), DataConfig()), wanted)


def test_masked_floats_are_no_data_and_other_masks_hide_nothing():
    values = deep(0, 1, "f4")
    hidden = np.ma.masked_array(np.where(values < 0.2, 1e20, values), values < 0.2)
    wanted = open_own(np.where(values < 0.2, np.nan, values), DataConfig())
    for given in (hidden, [*hidden]):
        assert_alike(open_own(given, DataConfig()), wanted)
    whole = RNG.integers(0, 255, (8, 12, 10, 3), dtype=np.uint8)
    assert_alike(
        open_own(np.ma.masked_array(whole, whole < 9), DataConfig()), open_own(whole, DataConfig())
    )


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to("meta")])
def test_tensors_that_numpy_lacks_are_refused(change):
    images = change(torch.from_numpy(deep(0, 1, "f4")))
    with pytest.raises(UserError, match="^images is a tensor that NumPy lacks, .*: give a dense"):
        open_own(images, DataConfig())
    with pytest.raises(UserError, match="^images: item 0: is a tensor that NumPy lacks, "):
        open_own([images[0]], DataConfig(channels="auto"))


def test_what_is_clipped_by_the_range_that_fits_best_has_another_remedy(caplog):
    caplog.set_level("INFO", logger="moco")
    images = deep(0, 1, "f4")
    images[:, :2] = np.inf
    open_own(images, DataConfig())
    assert "% of the values are clipped: infinite ones are, which NaN would mark" in caplog.text
    caplog.clear()
    open_own(deep(0, 1, "f4") * 1.4, DataConfig())  # taken for a little more than 1
    assert (
        "% of the values are clipped: set data.min_value 0 and data.max_value 1.39" in caplog.text
    )


def test_what_tells_images_from_others_does_not_depend_on_their_range():
    images = deep(0, 4095, "u2")
    found = [
        sources.identify(open_own(given, data), "")
        for given in (images, [*images])
        for data in (DataConfig(), DataConfig(max_value=9000.0))
    ]
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0] != sources.identify(open_own(images + 1, DataConfig()), "")
