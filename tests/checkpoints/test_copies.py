"""Files with several copies of a network's weights: which one is read, and which are named."""

import pytest
import torch
from networks import distance, images, prefixed, torchvision_resnet
from test_init_from import IMAGENET, start

from moco.checkpoints.load import load_encoder
from moco.config import UserError


@pytest.mark.parametrize(
    ("read", "beside"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema")],  # timm's and DeiT's training
)
def test_an_average_of_the_weights_is_named_where_it_is_left_out(tmp_path, read, beside):
    network, average = torchvision_resnet(0), torchvision_resnet(1)
    content = {read: network.state_dict(), beside: average.state_dict(), "epoch": 3}
    torch.save(content | {"optimizer": {"state": {}}}, tmp_path / "a.pth")
    loaded = load_encoder(tmp_path / "a.pth")
    assert distance(network, loaded.backbone, images()) == 0
    assert loaded.report.endswith(f"left out: {beside} (120)")
    encoder, report = start(tmp_path / "a.pth", IMAGENET)
    assert distance(network, encoder.backbone, images()) == 0
    assert report.endswith(f"left out: {beside} (120)")


def test_copies_that_have_no_usual_place_are_named_with_what_to_do(tmp_path):
    state = prefixed("backbone.", torchvision_resnet().state_dict())
    torch.save({"student": state, "teacher": state, "epoch": 3}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="under student, teacher alone: store.*'student'") as error:
        load_encoder(tmp_path / "dino.pth")
    assert "\n" not in str(error.value)
    torch.save(torch.load(tmp_path / "dino.pth")["teacher"], tmp_path / "one.pth")
    assert load_encoder(tmp_path / "one.pth").model.backbone == "resnet18"


def test_torchs_averaged_model_is_read_although_it_counts(tmp_path):
    network = torchvision_resnet()
    average = torch.optim.swa_utils.AveragedModel(network)
    torch.save(average.state_dict(), tmp_path / "ema.pth")
    loaded = load_encoder(tmp_path / "ema.pth")
    assert distance(network, loaded.backbone, images()) == 0
    assert loaded.report.endswith("left out: n_averaged (1)")
