"""Choices of the graph formats: operator set, 16 bits, images of any size."""

import re
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from networks import V3_VIT, images, save_ours

from moco.checkpoints import export as room
from moco.checkpoints.load import load_encoder
from moco.checkpoints.places import GraphOptions
from moco.config import ModelConfig, UserError

TINY = ModelConfig(backbone="test_resnet", stem="cifar", queue_size=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "a.ckpt"
    encoder, _ = save_ours(path, TINY)
    return path, encoder.backbone


def test_onnx_in_half_of_any_size_and_of_a_chosen_opset(source, tmp_path):
    path, backbone = source
    graph = GraphOptions(opset=18, fp16=True, free_size=True)
    result = room.export(path, "onnx", tmp_path / "a.onnx", graph=graph)
    content = onnx.load(tmp_path / "a.onnx")
    assert [entry.version for entry in content.opset_import if entry.domain == ""] == [18]
    kinds = {tensor.data_type for tensor in content.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    batch = images(3, 40)[:, :, :, :24]
    found = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
    with torch.no_grad():
        wanted = backbone(batch)
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert found.dtype == torch.float32 and 1e-5 < difference < room.FP16_TOLERANCE
    assert 1e-5 < result["max_feature_difference"] < room.FP16_TOLERANCE


def test_a_network_of_one_size_is_not_traced_for_any(tmp_path, monkeypatch):
    save_ours(tmp_path / "a.ckpt", V3_VIT)
    monkeypatch.setattr(torch.onnx, "export", None)
    with pytest.raises(UserError, match="--free_size: vit_tiny.* 32 x 32 alone.*--image_size"):
        room.export(tmp_path / "a.ckpt", "onnx", tmp_path / "b", graph=GraphOptions(free_size=True))


def test_an_opset_that_torch_cannot_give_is_said(source, tmp_path, monkeypatch):
    """Where it cannot convert, torch writes another one and only logs it."""

    written = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 18}))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: written)
    for opset in (17, 90):
        with pytest.raises(UserError, match=rf"--opset {opset}: torch .* in opset 18, since"):
            room.export(source[0], "onnx", tmp_path / "b", graph=GraphOptions(opset=opset))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "graph", "words"),
    [
        ("onnx", GraphOptions(opset=16), "--opset 16 is below 17"),
        ("timm", GraphOptions(opset=18), "--opset is of --format onnx: leave it out"),
        ("torch-export", GraphOptions(fp16=True), "--fp16 is of --format onnx: leave it out"),
        ("safetensors", GraphOptions(free_size=True), "--free_size is of --format onnx"),
    ],
)
def test_choices_that_a_format_does_not_have_are_refused(source, tmp_path, form, graph, words):
    with pytest.raises(UserError, match=words):
        room.export(source[0], form, tmp_path / "b", graph=graph)


@pytest.mark.parametrize(
    ("kind", "loading"),
    [("torch-export", "torch.export.load(FILE).module()"), ("onnx", "InferenceSession(FILE)")],
)
def test_a_graph_in_the_place_of_a_checkpoint_is_called_what_it_is(source, tmp_path, kind, loading):
    room.export(source[0], kind, tmp_path / "graph")
    with pytest.raises(UserError, match=re.escape(loading)) as caught:
        load_encoder(tmp_path / "graph")
    assert "give the checkpoint that it was made of" in str(caught.value)
