"""Settings of the commands besides training: evaluation, export, features, reports, shards.

They are declared as those of training are, see `moco.config`.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from moco.config import DataConfig
from moco.config.setting import MOST_EPOCHS, MOST_ROWS, MOST_STEPS, setting

LISTS = ("files", "labels")  # settings of `data` that name images below one root
NAMING = ("dataset", "root", *LISTS)  # those that name images


def _as_in(kind: type, name: str) -> Any:
    """Declare a field as another dataclass declares it."""
    item = kind.__dataclass_fields__[name]
    return field(default=item.default, metadata=item.metadata)


@dataclass
class JudgeConfig:
    """What `eval_linear.py` and `eval_knn.py` share: which encoder, and where results go."""

    checkpoint: str = setting("", "Checkpoint of ours, official, torchvision, timm, safetensors")
    encoder: Literal["query", "key"] = setting("query", "Which of two encoders")
    backbone: str = setting("", "timm name, where the file leaves its architecture open")
    stem_padding: int = setting(
        0,
        "Padding of a 3x3 stem: 2 in solo-learn, 1 in most other code; 0: as in the file",
        at_least=0,
        at_most=3,
    )
    num_heads: int = setting(
        0, "Attention heads of a ViT; 0: as in the file", at_least=0, at_most=1024
    )
    allow_partial: bool = setting(False, "Take a file that fits its architecture only in part")
    layer: Literal["backbone", "head"] = setting(
        "backbone", "Features of the backbone, or embeddings of the projection head"
    )
    baselines: bool = setting(
        True, "Also judge raw pixels and the untrained network under the same protocol"
    )
    untrained_draws: int = setting(
        0,
        "Untrained networks, drawn anew, to compare with; 0: 3, or 1 where every epoch runs them",
        at_least=0,
        at_most=1000,
    )
    reference: list[str] = setting(
        [],
        "Further checkpoints, of any layout, to judge beside the encoder under the same protocol; "
        "also says which test images each of them was trained on",
    )
    seed: int = setting(
        0, "Seed of splits, order, crops and the untrained network", at_least=0, at_most=2**32 - 1
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "Hardware to run on")
    devices: int = setting(
        1, "Processes to start, one per device; 1 under torchrun", at_least=1, at_most=1024
    )
    precision: Literal["32-true", "bf16-mixed"] = setting(
        "32-true", "Arithmetic of the encoder; published protocols use 32"
    )
    output: str = setting("", "Directory of the results; empty: beside the checkpoint")


@dataclass
class LinearConfig:
    """What `eval_linear.py` takes besides; 0 and [] mean the protocol's own value."""

    protocol: Literal["cached", "paper", "v3", "v3_vit", "views", "finetune"] = setting(
        "cached",
        "Features once; 1911.05722's probe on random crops; 2104.02057's, for ResNets and for "
        "ViTs; features of crops; the whole network",
    )
    label_fraction: float = setting(1.0, "Share of every class's labels used", above=0, at_most=1)
    learning_rates: list[float] = setting(
        [], "Rates to try; several: the best on a held-out part of the training images", at_most=1e6
    )
    epochs: int = setting(0, "Passes over the training images", at_least=0, at_most=MOST_EPOCHS)
    milestones: list[int] = setting(
        [60, 80], "Epochs at which `paper` divides the rate by 10", at_least=0, at_most=MOST_EPOCHS
    )
    batch_size: int = setting(0, "Images per step over all devices", at_least=0, at_most=MOST_ROWS)
    num_views: int = setting(4, "Crops of each image in `views`", at_least=1, at_most=1000)
    held_out: float = setting(
        0.1, "Share of every class that chooses among rates", above=0, at_most=0.5
    )
    crop_min: float = setting(
        0.08, "Smallest share of the area that a training crop keeps", above=0, at_most=1
    )


@dataclass
class KNNConfig:
    """What `eval_knn.py` takes besides."""

    k: list[int] = setting(
        [10, 20, 100, 200],
        "Numbers of neighbours that vote, as [10,20] or one alone",
        at_most=MOST_ROWS,
    )
    temperature: float = setting(
        0.1, "Each neighbour votes exp(similarity / temperature)", above=0, at_most=100
    )
    budget: float = setting(
        1.0, "GiB that the search may take beside the features", above=0, at_most=65536
    )
    shots: list[int] = setting(
        [1, 5, 10], "Labelled images per class of the few-shot scores", at_most=MOST_ROWS
    )
    draws: int = setting(20, "Random choices of these images", at_least=2, at_most=100_000)
    gallery: bool = setting(True, "Draw test images beside their nearest neighbours")


@dataclass
class ExportConfig:
    """What `export.py` takes."""

    checkpoint: str = setting(
        MISSING, "Checkpoint of any layout, a state dict, safetensors, or a timm directory"
    )
    format: Literal[
        "timm",
        "torchvision",
        "safetensors",
        "official",
        "official-v3",
        "detectron2",
        "onnx",
        "torch-export",
    ] = setting(MISSING, "Layout to write")
    output: str = setting(MISSING, "File to write; for timm a directory")
    encoder: Literal["query", "key"] = _as_in(JudgeConfig, "encoder")
    overwrite: bool = setting(False, "Replace an earlier export")
    opset: int = setting(
        0, "Operator set of onnx, 17 and up; 0: the one that torch takes", at_least=0, at_most=99
    )
    fp16: bool = setting(
        False, "Have onnx hold and compute 16 bits; images and features stay float32"
    )
    free_size: bool = setting(False, "Let onnx take images of any size, where the network does")
    license: str = setting("", "For the model card: mit, cc-by-4.0, other")
    allow_partial: bool = _as_in(JudgeConfig, "allow_partial")
    backbone: str = _as_in(JudgeConfig, "backbone")
    image_size: int = setting(
        0, "Side in pixels; 0: as in the checkpoint", at_least=0, at_most=8192
    )
    stem_padding: int = _as_in(JudgeConfig, "stem_padding")
    num_heads: int = _as_in(JudgeConfig, "num_heads")


