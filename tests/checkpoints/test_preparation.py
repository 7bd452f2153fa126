"""How images are prepared: as evaluation does it, told alike by every road to a network."""

import io
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from networks import SMALL, VIT, images, save_ours, torchvision_resnet
from PIL import Image

import moco
from moco.checkpoints import export as room
from moco.checkpoints.load import load_encoder
from moco.checkpoints.preparation import Preparation
from moco.config import DataConfig, UserError
from moco.evaluation.opening import data_settings
from moco.images.image_source import ImageSource
from moco.images.labelled import LabelledData
from moco.pixels import to_uint8

RGB = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
SIZES = [(61, 90), (90, 61), (32, 32), (20, 31), (33, 32), (500, 375)]


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def evaluated(source: ImageSource) -> torch.Tensor:
    config = DataConfig(dataset="folder", root="x", image_size=32, num_workers=0, **RGB)
    return next(LabelledData(source, config).batches(torch.device("cpu")))[0][0]


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_does_what_knn_and_probe_do(tmp_path, size):
    image, prepare = picture(*size), Preparation(3, 32, **RGB)
    image.save(tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = prepare(image)
    assert torch.equal(found, prepare(pixels)) and found.shape == (3, 32, 32)
    held = evaluated(ImageSource("held", pixels[None], [], None, [], 3))
    torch.testing.assert_close(found, held, rtol=0, atol=1e-5)
    streamed = evaluated(ImageSource("streamed", None, [str(tmp_path / "a.png")], None, [], 3))
    # Workers round to whole levels.
    assert (found - streamed).abs().max() <= 1.01 / 255 / min(RGB["std"])


def test_pictures_become_the_networks_channels():
    grey = Preparation(1, 16, [0.5], [0.25])
    colours = Preparation(3, 16, **RGB)
    assert grey(picture(20, 20)).shape == (1, 16, 16)
    assert colours(picture(20, 20).convert("L")).shape == (3, 16, 16)
    assert colours(picture(20, 20).convert("RGBA")).shape == (3, 16, 16)
    assert colours(torch.zeros(5, 3, 20, 20, dtype=torch.uint8)).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 20, 20, dtype=torch.bool),
        torch.zeros(20, 20, 3, dtype=torch.uint8),
        torch.zeros(20, 20, 3),
        np.zeros((20, 20, 3), np.uint8),
    ],
)
def test_what_would_be_prepared_wrongly_is_refused_with_what_to_give(image):
    prepare = Preparation(3, 16, **RGB, min_value=[-5.0], max_value=[4095.0])
    line = r"torch.uint8, or of other numbers, with \[-5.0\] scaled to 0 and \[4095.0\]"
    with pytest.raises(UserError, match=line):
        prepare(image)


@pytest.mark.parametrize("image", [torch.zeros(3, 20, 20), Image.new("I;16", (9, 9))])
def test_values_of_more_than_8_bits_need_a_range(image):
    with pytest.raises(UserError, match="torch.uint8$"):
        Preparation(3, 16, **RGB)(image)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_values_of_more_than_8_bits_are_scaled_by_the_range(kind):
    values = np.random.default_rng(0).integers(0, 5000, (20, 18)).astype(kind)
    levels = torch.from_numpy(to_uint8(values[None], (100.0,), (4095.0,)))
    ends = {"min_value": [100.0], "max_value": [4095.0]}
    grey = Preparation(1, 16, [0.5], [0.25], **ends)
    for given in (torch.from_numpy(values)[None], Image.fromarray(values)):
        assert torch.equal(grey(given), grey(levels))
    several = torch.from_numpy(values).expand(5, 1, 20, 18)
    assert torch.equal(grey(several), grey(levels.expand(5, 1, 20, 18)))
    colours = Preparation(3, 16, **RGB, **ends)
    assert torch.equal(colours(Image.fromarray(values)), colours(levels.expand(3, 20, 18)))
    alpha = Preparation(4, 16, [0.5] * 4, [0.25] * 4, **ends)
    whole = torch.cat([levels.expand(3, 20, 18), torch.full_like(levels, 255)])
    assert torch.equal(alpha(Image.fromarray(values)), alpha(whole))
    each = Preparation(3, 16, **RGB, min_value=[100.0], max_value=[9.0e2, 2e3, 4e3])
    bands = to_uint8(values[None].repeat(3, 0), (100.0,), (9.0e2, 2e3, 4e3))
    assert torch.equal(each(Image.fromarray(values)), each(torch.from_numpy(bands)))


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_pictures_are_turned_as_the_run_turned_them(tmp_path, exif):
    save_ours(tmp_path / "a.ckpt", SMALL)
    raw = torch.load(tmp_path / "a.ckpt", weights_only=True)
    raw["config"]["data"]["exif"] = exif
    torch.save(raw, tmp_path / "a.ckpt")
    room.export(tmp_path / "a.ckpt", "safetensors", tmp_path / "b")
    turned, file = picture(32, 32), io.BytesIO()
    about = turned.getexif()
    about[0x0112] = 6
    turned.save(file, "png", exif=about)
    for name in ("a.ckpt", "b"):
        transform = moco.load_backbone(tmp_path / name).transform
        upright = turned.rotate(-90) if exif == "apply" else turned
        plain = Image.fromarray(np.asarray(upright))
        assert torch.equal(transform(Image.open(file)), transform(plain)), name
        assert ("EXIF" in transform.in_words()) == (exif == "apply")


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "timm"])
def test_an_export_keeps_whether_dicom_is_shown_through_its_window(tmp_path, form, windowed):
    save_ours(tmp_path / "a.ckpt", VIT)
    raw = torch.load(tmp_path / "a.ckpt", weights_only=True)
    raw["config"]["data"] |= {"dicom_window": windowed, "max_value": 3071.0, "min_value": -1024.0}
    torch.save(raw, tmp_path / "a.ckpt")
    room.export(tmp_path / "a.ckpt", form, tmp_path / "b")
    for name in ("a.ckpt", "b"):
        loaded = load_encoder(tmp_path / name)
        data = data_settings(loaded, lambda stored: DataConfig(**{**stored, "root": "x"}))
        assert data.dicom_window == windowed
        assert ("not through its own window" in loaded.preparation.in_words()) != windowed


