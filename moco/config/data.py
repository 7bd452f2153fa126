"""Settings of images and views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.config.setting import LEAST_VIEW, MOST_ROWS, MOST_VALUE, Auto, UserError, setting

# Settings of which each view may have its own.
PER_VIEW = ("crop_min", "flip", "jitter", "grey", "blur", "solarise")


@dataclass
class DataConfig:
    """Images, views and batches."""

    dataset: Literal[
        "digits", "cifar10", "cifar100", "stl10", "folder", "imagenet", "shards", "parquet", "own"
    ] = setting(
        "folder",
        "Where images come from; `folder` takes any tree of images, `digits` needs no files, "
        "`shards` are tars of images, `parquet` as Hugging Face writes it; own: what moco.pretrain "
        "is given in Python",
    )
    root: str = setting(
        "",
        "Directory of the data set; of shards also a pattern, here or in a store, as "
        "s3://bucket/train-{000..146}.tar; not needed for digits",
    )
    files: str = setting(
        "", "File that lists the training images, one path a line, absolute or below root"
    )
    labels: str = setting(
        "",
        "Table (CSV) of a path, a label and perhaps a split in each row, where folders are no "
        "labels",
    )
    download: bool = setting(
        False, "Fetch cifar10, cifar100 or stl10 into root when missing (uses the network)"
    )
    channels: int | Auto = setting(
        3,
        "Channels that images are brought to: 1 grey, 3 RGB, 4 RGBA, other: as stored; auto: from "
        "a sample of the files",
        at_least=1,
        at_most=1024,
    )
    min_value: float | list[float] | Literal["auto"] = setting(
        "auto",
        "Value that becomes black in files of more than 8 bits, one or one per channel; auto: "
        "from a sample of the files",
        at_least=-MOST_VALUE,
        at_most=MOST_VALUE,
    )
    max_value: float | list[float] | Literal["auto"] = setting(
        "auto",
        "Value that becomes white in files of more than 8 bits, one or one per channel; auto: "
        "from a sample of the files, rounded up to 1, 255, 1023, 4095, 10000 or 65535",
        at_least=-MOST_VALUE,
        at_most=MOST_VALUE,
    )
    dicom_window: bool = setting(
        True, "Show DICOM files through their own window; false: by min_value and max_value"
    )
    exif: Literal["apply", "ignore"] = setting(
        "apply",
        "Turn pictures upright as their EXIF orientation says; the references of published scores "
        "ignore it",
    )
    max_pixels: int = setting(
        178_956_970,
        "Pixels above which an image counts as unreadable: a small file may claim any number",
        at_least=1,
        at_most=2**34,
    )
    image_size: int | Auto = setting(
        224,
        "Side of images and views in pixels; auto: by the images and the hardware",
        at_least=LEAST_VIEW,
        at_most=8192,
    )
    image_size_start: int = setting(
        0,
        "Side of the first views in pixels, which grow in two steps; 0: they do not",
        at_least=0,
        at_most=8192,
    )
    image_size_end: int | Auto = setting(
        0,
        "Side of the last views, to stay below image_size, at which images are judged, embedded "
        "and exported; 0: image_size; auto: three quarters of it for a ResNet on a CPU, else 0",
        at_least=0,
        at_most=8192,
    )
    image_size_share: float = setting(
        0.75, "Share of the run over which the views grow", above=0, at_most=0.99
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "How crops are resized to views, antialiased (Fast-MoCo: bicubic)"
    )
    reduce_jpegs: bool = setting(
        True,
        "Of streamed images: decode a JPEG at 1/4 or 1/8 of its size where the boxes of both "
        "views keep the view's pixels a side. Photographs of 12 megapixels are read 2 to 4 times "
        "as fast",
    )
    upscale: float = setting(
        1.0,
        "How many times larger than the images image_size may be; 1 refuses to enlarge",
        at_least=1,
        at_most=1024,
    )
    batch_size: int | Auto = setting(
        256,
        "Images per step over all devices; auto: 256, or what a small set allows",
        at_least=2,
        at_most=MOST_ROWS,
    )
    chunks: int = setting(
        1,
        "Parts in which a device encodes its share of the batch, to save memory: the gradient is "
        "the whole batch's, BatchNorm sees a part",
        at_least=1,
        at_most=MOST_ROWS,
    )
    views: Literal["auto", "v1", "v2", "cifar", "v3", "own"] = setting(
        "v2",
        "Augmentation: 1911.05722, 2003.04297, the CIFAR demo or 2104.02057, whose two views "
        "differ; of crop_min to solarise a list of two values is one for each view; auto: "
        "cifar for views below 64 px, else v2; own: what moco.pretrain is given in Python",
    )
    pairs: str = setting(
        "",
        "Which images show the same thing, so that the second view is cut from another one of "
        "them: a regular expression whose groups name it in the path below root, or a table (CSV) "
        "of a path and a name in each row; own: a function in Python",
    )
    crop_min: float | list[float] | None = setting(
        None,
        "Smallest share of the area that a crop keeps; null: as in `views`",
        above=0,
        at_most=1,
    )
    flip: float | list[float] | None = setting(
        None, "Probability of a horizontal flip; null: as in `views`", at_least=0, at_most=1
    )
    jitter: float | list[float] | None = setting(
        None, "Probability of colour jitter; null: as in `views`", at_least=0, at_most=1
    )
    grey: float | list[float] | None = setting(
        None, "Probability of greyscale; null: as in `views`", at_least=0, at_most=1
    )
    blur: float | list[float] | None = setting(
        None, "Probability of Gaussian blur; null: as in `views`", at_least=0, at_most=1
    )
    solarise: float | list[float] | None = setting(
        None, "Probability of solarisation; null: as in `views`", at_least=0, at_most=1
    )
    mean: list[float] = setting(
        [],
        "Mean per channel on a 0-1 scale; empty: ImageNet's for RGB, else 0.5",
        at_least=0,
        at_most=1,
    )
    std: list[float] = setting(
        [], "Standard deviation per channel; empty: ImageNet's for RGB, else 0.25", at_most=10
    )
    resident: Literal["auto", "device", "memory", "off"] = setting(
        "auto",
        "Hold all images decoded on the device or in memory, or stream them through workers; "
        "auto: what fits",
    )
    resident_budget: float = setting(
        4.0, "GiB that auto may fill with decoded images", at_least=0, at_most=65536
    )
    num_workers: int = setting(
        -1,
        "Processes that decode streamed images; -1: one per core left",
        at_least=-1,
        at_most=1024,
    )
    streams: int = setting(
        64,
        "Streams that shards are dealt to, of which each batch takes equal parts; taken is the "
        "largest number of them that divides the batch",
        at_least=1,
        at_most=65536,
    )
    window: int = setting(
        1024,
        "Images of a stream of shards among which their order is shuffled",
        at_least=1,
        at_most=2**24,
    )
    cache_gib: float = setting(
        100.0,
        "GiB of shards from a store, or of images from Parquet, that a machine keeps on its disk",
        above=0,
        at_most=2**20,
    )
    max_bad_fraction: float = setting(
        0.0, "Share of unreadable images that is skipped, not an error", at_least=0, at_most=1
    )
    worker_timeout: float = setting(
        300.0,
        "Seconds to wait for a worker's batch before the run stops; 0: for ever",
        at_least=0,
        at_most=604_800,  # a week; a timer refuses what is far beyond
    )

    @property
    def view_side(self) -> int:
        """Side of the largest views."""
        return int(self.image_size_end or self.image_size)

    @property
    def view_side_setting(self) -> str:
        """Name of the setting that decides `view_side`."""
        return "data.image_size_end" if self.image_size_end else "data.image_size"


def per_view(value: float | list[float], name: str = "") -> tuple[float, float]:
    """Return a setting of the views as two values, one for each view.

    Raises:
        UserError: A list that has neither one value nor two.
    """
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2):
        raise UserError(f"{name} is {value}: give one value, or two, one for each view")
    return values[0], values[-1]