@dataclass
class EmbedConfig:
    """What `moco embed` takes."""

    checkpoint: str = _as_in(ExportConfig, "checkpoint")
    output: str = setting(
        MISSING, "Directory of features.parquet, and with --index of features.faiss"
    )
    features: Literal["backbone", "head", "patch"] = setting(
        "backbone",
        "Features of the backbone, embeddings of the projection head, or the backbone's last map, "
        "D x h x w, before pooling",
    )
    dtype: Literal["float32", "float16"] = setting("float32", "Numbers of the column `vector`")
    index: bool = setting(False, "Also write a faiss index of the features")
    map: bool = setting(
        False, "Also write the columns x, y and neighbors, as Embedding Atlas reads them"
    )
    overwrite: bool = setting(False, "Replace other features in the directory")
    encoder: Literal["query", "key"] = _as_in(JudgeConfig, "encoder")
    backbone: str = _as_in(JudgeConfig, "backbone")
    stem_padding: int = _as_in(JudgeConfig, "stem_padding")
    num_heads: int = _as_in(JudgeConfig, "num_heads")
    allow_partial: bool = _as_in(JudgeConfig, "allow_partial")
    accelerator: Literal["auto", "cpu", "gpu"] = _as_in(JudgeConfig, "accelerator")
    devices: int = _as_in(JudgeConfig, "devices")
    precision: Literal["32-true", "bf16-mixed"] = _as_in(JudgeConfig, "precision")


@dataclass
class SearchConfig:
    """What `moco search` takes: an image to look for, or --duplicates."""

    index: str = setting(MISSING, "Directory that `moco embed` wrote")
    query: str = setting("", "Image whose neighbours are wanted")
    k: int = setting(10, "Neighbours of the image", at_least=1, at_most=10_000)
    picture: str = setting("", "Picture to write, .png: the image beside its neighbours")
    checkpoint: str = setting(
        "", "Checkpoint that made the features; empty: where it lay when they were made"
    )
    accelerator: Literal["auto", "cpu", "gpu"] = _as_in(JudgeConfig, "accelerator")
    duplicates: bool = setting(False, "List the pairs of images that are nearly the same")
    above: float = setting(
        0.95, "Cosine from which a pair counts as nearly the same", above=0, at_most=1
    )
    output: str = setting(
        "", "File of the pairs, .csv or .json; empty: duplicates.csv beside the features"
    )


@dataclass
class SelectConfig:
    """What `moco select` takes."""

    index: str = _as_in(SearchConfig, "index")
    count: int = setting(MISSING, "Images to choose", at_least=1, at_most=MOST_ROWS)
    seed: int = setting(0, "Seed of the clusters", at_least=0, at_most=2**31 - 1)
    output: str = setting("", "File to write, .csv; empty: selected.csv beside the features")


@dataclass
class QualityConfig:
    """What `moco quality` takes."""

    checkpoint: str = _as_in(ExportConfig, "checkpoint")
    count: int = setting(
        2000, "Images that are measured, of the test split if there is one", at_least=2,
        at_most=MOST_ROWS,
    )  # fmt: skip
    views: int = setting(4, "Views of each image, an even number", at_least=2, at_most=1000)
    seed: int = setting(0, "Seed of images and views", at_least=0, at_most=2**32 - 1)
    encoder: Literal["query", "key"] = _as_in(JudgeConfig, "encoder")
    backbone: str = _as_in(JudgeConfig, "backbone")
    stem_padding: int = _as_in(JudgeConfig, "stem_padding")
    num_heads: int = _as_in(JudgeConfig, "num_heads")
    allow_partial: bool = _as_in(JudgeConfig, "allow_partial")
    accelerator: Literal["auto", "cpu", "gpu"] = _as_in(JudgeConfig, "accelerator")


@dataclass
class ReportConfig:
    """What the command `report` takes besides the directories of runs."""

    images: int = setting(
        5000,
        "Images on the maps of all runs together; above 10000 of a run, openTSNE is needed",
        at_least=1,
        at_most=MOST_ROWS,
    )
    output: str = setting("", "Page to write, .html; empty: report.html in the first directory")
    root: str = setting("", "Directory of the images, where they have moved since the run")
    seed: int = setting(0, "Seed of the choice of images", at_least=0, at_most=2**32 - 1)


@dataclass
class ReplayConfig:
    """What the command `replay` takes besides the directory of a run."""

    step: int = setting(
        MISSING, "Which step, as metrics.csv counts them", at_least=1, at_most=MOST_STEPS
    )
    output: str = setting("", "Picture to write, .png; empty: replay_STEP.png in the directory")
    root: str = setting("", "Directory of the images, where they have moved since the run")


@dataclass
class ViewsConfig:
    """What the command `views` takes besides the settings of training."""

    output: str = setting("views.png", "Picture to write, .png")


@dataclass
class ShardsConfig:
    """What `python -m moco shards FOLDER OUTPUT` takes."""

    folder: str = setting(MISSING, "Images, as data.root of data.dataset folder")
    output: str = setting(MISSING, "Directory to make")
    shard_mib: float = setting(256.0, "Size of a shard in MiB", above=0, at_most=2**20)
    labels: str = setting("", "Table (CSV) of a path and a label, as data.labels")


@dataclass
class EvalDataConfig:
    """Group of image settings that evaluation takes; the checkpoint's own are the defaults."""

    data: DataConfig = field(default_factory=DataConfig)