def test_how_the_views_of_training_are_resized_is_not_how_evaluation_does_it(tmp_path):
    save_ours(tmp_path / "a.ckpt", SMALL)
    raw = torch.load(tmp_path / "a.ckpt", weights_only=True)
    raw["config"]["data"]["interpolation"] = "bicubic"
    torch.save(raw, tmp_path / "a.ckpt")
    room.export(tmp_path / "a.ckpt", "safetensors", tmp_path / "b")
    image = picture(61, 90)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for name in ("a.ckpt", "b"):
        loaded = load_encoder(tmp_path / name)
        config = DataConfig(image_size=loaded.data["image_size"], interpolation="bicubic")
        source = ImageSource("held", pixels, [], None, [], 3)
        judged = next(LabelledData(source, config).batches(torch.device("cpu")))[0][0]
        torch.testing.assert_close(loaded.preparation(image), judged, rtol=0, atol=1e-5)
        assert loaded.backbone.pretrained_cfg["interpolation"] == "bilinear"


def test_the_transform_goes_to_workers_with_its_network(tmp_path):
    save_ours(tmp_path / "a.ckpt", SMALL)
    backbone = moco.load_backbone(tmp_path / "a.ckpt")
    again = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(again.transform(picture(40, 50)), backbone.transform(picture(40, 50)))
    assert torch.equal(again(images()), backbone(images()))


# pretrained_cfg


def test_timm_reads_the_runs_own_size_mean_and_deviation(tmp_path):
    save_ours(tmp_path / "a.ckpt", SMALL, channels=1)
    room.export(tmp_path / "a.ckpt", "safetensors", tmp_path / "b")
    save_ours(tmp_path / "vit.ckpt", VIT)
    room.export(tmp_path / "vit.ckpt", "timm", tmp_path / "hub")
    grey = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.25]}
    rgb = {"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    as_we_do = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    for name, wanted in (("a.ckpt", grey), ("b", grey), ("vit.ckpt", rgb), ("hub", rgb)):
        backbone = moco.load_backbone(tmp_path / name)
        assert timm.data.resolve_model_data_config(backbone) == wanted | as_we_do, name
    # At the size of the views timm's own transform is ours.
    found = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))
    torch.testing.assert_close(found(picture(32, 32)), backbone.transform(picture(32, 32)))


def test_another_size_crops_as_it_is_evaluated(tmp_path):
    torch.save(torchvision_resnet().state_dict(), tmp_path / "a.pth")
    config = timm.data.resolve_model_data_config(moco.load_backbone(tmp_path / "a.pth"))
    assert config["input_size"] == [3, 224, 224] and config["crop_pct"] == 0.875
    assert config["interpolation"] == "bilinear" and config["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("share", [0.95, 0.875, 7, "all"])
def test_a_timm_directorys_own_preparation_stays_with_its_network(tmp_path, share):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    timm.models._hub.save_for_hf(network, str(tmp_path / "hub"), safe_serialization=True)
    about = json.loads((tmp_path / "hub" / "config.json").read_text())
    said = {"crop_pct": share, "interpolation": "bicubic", "mean": [0.1] * 3, "std": [0.2] * 3}
    about["pretrained_cfg"] |= said
    (tmp_path / "hub" / "config.json").write_text(json.dumps(about))
    room.export(tmp_path / "hub", "safetensors", tmp_path / "a")
    sensible = share in (0.95, 0.875)
    sensible = share in (0.95, 0.875)
    for name in ("hub", "a"):
        loaded = load_encoder(tmp_path / name)
        found = timm.data.resolve_model_data_config(loaded.backbone)
        assert loaded.preparation.crop_pct == (share if sensible else 0.875), name
        assert (found["interpolation"], found["mean"]) == ("bicubic", [0.1] * 3), name
        if name == "hub":
            assert found["crop_pct"] == (share if sensible else 1.0)


@pytest.mark.parametrize("size", [(61, 90), (500, 375)])
def test_images_that_timm_squashes_are_not_cut_to_a_square(tmp_path, size):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    network.pretrained_cfg = network.pretrained_cfg | {"crop_mode": "squash", "crop_pct": 1.0}
    told = {"model_args": {"img_size": 32}, "safe_serialization": True}
    timm.models._hub.save_for_hf(network, str(tmp_path / "hub"), **told)
    room.export(tmp_path / "hub", "timm", tmp_path / "again")
    for name in ("hub", "again"):
        loaded = load_encoder(tmp_path / name)
        config = timm.data.resolve_model_data_config(loaded.backbone)
        wanted = timm.data.create_transform(**config, is_training=False)(picture(*size))
        found = loaded.backbone.transform(picture(*size))
        assert config["crop_mode"] == "squash" and "both sides" in loaded.preparation.in_words()
        # Pillow rounds to whole levels of 255; a square of the centre is off by far more.
        assert (found - wanted).abs().max() < 2 / 255 / min(config["std"]), name
