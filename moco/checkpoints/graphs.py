"""The formats that hold a network as a graph, ONNX and torch-export, and their choices.

Shapes: N images, H W their pixels, S the side of the network's images.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.checkpoints.describe import Features, Files, describe, saved
from moco.checkpoints.load import Loaded
from moco.checkpoints.matching import with_class
from moco.checkpoints.places import GraphOptions
from moco.config import UserError


@torch.no_grad()
def _traced_with(loaded: Loaded, graph: GraphOptions) -> dict[str, Any]:
    """Return the example and the free dimensions that both exporters are given.

    Raises:
        UserError: Images of any size are wanted, and the network takes those of one size alone.
    """
    channels, side = loaded.data["channels"], loaded.data["image_size"]
    free = {0: torch.export.Dim("batch")}
    if graph.free_size:
        try:
            loaded.backbone(torch.zeros(1, channels, 2 * side, side))
        except Exception as error:  # each network refuses in its own way
            raise UserError(
                f"--free_size: {loaded.model.backbone} takes images of {side} x {side} alone "
                f"({with_class(error)}): leave it out, and choose another by --image_size"
            ) from None
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    images = torch.zeros(2, channels, side, side)  # the values do not matter
    return {"args": (images,), "dynamic_shapes": (free,)}


class _InHalf(nn.Module):
    """A network in float16 whose images and features are float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.half()).float()


def write_onnx(loaded: Loaded, checkpoint: Path, licence: str, graph: GraphOptions) -> Files:
    """Write one file with weights, graph and the note as metadata.

    Raises:
        UserError: Above 2 GiB, or torch has no way to the wanted opset.
    """
    size = sum(tensor.nbytes for tensor in loaded.backbone.state_dict().values())
    if size > 2**31 - 2**20:
        raise UserError(f"--format onnx holds 2 GiB, these weights have {size / 2**30:.1f}")
    network = _InHalf(loaded.backbone).eval() if graph.fp16 else loaded.backbone
    with contextlib.redirect_stdout(sys.stderr), _quiet():
        program = torch.onnx.export(
            network,
            **_traced_with(loaded, graph),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            opset_version=graph.opset or None,
        )
    written = program.model.opset_imports[""]
    if graph.opset not in (0, written):  # torch leaves the graph as it is where it cannot convert
        raise UserError(
            f"--opset {graph.opset}: torch {torch.__version__} gave {loaded.model.backbone} in "
            f"opset {written}, since its converters do not reach the other: take one from 18 on "
            "that this torch knows, or leave --opset out"
        )
    for name, value in describe(loaded).items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    return {"": program.model_proto.SerializeToString()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's pages of warnings off the terminal; what it has written is checked."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def read_onnx(path: Path, loaded: Loaded) -> Features:
    """Open a file in onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torch_export(
    loaded: Loaded, checkpoint: Path, licence: str, graph: GraphOptions
) -> Files:
    """Write a program of torch.export, with the note in `moco.json`."""
    # differs: torch.export binds height and width to the example's where a network pads, so that
    # only onnx has a free size.
    program = torch.export.export(loaded.backbone, **_traced_with(loaded, graph))
    note = {"moco.json": json.dumps(describe(loaded))}
    return saved(lambda file: torch.export.save(program, file, extra_files=note))


def read_torch_export(path: Path, loaded: Loaded) -> Features:
    """Load the program as a module."""
    with path.open("rb") as stream:
        return torch.export.load(stream).module()
