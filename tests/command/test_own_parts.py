"""Own backbones, views and pairs: runs with them train, resume to the same bits, and are judged."""

import copy
import random
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from door import PIXELS, STREAMED, TINY, assert_resumes, pretrain, pretrain_on_rank
from pictures import write_pictures
from PIL import Image
from runs import assert_same_end, load, same
from torch import nn
from torchvision.transforms import v2

import moco

pytestmark = pytest.mark.usefixtures("in_tmp")


class Maps(nn.Module):
    """A network with BatchNorm that gives maps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)
        )

    def forward(self, images):
        return self.layers(images)


class Flat(nn.Module):
    """A network without BatchNorm that gives features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images):
        return self.fc(images.flatten(1))


class Tuple(Flat):
    """Gives features twice."""

    def forward(self, images):
        features = super().forward(images)
        return features, features


def module(kind):
    torch.manual_seed(3)
    return kind()


def own(run_dir="run", **given):
    """Train on the pixels with own parts."""
    own_network = ("model.backbone", "model.stem", "model.width") if "backbone" in given else ()
    usual = {name: value for name, value in TINY.items() if name not in own_network}
    return moco.pretrain(PIXELS, dir=run_dir, **{**usual, **given})


@pytest.mark.parametrize(("kind", "dim"), [(Maps, 12), (Flat, 10)])
def test_an_own_backbone_trains_resumes_loads_and_exports(kind, dim):
    given = module(kind)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    run = own(recipe="quickstart", backbone=given, **{"data.upscale": 1, "data.channels": 3})
    assert same(given.state_dict(), before), "the module itself stays as it is"
    assert not same(run.encoder.state_dict(), before)
    images = torch.rand(3, 3, 16, 16)
    assert run.encoder(images).shape == (3, dim)
    stored = load(run.checkpoint)
    assert stored["config"]["model"]["backbone"] == f"own:{kind.__name__}"
    again = moco.load_backbone(run.checkpoint, backbone=module(kind))
    assert again(images).equal(run.encoder(images))
    with pytest.raises(moco.UserError, match=rf"own:{kind.__name__}, a module of the user's own"):
        moco.load_backbone(run.checkpoint)
    with pytest.raises(moco.UserError, match="only in part|nothing in it fits"):
        moco.load_backbone(run.checkpoint, backbone=Flat() if kind is Maps else Maps())
    with pytest.raises(moco.UserError, match="moco.pretrain.images, backbone=module, resume"):
        moco.pretrain(PIXELS, resume="run", extend=1, yes=True)
    for form in ("safetensors", "torch-export"):
        told = moco.export(run, form, form, backbone=module(kind))
        assert told["max_feature_difference"] < 1e-4 and told["feature_dim"] == dim
    exported = moco.load_backbone("safetensors", backbone=module(kind))
    assert exported(images).equal(run.encoder(images))
    with pytest.raises(moco.UserError, match="cannot hold own.*, a module of your own: take one"):
        moco.export(run, "timm", "hub", backbone=module(kind))
    assert_resumes(PIXELS, backbone=module(kind))


class Wrapped(nn.Module):
    """A network in a part whose name has a meaning in files of other code."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, Maps().layers)

    def forward(self, images):
        return getattr(self, self.name)(images)


def numbered():
    """A ResNet without its classifier, in the way that lightly's pages show."""
    network = timm.create_model("resnet18", channels=(4, 4, 8, 8), stem_width=4)
    return nn.Sequential(*[*network.children()][:-1])


@pytest.mark.parametrize("name", ["net", "backbone", "model", "encoder_q", "momentum_encoder", ""])
def test_names_of_an_own_backbone_are_not_taken_for_those_of_other_code(name):
    network = Wrapped(name) if name else numbered()
    once = {"trainer.max_steps": 1, "optim.lr": 1e-9, "optim.weight_decay": 0}
    run = own(backbone=network, **once)
    moco.export(run, "safetensors", "a.safetensors", backbone=network)
    torch.save(run.encoder.state_dict(), "a.pth")
    for file in ("a.safetensors", "a.pth"):
        again = moco.load_backbone(file, backbone=network)
        assert same(again.state_dict(), run.encoder.state_dict())
        other = copy.deepcopy(network)
        nn.init.zeros_(next(other.parameters()))
        started = own(f"from {file}", backbone=other, init_from=file, **once)
        first = next(started.encoder.parameters())
        torch.testing.assert_close(first, next(again.parameters()))


