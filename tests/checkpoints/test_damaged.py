"""Damaged and crafted files: each is refused in one line, soon, and before it fills the memory."""

import dataclasses
import json
import random
import zipfile

import pytest
import timm
import torch
from networks import SMALL, module_state, prefixed, save_ours, torchvision_resnet
from safetensors.torch import save_file
from test_load import official
from torch import nn

from moco.checkpoints.layouts import read_contents
from moco.checkpoints.load import load_encoder
from moco.checkpoints.read import read_state, tensors_of
from moco.checkpoints.start import restore_pretraining
from moco.config import DataConfig, TrainConfig, UserError


def refused(path, words: str, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# Bits that have flipped


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({f"{i}.weight": torch.full((8, 8), float(i)) for i in range(4)}, path)
    content, whole = path.read_bytes(), tensors_of(read_state(path), path)
    draw, noticed = random.Random(0), 0
    for _ in range(300):
        flipped, bit = bytearray(content), draw.randrange(8 * len(content))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = tensors_of(read_state(path), path)
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(found[name], whole[name]) for name in whole), bit
    assert noticed > 30  # the rest is padding


def test_a_flipped_bit_in_a_weight_is_called_damage_on_every_road(tmp_path):
    path = tmp_path / "last.ckpt"
    save_ours(path, SMALL)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda item: item.file_size)
    content[record.header_offset + 200 + record.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself reads it
    refused(path, "is damaged or cut short")
    with pytest.raises(UserError, match="is damaged or cut short"):
        restore_pretraining(path, module_state(SMALL)[0])


# Numbers that are no weights


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, dtype):
    state = torchvision_resnet().state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(dtype)
    torch.save(state, tmp_path / "a.pth")
    words = f"no floating-point numbers: layer1.0.conv1.weight .{dtype}."
    refused(tmp_path / "a.pth", words)
    assert words[:40] in load_encoder(tmp_path / "a.pth", allow_partial=True).report


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "sparse", "csr", "quantised", "nested"])
def test_tensors_that_are_not_plain_are_refused(tmp_path, kind):
    make = {
        "meta": lambda: torch.zeros(3, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    torch.save(torchvision_resnet().state_dict() | {"bn1.weight": make[kind]()}, tmp_path / "a.pth")
    # From 2.15 on torch itself refuses to rebuild a nested tensor.
    refused(tmp_path / "a.pth", "bn1.weight is no plain tensor|_rebuild_nested_tensor")


# Sizes that are not there


def test_a_view_larger_than_its_storage_is_refused(tmp_path):
    state = torchvision_resnet().state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "claims a shape of 1048576x1048576x3x3")


def test_an_archive_that_inflates_is_refused(tmp_path):
    torch.save(torchvision_resnet().state_dict(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("a/data/9999", bytes(2**26))
    assert (tmp_path / "b.pth").stat().st_size < 2**22
    refused(tmp_path / "b.pth", "would inflate to")


@pytest.mark.parametrize("pointer", [[], [1, 2], [64], [-1], [float("nan")]])
def test_a_queue_pointer_that_is_no_place_is_refused(tmp_path, pointer):
    content = official(torchvision_resnet(), nn.Linear(128, 16))
    content["state_dict"]["module.queue_ptr"] = torch.tensor(pointer)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="queue_ptr is no place in a queue of 64"):
        read_contents(tmp_path / "a.pth")
    content["state_dict"]["module.queue"] = torch.zeros(16, 0)
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "queue_ptr is no place in a queue of 0")


def test_notes_of_absurd_depth_or_length_are_refused(tmp_path):
    deep = "[" * 100_000
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"moco": deep})
    refused(tmp_path / "a.safetensors", "damaged safetensors")
    (tmp_path / "config.json").write_text(deep)
    refused(tmp_path, "is no JSON")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "a" * 2**20}))
    refused(tmp_path, "timm did not write it")


GIANT = {"model__backbone": "vit_gigantic_patch14_224", "model__stem": "imagenet"}
GIANT |= {"model__width": 1.0}


def ours(**changes):
    """Make a checkpoint of ours whose settings were tampered with."""
    _, query, _ = module_state(SMALL)
    config = dataclasses.asdict(TrainConfig(model=SMALL, data=DataConfig(image_size=32)))
    for name, value in changes.items():
        group, field = name.split("__")
        config[group][field] = value
    state = {f"query_encoder.{name}": value for name, value in query.state_dict().items()}
    return {"state_dict": state, "config": config}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__channels": 2**30}, "channels is 1073741824: at most 4096"),
        ({"data__channels": 0}, "channels is 3|only in part|channels is 0"),
        ({"data__image_size": 2**30}, "image_size is 1073741824"),
        ({"model__width": 1e9}, "width is"),
        ({"model__width": float("nan")}, "width is nan"),
        ({"model__width": 8.0}, "only in part"),
        (GIANT, "nothing in it fits vit_gigantic"),
        ({"data__image_size": float("inf")}, "describes itself wrongly"),
        ({"data__channels": "many"}, "describes itself wrongly"),
    ],
)
def test_settings_of_absurd_size_are_refused(tmp_path, changes, words):
    torch.save(ours(**changes), tmp_path / "a.ckpt")
    if changes == {"data__channels": 0}:
        assert load_encoder(tmp_path / "a.ckpt").data["channels"] == 3  # as the weights say
    else:
        refused(tmp_path / "a.ckpt", words)


def test_shapes_of_absurd_size_are_refused(tmp_path):
    state = torchvision_resnet().state_dict()
    torch.save(state | {"conv1.weight": torch.zeros(0, 2**30, 7, 7)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "do not tell the architecture")
    refused(tmp_path / "a.pth", "channels is 1073741824", backbone="resnet18")
    small = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.zeros(8)}
    torch.save({"arch": "vit_gigantic_patch14_224", "state_dict": small}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "nothing in it fits vit_gigantic")
    refused(tmp_path / "a.pth", "nothing in it fits vit_gigantic", allow_partial=True)


@pytest.mark.parametrize(
    "arguments", [{"depth": 10**9}, {"embed_dim": 2**30}, {"depth": float("inf")}]
)
def test_arguments_of_absurd_size_are_refused(tmp_path, arguments):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    timm.models._hub.save_for_hf(network, str(tmp_path), safe_serialization=True)
    about = json.loads((tmp_path / "config.json").read_text())
    about["model_args"] = {"img_size": 32} | arguments
    (tmp_path / "config.json").write_text(json.dumps(about))
    refused(tmp_path, f"describes itself wrongly: ValueError: {next(iter(arguments))} is")


@pytest.mark.parametrize("shape", [(1, 0, 64), (0,), (1, 0, 0), (1, 7, 64), (2, 5), ()])
def test_positions_without_a_grid_are_refused(tmp_path, shape):
    network = timm.create_model("test_vit", num_classes=0, img_size=32)
    state = network.state_dict() | {"pos_embed": torch.zeros(shape)}
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "of other shape: pos_embed", backbone="test_vit", image_size=32)


def test_a_class_token_without_a_width_is_refused(tmp_path):
    state = {"cls_token": torch.zeros(()), "blocks.0.norm1.weight": torch.zeros(8)}
    torch.save(prefixed("module.base_encoder.", state), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "do not tell the architecture")


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224"],
)
def test_vits_without_a_grid_plus_one_token_are_no_traceback(tmp_path, name):
    with torch.device("meta"):
        state = timm.create_model(name, img_size=32, num_classes=0).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in state.items()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "fits vit_.* only in part")
