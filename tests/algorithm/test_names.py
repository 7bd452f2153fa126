"""Names of backbones: what timm's source tells without timm is what timm knows."""

from __future__ import annotations

import pytest
import timm
from timm.models import _registry

from moco.algorithm.names import check_backbone, find_keys, find_names, read_source
from moco.config import UserError


def test_the_source_tells_the_models_that_timm_knows_once_it_is_imported():
    texts = read_source()
    names = find_names(texts)
    assert {*timm.list_models()} <= {*names} <= {*_registry._model_entrypoints}
    assert {*_registry._model_entrypoints} <= {*names} | find_keys(texts), "former names as well"


@pytest.mark.parametrize("name", ["resnet18", "resnet50.a1_in1k", "gluon_resnet50_v1b"])
def test_a_name_that_timm_knows_is_left_to_it(name):
    assert timm.is_model(name)
    check_backbone(name, "model.backbone")


def test_a_source_that_tells_no_names_refuses_none(monkeypatch):
    with pytest.raises(UserError, match="model.backbone 'resnet5O' .* did you mean 'resnet50'"):
        check_backbone("resnet5O", "model.backbone")
    monkeypatch.setattr("moco.algorithm.names._registered", lambda: [])
    check_backbone("resnet5O", "model.backbone")