def test_a_run_says_that_a_backbone_still_has_its_classifier(said):
    own(backbone=Flat(), **{"trainer.max_steps": 1})
    assert sum("Flat are the 10 outputs of fc, a linear layer" in line for line in said) == 1


def test_an_own_backbone_is_written_as_onnx():
    pytest.importorskip("onnxscript")
    run = own(backbone=Maps())
    assert moco.export(run, "onnx", "a.onnx", backbone=Maps())["max_feature_difference"] < 1e-4


def test_batch_norm_kinds_apply_to_an_own_backbone(monkeypatch):
    from moco.algorithm.batch_norm import SplitBatchNorm
    from moco.training import run

    seen = []
    build = run.build_module
    monkeypatch.setattr(run, "build_module", lambda *a: seen.append(build(*a)) or seen[-1])
    own(backbone=Maps(), **{"model.key_bn": "split", "trainer.max_steps": 1})
    kinds = [isinstance(m, SplitBatchNorm) for m in seen[0].key_encoder.backbone.modules()]
    assert sum(kinds) == 1
    assert not any(isinstance(m, SplitBatchNorm) for m in seen[0].query_encoder.modules())


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (Tuple(), "backbone Tuple gives a tuple of 2 for 2 images: have its forward return one"),
        (nn.Linear(3, 2), r"cannot take images 2 x 3 x 16 x 16 \(.*\): change it"),
        (nn.Flatten(2), "Flatten gives the shape .* for 2 images"),
        (nn.Flatten(), "has no parameter that takes a gradient"),
        (
            torch.compile(Maps()),
            r"backbone was made by torch\.compile: give the module that it was",
        ),
        (torch.jit.script(nn.Conv2d(3, 4, 3)), r"backbone was made by torch\.jit: give the module"),
        (Flat, "backbone is of type type: give a torch.nn.Module"),
    ],
)
def test_an_own_backbone_that_gives_no_features_is_refused_in_one_line(network, line):
    with pytest.raises(moco.UserError, match=line) as error:
        own(backbone=network)
    assert "\n" not in str(error.value)


def test_settings_of_a_known_network_are_refused_beside_an_own_one():
    with pytest.raises(moco.UserError, match="model.stem cifar needs a ResNet.*own:Flat"):
        own(backbone=Flat(), **{"model.stem": "cifar"})
    with pytest.raises(moco.UserError, match="backbone and model.backbone say the same thing"):
        own(backbone=Flat(), **{"model.backbone": "resnet18"})
    with pytest.raises(moco.UserError, match="'own:Flat' stands for a module of your own"):
        pretrain(PIXELS, **{"model.backbone": "own:Flat"})


def jittered(image):
    """Draw from three generators."""
    level = random.random() * np.random.rand() * torch.rand(())
    return (image[:, 2:18, 2:18] * (0.5 + level / 2)).to(torch.uint8)


