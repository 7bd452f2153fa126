"""Values: which of a set's values become black and white, said, pinned, and stored with exports."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from pictures import write_pictures
from PIL import Image
from runs import at, load, run_tiny
from test_decode import deep_colour_png

import eval_knn
import export
from moco.checkpoints.load import load_encoder
from moco.checks import check
from moco.config import DataConfig, TrainConfig, UserError
from moco.images import levels, sources, values
from moco.images.decode import BadImage
from moco.images.scaling import Reading
from moco.pixels import to_uint8

pytestmark = pytest.mark.usefixtures("in_tmp")
RNG = np.random.default_rng(0)


def folder(root: Path | str, **settings) -> DataConfig:
    return DataConfig(dataset="folder", root=str(root), **settings)


def smooth(low: float, high: float, size: tuple[int, int] = (24, 24)) -> np.ndarray:
    """Make H W floats that fill low..high to both ends."""
    coarse = Image.fromarray(RNG.random((4, 4)).astype(np.float32)).resize(size[::-1])
    values = np.asarray(coarse)
    values = (values - values.min()) / (values.max() - values.min())
    return low + (high - low) * values


def write_set(root: Path, low: float, high: float, kind: str, ending: str = "tif", count=20):
    """Write images of values low..high in files of a type."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        array = smooth(low, high)
        array = array.astype(kind) if "f" in kind else np.rint(array).astype(kind)
        path = root / f"{number:02d}.{ending}"
        np.save(path, array) if ending == "npy" else tifffile.imwrite(path, array)
    return root


SETS = {
    "reflectance": (0, 1, "f4", "tif", (0, 1)),
    "floats of bytes": (0, 255, "f4", "tif", (0, 255)),
    "numpy's integers": (0, 255, "i8", "npy", (0, 255)),
    "12 bits in 16": (0, 4095, "u2", "tif", (0, 4095)),
    "10 bits in 16": (3, 1020, "u2", "npy", (0, 1023)),
    "Sentinel-2": (0, 10_000, "u2", "tif", (0, 10_000)),
    "16 bits": (0, 65_535, "u2", "tif", (0, 65_535)),
    "CT": (-1024, 2976, "i2", "tif", (-1024, 4095)),
    "signed floats": (-1, 1, "f4", "npy", (-1, 1)),
    "standardised": (-2.9, 2.9, "f4", "npy", (-3, 3)),
    "faint floats": (0, 0.0021, "f4", "tif", (0, 0.003)),
    "32 bits": (0, 150_000, "i4", "tif", (0, 150_000)),
}


@pytest.mark.parametrize("name", SETS)
def test_auto_is_what_people_use_for_these_values(tmp_path, name):
    low, high, kind, ending, wanted = SETS[name]
    source = sources.open_source(
        folder(write_set(tmp_path, low, high, kind, ending), channels=1), "train"
    )
    assert (source.reading.low, source.reading.high) == ((wanted[0],), (wanted[1],))
    assert "auto" in str(source.reading) and "\n" not in str(source.reading)
    levels = {int(v) for i in range(len(source)) for v in source.read(i).unique()}
    assert len(levels) >= 128 and max(levels) > 150 and source.images is None


@pytest.mark.parametrize(
    "seen, wanted",
    [
        ((0.0, 1.3), (0, 1)),  # overshoots, as after sharpening
        ((-0.01, 1.0), (0, 1)),
        ((0.0, 1.8), (0, 2)),  # but not 255
        ((0.0, 16.0), (0, 20)),
        ((12.0, 256.0), (0, 255)),
        ((0.0, 0.0), (0, 1)),
        ((-1000.0, 1900.0), (-1024, 4095)),
        ((-50.0, -10.0), (-128, 0)),
        ((0.0, 70_000.0), (0, 80_000)),
    ],
)
def test_the_range_for_what_was_seen(seen, wanted):
    assert levels.choose_range(*seen) == wanted


def test_a_few_hot_pixels_do_not_widen_the_range(tmp_path):
    for number in range(8):
        array = np.rint(smooth(0, 4000, (64, 64))).astype(np.uint16)
        array[0, 0] = 65_535
        np.save(tmp_path / f"{number}.npy", array)
    reading = sources.open_source(folder(tmp_path, channels=1), "train").reading
    assert reading.high == (4095,)


def test_sets_of_8_bits_are_read_as_ever_and_cost_no_pixel(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "read_values", None)  # a call would fail
    write_pictures(tmp_path, [f"{n}.png" for n in range(80)], RNG)
    headers = []
    read = values.read_header
    monkeypatch.setattr(values, "read_header", lambda *a: headers.append(a) or read(*a))
    source = sources.open_source(folder(tmp_path), "train")
    assert len(headers) == values.FILES
    assert source.reading == Reading(turn=True, windowed=True) and source.reading.reason == ""
    wanted = np.asarray(Image.open(source.paths[0]))
    assert torch.equal(source.read(0), torch.from_numpy(wanted.copy()).permute(2, 0, 1))


def test_a_range_for_files_of_8_bits_is_said_to_do_nothing(tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    write_pictures(tmp_path, ["0.png", "1.png"], np.random.default_rng(0))
    for settings, is_said in (({}, False), ({"min_value": 10.0}, True)):
        sources.open_source(folder(tmp_path, **settings), "train")
        assert ("do nothing here: the images looked at have 8 bits" in caplog.text) == is_said


def test_the_sample_is_bounded_in_values(tmp_path, monkeypatch):
    write_set(tmp_path, 0, 4000, "u2", count=20)
    monkeypatch.setattr(values, "VALUES", 24 * 24 * 5)
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert "5 of which" in source.reading.reason
    monkeypatch.setattr(values, "VALUES", 1)
    assert "1 of which" in values.settle(source.paths, folder(tmp_path, channels=1)).reason


def test_the_held_out_split_is_read_by_the_range_of_train(tmp_path):
    write_set(tmp_path / "train", 0, 4095, "u2")
    write_set(tmp_path / "test", 0, 200, "u2")
    test = sources.open_source(folder(tmp_path, channels=1), "test")
    assert test.reading.high == (4095,)


@pytest.mark.parametrize(
    "low, high, kind, settings, message",
    [
        (0, 1, "f4", {"max_value": 65_535}, "becomes 0: set data.min_value 0 and data.max_value 1"),
        (7, 7, "u2", {}, "give images that differ"),
        (50_000, 50_080, "u2", {}, r"set data.min_value 5000\d.* and data.max_value 500[78]\d"),
        (0, 4095, "u2", {"min_value": 5000.0, "max_value": 9000}, "set data.min_value 0 and"),
        (0, 4095, "u2", {"min_value": 5000.0}, "min_value 5000 is not below data.max_value 4095"),
    ],
)
def test_a_set_that_becomes_one_value_is_refused_with_what_to_set(
    tmp_path, low, high, kind, settings, message
):
    write_set(tmp_path, low, high, kind) if low != high else [
        np.save(tmp_path / f"{n}.npy", np.full((4, 4), low, kind)) for n in range(3)
    ]
    with pytest.raises(UserError, match=message) as caught:
        sources.open_source(folder(tmp_path, channels=1, **settings), "train")
    assert "\n" not in str(caught.value)


def test_few_levels_and_clipping_are_warned_of(tmp_path, said, caplog):
    caplog.set_level("INFO", logger="moco")
    data = folder(write_set(tmp_path, 0, 4095, "u2"), channels=1)
    sources.open_source(data, "train")
    assert not any("warning" in line for line in said)
    data.min_value, data.max_value = 0.0, 65_535.0
    sources.open_source(data, "train")
    assert any("17 of 256 levels: set data.min_value 0 and data.max_value 4095" in x for x in said)
    data.max_value = 2000.0
    sources.open_source(data, "train")
    assert any("% of the values are clipped: set data" in line for line in said)


@pytest.mark.parametrize(
    "low, high, kind, wanted",
    [
        (270, 320, "f4", "data.min_value 270 and data.max_value 320"),  # kelvin
        (29_000, 31_000, "u2", "data.min_value 29000 and data.max_value 31000"),  # thermal
    ],
)
def test_values_far_from_zero_are_warned_of_with_a_range_that_shows_them(
    tmp_path, low, high, kind, wanted, said, caplog
):
    caplog.set_level("INFO", logger="moco")
    for number in range(4):
        tifffile.imwrite(tmp_path / f"{number}.tif", smooth(low, high).astype(kind))
    sources.open_source(folder(tmp_path, channels=1), "train")
    assert sum(f"of 256 levels: set {wanted}" in line for line in said) == 1
    words = wanted.split()
    data = folder(tmp_path, channels=1, min_value=float(words[1]), max_value=float(words[4]))
    assert len(sources.open_source(data, "train").read(0).unique()) > 100


def test_values_at_both_ends_of_a_range_have_no_better_one(tmp_path, said, caplog):
    caplog.set_level("INFO", logger="moco")
    array = np.concatenate([smooth(0, 3000), smooth(62_000, 65_535)]).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    sources.open_source(folder(tmp_path, channels=1), "train")
    assert any("levels: set data.min_value and data.max_value to those between" in x for x in said)


def test_files_of_few_values_are_said_to_hold_no_more(tmp_path, said, caplog):
    caplog.set_level("INFO", logger="moco")
    np.save(tmp_path / "a.npy", np.arange(16, dtype=np.uint16).reshape(4, 4))
    sources.open_source(folder(tmp_path, channels=1, max_value=255), "train")
    data = folder(tmp_path, channels=1)
    sources.open_source(data, "train")
    assert any("set data.min_value 0 and data.max_value 15" in line for line in said)
    assert any("use 16 of 256 levels: the images hold no more" in line for line in said)


def test_colours_of_16_bits_are_looked_at_whole(tmp_path, said, caplog, monkeypatch):
    caplog.set_level("INFO", logger="moco")
    deep = RNG.integers(0, 4096, (3, 24, 24, 3), dtype=np.uint16)
    for number, pixels in enumerate(deep):
        deep_colour_png(tmp_path / f"{number}.png", pixels)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imagecodecs", None)
        source = sources.open_source(folder(tmp_path), "train")
        assert source.reading.reason == "" and len(source.read(0).unique()) == 16
        assert any("16 of 256 levels in 3 files looked at: pip install imagecodecs" in line
                   for line in said)  # fmt: skip
        assert any("no range was chosen" in line for line in said)
    pytest.importorskip("imagecodecs")
    source = sources.open_source(folder(tmp_path, channels="auto"), "train")
    assert (source.channels, source.reading.high) == (3, (4095,))
    wanted = to_uint8(deep[1].transpose(2, 0, 1), (0.0,), (4095.0,))
    assert torch.equal(source.read(1), torch.from_numpy(wanted))


def test_a_run_that_began_without_a_range_goes_on_without_one(tmp_path, monkeypatch):
    """As one of an older version, which cut colours of 16 bits to 8."""
    for number in range(48):
        pixels = RNG.integers(0, 4096, (20, 20, 3), dtype=np.uint16)
        deep_colour_png(tmp_path / f"{number:02}.png", pixels)
    words = ["--trainer.max_epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imagecodecs", None)
        run_tiny(tmp_path, *words)
    whole = load("run/checkpoints/last.ckpt")
    for name in ("step_000000003.ckpt", "last.ckpt"):
        Path("run/checkpoints", name).unlink()
    run_tiny(tmp_path, *words, "--resume", "run")
    again = load("run/checkpoints/last.ckpt")
    assert again["decided"]["max_value"] == []
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name


def test_what_is_no_number_is_a_bad_file_and_no_traceback(tmp_path):
    for number, array in enumerate([np.full((4, 4), 1j), np.full((4, 4), "a"), smooth(0, 1)]):
        np.save(tmp_path / f"{number}.npy", array)
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    assert source.reading.high == (1,)
    for row, kind in enumerate(("complex128", "<U1")):
        with pytest.raises(BadImage, match=f"{row}.npy: holds values of type {kind}"):
            source.read(row)


def test_the_largest_values_of_32_bits_are_settings_too():
    check(TrainConfig(data=DataConfig(root="x", min_value=[-4e38], max_value=[5e9])))


def test_the_order_of_bytes_is_no_type_of_its_own(tmp_path):
    for number, order in enumerate("<><>"):
        np.save(tmp_path / f"{number}.npy", smooth(0, 1).astype(f"{order}f4"))
    reading = sources.open_source(folder(tmp_path, channels=1), "train").reading
    assert reading.high == (1,) and "(auto: float32 images" in str(reading)
    write_set(tmp_path / "b", 0, 4095, ">u2", "npy", count=3)
    with pytest.raises(UserError, match=r"hold float32 and uint16: convert them to one type"):
        sources.open_source(folder(tmp_path, channels=1), "train")


def test_integers_and_floats_in_one_set_have_no_common_range(tmp_path):
    write_set(tmp_path, 0, 1, "f4", count=3)
    write_set(tmp_path / "b", 0, 4095, "u2", count=3)
    with pytest.raises(UserError, match=r"hold float32 and uint16: convert them to one type"):
        sources.open_source(folder(tmp_path, channels=1), "train")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_value": 5.0, "max_value": 5.0}, "min_value 5.0 is not below data.max_value 5.0"),
        ({"max_value": [1.0, 2.0]}, "max_value has 2 values for data.channels 3"),
        ({"max_value": "most"}, "max_value is 'most': give a number"),
        ({"min_value": [0.0], "max_value": [1.0, 0.0, 1.0]}, "is not below"),
        ({"max_value": float("nan")}, "finite"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_ranges_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check(TrainConfig(data=DataConfig(root="x", **settings)))


RUN = ["--data.channels", "1", "--data.image_size", "16", "--trainer.max_epochs", "1"]


def test_auto_is_said_pinned_and_kept_by_a_resumed_run(tmp_path, said, monkeypatch):
    root = write_set(tmp_path / "images", 0, 3000, "u2", count=48)
    run_tiny(root, *RUN)
    line = "values: 0 becomes 0 and 4095 becomes 255 (auto: uint16 images"
    assert sum(line in text for text in said) == 1
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["data"]["max_value"] == "auto" and stored["decided"]["max_value"] == [4095.0]
    assert at(1)["decided"]["min_value"] == [0.0]
    whole = load("run/checkpoints/last.ckpt")
    for name in ("step_000000003.ckpt", "last.ckpt"):
        Path("run/checkpoints", name).unlink()
    monkeypatch.setattr(values, "choose_range", lambda *_: (0.0, 10_000.0))  # another sample
    run_tiny(root, *RUN, "--resume", "run")
    again = load("run/checkpoints/last.ckpt")
    assert again["decided"]["max_value"] == [4095.0] and any("as the run began" in x for x in said)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name


def test_evaluation_and_exports_take_the_range_of_the_run(tmp_path, said):
    for split in ("train", "test"):
        for name, high in (("a", 3000), ("b", 400)):
            write_set(tmp_path / "images" / split / name, 0, high, "u2", count=12)
    run_tiny(tmp_path / "images", *RUN, "--model.queue_size", "16")
    last = "run/checkpoints/last.ckpt"
    assert load_encoder(last).data["max_value"] == [4095.0]
    eval_knn.main(["--checkpoint", last, "--baselines", "false", "--k", "[5]"])
    assert "values: 0 becomes 0 and 4095 becomes 255 (as set: " in "\n".join(said)
    result = export.main(
        ["--checkpoint", last, "--format", "safetensors", "--output", "e.safetensors"]
    )
    assert result["max_value"] == [4095.0]
    assert load_encoder("e.safetensors").data["max_value"] == [4095.0]


def test_a_timm_directory_and_its_card_hold_the_range(tmp_path):
    root = write_set(tmp_path / "images", -1024, 2976, "i2", count=48)
    run_tiny(root, *RUN, "--model.stem", "imagenet", "--model.width", "1")
    export.main(
        ["--checkpoint", "run/checkpoints/last.ckpt", "--format", "timm", "--output", "hub"]
    )
    wanted = {"min_value": [-1024.0], "max_value": [4095.0]}
    told = json.loads(Path("hub/config.json").read_text())["moco"]["preparation"]
    assert wanted.items() <= told.items()
    assert wanted.items() <= load_encoder("hub").data.items()
    words = (
        "8 bits, turned upright as its EXIF says, with [-1024.0] scaled to 0 and [4095.0] to 255"
    )
    assert words in Path("hub/README.md").read_text()


def test_a_run_of_a_version_without_these_settings_ignores_exif_as_it_did():
    stored = {"data": {"root": "x", "max_value": 65_535}}
    data = TrainConfig.from_dict(stored).data
    assert (data.exif, data.max_value) == ("ignore", 65_535)


NO_DATA = [("f4", -9999, (0, 1)), ("f4", -3.4028234663852886e38, (0, 1)), ("i2", -32768, (0, 4095))]


@pytest.mark.parametrize("kind, mark, wanted", NO_DATA)
@pytest.mark.parametrize("is_named", [True, False])
def test_marks_of_no_data_do_not_widen_the_range(tmp_path, caplog, kind, mark, wanted, is_named):
    for number in range(8):
        array = smooth(0, 0.9 if kind == "f4" else 3000, (32, 32)).astype(kind)
        array[:8] = mark
        tag = [(42113, "s", 0, repr(mark), True)] if is_named else None
        tifffile.imwrite(tmp_path / f"{number}.tif", array, extratags=tag)
    caplog.set_level("INFO", logger="moco")
    source = sources.open_source(folder(tmp_path, channels=1), "train")
    said = [line for line in caplog.messages if line.startswith("warning")]
    if is_named:
        assert (source.reading.low, source.reading.high) == tuple((float(end),) for end in wanted)
        pixels = source.read(0)
        assert not pixels[:, :8].any() and len(pixels[:, 8:].unique()) > 64 and not said
    else:
        words = f"25 % of the values are {mark:.10g}, and if that marks no data set data.min_value"
        assert len(said) == 1 and f"{words} 0 and data.max_value {wanted[1]}" in said[0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_grey_png_with_alpha_is_grey(tmp_path, channels):
    codecs = pytest.importorskip("imagecodecs")
    deep = np.stack([smooth(0, 4095), smooth(0, 4095)], -1).astype("u2")
    (tmp_path / "a.png").write_bytes(codecs.png_encode(deep))
    assert sources.open_source(folder(tmp_path, channels="auto"), "train").channels == 1
    source = sources.open_source(folder(tmp_path, channels=channels), "train")
    grey, alpha = to_uint8(deep.transpose(2, 0, 1), (0.0,), (4095.0,))
    wanted = {1: [grey], 3: [grey] * 3, 4: [grey] * 3 + [alpha]}[channels]
    assert source.reading.high == (4095,)
    assert torch.equal(source.read(0), torch.from_numpy(np.stack(wanted)))


def test_a_set_of_which_nothing_can_be_read_names_the_first_reason(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"none of 1 files .* first .*a.npy: has the shape \(5, 8"):
        sources.open_source(folder(tmp_path, channels="auto"), "train")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_value": [0.0, 1.0]}, "data.min_value has 2 values for data.channels 5: give one"),
        ({"max_value": [9.0] * 6}, "data.max_value has 6 values for data.channels 5"),
        ({"min_value": []}, "data.min_value has 0 values for data.channels 5"),
    ],
)
def test_a_value_for_each_of_other_channels_is_refused(tmp_path, settings, message):
    for number in range(4):
        bands = np.random.default_rng(number).integers(0, 3000, (24, 24, 5)).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{number}.tif", bands, planarconfig="contig")
    with pytest.raises(UserError, match=message):
        sources.open_source(folder(tmp_path, channels="auto", **settings), "train")