def batched(images, numbers):
    """Cut at a random place along both sides, and change the brightness."""
    at = (numbers[:, :2] * 5).long()
    rows = at[:, 0, None] + torch.arange(16, device=at.device)
    columns = at[:, 1, None] + torch.arange(16, device=at.device)
    place = torch.arange(len(images), device=at.device)[:, None, None]
    cut = images[place, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return cut.float() / 255 * (0.5 + numbers[:, 2, None, None, None] / 2)


def compose():
    return v2.Compose(
        [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )


def albumentations():
    library = pytest.importorskip("albumentations")
    return library.Compose([library.RandomResizedCrop((16, 16)), library.ColorJitter(p=0.8)])


VIEWS = {
    "torchvision": lambda: compose(),
    "two callables": lambda: (compose(), jittered),
    "generators": lambda: jittered,
    "albumentations": albumentations,
    "batched": lambda: moco.BatchedView(batched, draws=3),
    "two batched": lambda: [moco.BatchedView(batched, 3), moco.BatchedView(batched, 4)],
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("held", ["memory", "streamed"])
def test_own_views_resume_to_the_same_bits_with_other_workers(kind, held):
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    workers = {"data.num_workers": 1, "data.resident": "off" if held == "streamed" else "auto"}
    settings = {k: v for k, v in TINY.items() if k != "data.image_size"}  # as the views give
    run = moco.pretrain(pictures, views=VIEWS[kind](), dir="run", **settings | workers)
    stored = load(run.checkpoint)
    assert stored["config"]["data"]["views"] == "own"
    assert stored["decided"]["settings"]["data.image_size"] == 16
    assert_resumes(pictures, views=VIEWS[kind](), **{"data.num_workers": 0})
    with pytest.raises(moco.UserError, match="data.views is own, callables of the user's"):
        moco.pretrain(pictures, resume="run", extend=1, yes=True)


@pytest.mark.parametrize("kind", ["two callables", "batched"])
def test_own_views_may_stay_smaller_than_the_images_that_are_judged(kind):
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        names = [f"{n}.png" for n in range(16)]
        write_pictures(Path("labelled", folder), names, np.random.default_rng(0), size=(40, 40))
    settings = TINY | {"data.image_size": "auto", "data.image_size_end": 16, "run.knn_every": 1}
    run = moco.pretrain("labelled", views=VIEWS[kind](), dir="run", **settings)
    stored = load(run.checkpoint)
    assert stored["decided"]["settings"]["data.image_size"] == 32
    assert run.metrics["quality"]["rankme"] > 1, "measured, on views of their own size"


def test_own_views_see_their_own_draws_and_leave_the_generators_alone():
    from moco.config import DataConfig
    from moco.images.own import open_own
    from moco.images.own_views import open_views
    from moco.images.streamed import OwnCuts

    config = DataConfig(image_size=16, views="own")
    source = open_own(np.full((4, 20, 20, 3), 255, np.uint8), config)
    cuts = OwnCuts(source, config, 0, open_views(jittered))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    crops, bad = cuts.__getitems__((1, np.arange(4), 0))
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert all(map(same, states, now)) and bad == []
    assert crops.shape == (4, 2, 3, 16, 16)
    assert len(crops.flatten(2)[:, :, 0].unique()) > 4, "each image and view draws for itself"
    assert crops[2:3].equal(cuts.__getitems__((1, np.array([2]), 0))[0])
    assert not crops.equal(cuts.__getitems__((2, np.arange(4), 0))[0])


@pytest.mark.parametrize(
    ("views", "line"),
    [
        (lambda image: image[:, :10, :12], "views give 10 x 12 pixels, and data.image_size is 16"),
        (lambda image: image.float(), "values from .* leave Normalize out, since data.mean"),
        (lambda image: image.long(), "views give torch.int64: have them return uint8"),
        (lambda image: (image, image), "views give tuple: have each return one image"),
        (lambda image: image.no_such_name, "views raised AttributeError: .*given uint8 C x H x W"),
        (3, "views is int, int: give a recipe's name, one callable or two"),
        ([compose()] * 3, "views is Compose, Compose, Compose: give"),
        ([jittered, moco.BatchedView(batched, 3)], "one of single images and one of batches"),
        (moco.BatchedView(lambda x, u: x, 1), "views give torch.uint8 .*: have them return float"),
        (moco.BatchedView(lambda x, u: x.float()), "values from .*: leave Normalize out"),
        (moco.BatchedView(lambda x, u: x / 255), r"views give 2 x 3 x 20 x 20 of 2 images: have"),
        (moco.BatchedView(lambda x, u: x @ u), "views raised .*Error"),
    ],
)
def test_wrong_views_are_refused_in_one_line(views, line):
    with pytest.raises(moco.UserError, match=line) as error:
        own(views=views)
    assert "\n" not in str(error.value)


def test_a_view_that_fails_on_some_images_is_named():
    def picky(image):
        return image[:, 2:18, 2:18] if image[0, 0, 0] != PIXELS[5, 0, 0, 0] else image[:, 0:0]

    with pytest.raises(moco.UserError, match=r"cannot be read: image \d+: views give 0 x 20"):
        own(views=picky, **{"data.num_workers": 1})


def test_settings_of_recipes_are_idle_beside_own_views(said):
    own(views=jittered, **{"data.jitter": 0.3, "trainer.max_steps": 1})
    assert any("data.jitter (data.views is own)" in line for line in said)


@pytest.mark.parametrize("streamed", [False, True])
def test_pairs_resume_to_the_same_bits(images, streamed):
    settings = STREAMED if streamed else {}
    pairs = r"^(\d)\d"
    pretrain(images, pairs=pairs, **settings)
    assert load("run/checkpoints/last.ckpt")["config"]["data"]["pairs"] == pairs
    pretrain(images, "alone", **settings)
    assert not same(load("run/checkpoints/last.ckpt")["state_dict"],
                    load("alone/checkpoints/last.ckpt")["state_dict"])  # fmt: skip
    assert_resumes(images)


def test_pairs_of_a_function_resume_and_must_be_given_again():
    own(pairs=lambda place: place // 2)
    with pytest.raises(moco.UserError, match="data.pairs is own, a function of the user's"):
        moco.pretrain(PIXELS, resume="run", extend=1, yes=True)
    assert_resumes(PIXELS, pairs=lambda place: place // 2)


@pytest.mark.parametrize("kind", [np.asarray, list], ids=["array", "items"])
def test_a_function_is_given_the_places_in_the_images_where_some_are_set_aside(kind):
    images = np.random.default_rng(0).integers(0, 256, (640, 8, 8, 3), dtype=np.uint8)
    asked = []

    def naming(place):
        asked.append(place)
        return place // 2

    pretrain(kind(images), pairs=naming, **{"data.image_size": 8, "trainer.max_steps": 1})
    held = torch.randperm(640, generator=torch.Generator().manual_seed(0))[:64].tolist()
    assert asked == sorted({*range(640)} - {*held})
    noted = Path("run/held_out.txt").read_text().splitlines()
    assert sorted(int(name.split()[-1]) for name in noted) == sorted(held)


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ("(", "is no regular expression .*: mend it"),
        (r"^\d\d", "has no group: put what names the thing in parentheses"),
        (r"^(\d\d)\.jpg", "finds no two of 48 images that show the same thing .first .*00.jpg"),
        ("no-such.csv", "data.pairs 'no-such.csv' cannot be read"),
        (lambda path: path.no_such, "pairs raised AttributeError"),
        ({"00.jpg": "a"}, "pairs is a mapping: give pairs=mapping.get"),
    ],
)
def test_pairs_that_pair_nothing_are_refused_in_one_line(images, pairs, line):
    with pytest.raises(moco.UserError, match=line) as error:
        pretrain(images, pairs=pairs)
    assert "\n" not in str(error.value)
    with pytest.raises(moco.UserError, match="reads paths, and array of 48 images has none"):
        own(pairs="(a)")


def test_a_table_pairs_images(images, said):
    rows = [f"{i:02d}.jpg,{i // 3},{'no split' if i % 2 else 'train'}" for i in range(30)]
    Path("pairs.csv").write_text("\n".join(["path,label,set", *rows]))
    pretrain(images, pairs="pairs.csv", **{"trainer.max_steps": 1})
    line = next(line for line in said if line.startswith("pairs: "))
    assert re.match("pairs: 30 of 48 images have a partner, in 10 groups", line)


def test_other_pairs_are_another_run(images):
    """The table's name says nothing of what it holds."""
    rows = [f"{i:02d}.jpg,{i // 3}" for i in range(30)]
    Path("pairs.csv").write_text("\n".join(["path,label", *rows]))
    pretrain(images, pairs="pairs.csv")
    checkpoint = "run/checkpoints/step_000000002.ckpt"
    Path("pairs.csv").write_text("\n".join(["path,label", *rows[:-1], "29.jpg,0"]))
    with pytest.raises(moco.UserError, match="data.pairs names other images as showing the same"):
        moco.pretrain(images, resume=checkpoint)
    Path("pairs.csv").write_text("\n".join(["path,label", *rows[::-1]]))
    assert moco.pretrain(images, resume=checkpoint).metrics["steps"] == 6


def test_two_ranks_resume_own_parts_to_the_same_bits(two_ranks, tmp_path):
    parts = {"views": jittered, "backbone": module(Maps), "pairs": half}
    names = ("model.backbone", "model.stem", "model.width")
    settings = {name: value for name, value in TINY.items() if name not in names}
    settings |= {"data.num_workers": 1, "model.key_bn": "shuffle"}
    run = two_ranks.run(partial(on_rank, settings, parts), str(tmp_path))
    assert run[0][0]["steps"] == 6 and run[1] == ({}, False)
    shutil.copytree("run", "again")
    again = {"resume": "again/checkpoints/step_000000002.ckpt", "data.num_workers": 0}
    two_ranks.run(partial(on_rank, again, parts), str(tmp_path))
    assert_same_end("run", "again")


def half(place):
    """Pair neighbours."""
    return place // 2


def on_rank(settings, parts, folder):
    given = settings if "resume" in settings else {"dir": "run", **settings}
    return pretrain_on_rank(folder, **given, **parts)


def test_partners_are_others_of_the_group_and_change_from_epoch_to_epoch():
    from moco.images.pairs import Partners

    groups = torch.tensor([2, 0, 1, 0, 2, 2, 2, 3])
    partners, index = Partners(groups, seed=1), torch.arange(8)
    found = [partners(epoch, index) for epoch in range(64)]
    assert all(groups[each].equal(groups) for each in found)
    alone = torch.tensor([False, False, True, False, False, False, False, True])
    assert all((each == index).equal(alone) for each in found), "only those alone are their own"
    assert {int(each[0]) for each in found} == {4, 5, 6}, "each of the group is drawn"
    assert partners(3, index.flip(0)).flip(0).equal(found[3])
    there = partners.to(torch.device("meta"))  # as on a GPU, which no worker may touch
    assert there(3, index.to("meta")).device.type == "meta"
    assert partners.order.device.type == "cpu" and partners(3, index).equal(found[3])


@pytest.mark.parametrize("resident", ["memory", "off"])
def test_the_second_view_is_cut_from_the_partner(resident):
    from moco.config import DataConfig
    from moco.images.loader import PretrainData
    from moco.images.steps import Indices

    levels = np.arange(0, 240, 5, dtype=np.uint8)[:, None, None].repeat(20, 1).repeat(20, 2)
    plain = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "mean": [0.0], "std": [1.0]}
    config = DataConfig(
        dataset="own", channels=1, image_size=16, batch_size=48, pairs="own", resident=resident,
        num_workers=0, **plain,
    )  # fmt: skip
    images = levels if resident == "memory" else list(levels)
    data = PretrainData(config, 0, False, False, images, naming=half)
    data.prepare(torch.device("cpu"))
    index = torch.arange(48).flip(0)
    crops = None
    if resident == "off":
        crops, _ = data.cuts().__getitems__((0, index.numpy(), data.config.image_size))
    batch = data.on_after_batch_transfer(Indices(0, 0, index, crops), 0)
    query, key = (view[:, 0, 0, 0].mul(51).round().int() for view in
                  (batch.query_views[0], batch.key_views[0]))  # fmt: skip
    assert query.equal(index.int()) and key.equal(index.int() ^ 1)
