"""Sources: where images come from. Data sets and folders become uint8 images with a name each.

Small sets (digits, CIFAR, STL-10) are held as arrays; folders are lists of files, decoded when
read, one file at a time or all at once. What cannot be decoded raises `BadImage`, and `check_files`
decides whether a run may go on without it. Nothing is unpickled but CIFAR's own files, after their
checksums.
Shapes: N images, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from moco.config import DataConfig, UserError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff"),
    *(".webp", ".ppm", ".pgm", ".pbm", ".npy"),
)
# Only these decoders run, whatever a file claims to be: Pillow's EPS reader starts Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 178_956_970  # where Pillow refuses too: 0.5 GB as RGB, above it a decompression bomb
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
FILES_PER_TASK = 256
LOGGER = logging.getLogger("moco")


class BadImage(ValueError):
    """A file that does not become an image of the wanted channels; has `path` and `reason`."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


class MixedSizes(ValueError):
    """Images of two sizes, which no tensor holds; has `first` and `other`, (H, W), and `path`."""

    def __init__(self, first: tuple[int, int], other: tuple[int, int], path: str) -> None:
        super().__init__(first, other, path)
        self.first, self.other, self.path = first, other, path

    def __str__(self) -> str:
        return f"{shown(self.path)} has {self.other} pixels (H W) where others have {self.first}"


@dataclass
class ImageSource:
    """Images under a name.

    Attributes:
        name: For people, e.g. "cifar10 train".
        images: N C H W uint8 where the set is small arrays, else None.
        paths: One per image where images are files, else empty.
        labels: N int64, or None when unlabelled.
        classes: Class names in the order of the labels; empty when unlabelled.
        channels: C of every image.
        max_value: Value in 16-bit files that becomes 255.
    """

    name: str
    images: Tensor | None
    paths: list[str]
    labels: Tensor | None
    classes: list[str]
    channels: int
    max_value: int

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)

    def read(self, index: int) -> Tensor:
        """Return one image, C H W uint8, in its own size; raise BadImage as `decode` does."""
        if self.images is not None:
            return self.images[index]
        return decode(self.paths[index], self.channels, self.max_value)


def open_source(data: DataConfig, split: Literal["train", "test"]) -> ImageSource | None:
    """Open one split; None when `test` is asked of a set that has no held-out split.

    The train split of stl10 is its unlabelled one. Uses the network only with `data.download`.

    Raises:
        UserError: The set is missing, empty, corrupt or laid out otherwise, or has other channels.
    """
    if data.dataset == "digits":
        return _open_digits(data, split)
    if data.dataset.startswith("cifar"):
        return _open_cifar(data, split)
    if data.dataset == "stl10":
        return _open_stl10(data, "unlabeled" if split == "train" else "test")
    train, test = _split_folders(data)
    if split == "train":
        return _open_folder(data, train)
    return test and _open_folder(data, test, _open_folder(data, train).classes)


def open_labelled(
    data: DataConfig, train: ImageSource | None = None
) -> tuple[ImageSource, ImageSource] | None:
    """Open the bank and the queries of an evaluation; None unless both exist and have labels.

    Args:
        data: As for `open_source`.
        train: The train split if it is open already, so that a large folder is not listed again.
            It becomes the bank, except with stl10, whose bank is its labelled train split.

    Raises:
        UserError: As `open_source`, or the queries have classes that the bank lacks.
    """
    if data.dataset == "stl10":
        return _open_stl10(data, "train"), _open_stl10(data, "test")
    bank = train or open_source(data, "train")
    if bank is None or bank.labels is None:
        return None
    if data.dataset in ("folder", "imagenet"):
        folder = _split_folders(data)[1]
        queries = _open_folder(data, folder, bank.classes) if folder else None
    else:
        queries = open_source(data, "test")
    return None if queries is None or queries.labels is None else (bank, queries)


def decode(path: str, channels: int, max_value: int) -> Tensor:
    """Decode one file to C H W uint8. The only door to a decoder: another one goes in here.

    Args:
        path: An image, or an array in .npy: H W, H W C or C H W of uint8, other integers of
            0..max_value, or floats of 0..1.
        channels: 1 grey, 3 RGB without alpha, 4 RGBA; any other number must be what the file has.
        max_value: Value in files of more than 8 bits that becomes 255; above it is clipped.

    Raises:
        BadImage: Truncated, empty, no image, too large, unreadable, or of other bands.
    """
    with _naming(path):
        if _extension(path) == ".npy":
            pixels = _decode_npy(path, channels, max_value)
        elif _needs_tifffile(path, channels, max_value):
            pixels = _decode_tiff(path, channels, max_value)
        else:
            pixels = _decode_pillow(path, channels, max_value)
        return torch.from_numpy(np.array(pixels, order="C"))  # the one copy: a writable C H W


def image_size(path: str, channels: int = 3) -> tuple[int, int]:
    """Return (height, width) from the header alone; `channels` tells C H W from H W C in arrays.

    Raises:
        BadImage: As `decode`, as far as the header shows it.
    """
    with _naming(path):
        if _extension(path) == ".npy":
            return _bands_first(path, _npy_header(path), channels).shape[1:]
        tiff = _tiff_header(path)
        if tiff:
            return tiff.height, tiff.width
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(path, image.height, image.width)
            return image.height, image.width


def load_all(
    source: ImageSource, report: Callable[[int, int], None] | None = None
) -> tuple[Tensor | None, list[tuple[int, str]]]:
    """Decode every image into one tensor, on all cores.

    Args:
        source: Its images must share one size.
        report: Called with (done, total) now and then, from this thread.

    Returns:
        N C H W uint8, and (index, reason) of each bad image in rising order: their rows are noise,
        for the caller to drop. The tensor is None when not one image is good.

    Raises:
        MixedSizes: Two images differ in size.
    """
    if source.images is not None:
        return source.images, []
    total, bad = len(source), []
    for index in range(total):  # the first good image tells the size
        try:
            shape = source.read(index).shape
            break
        except BadImage as error:
            bad.append((index, error.reason))
    else:
        return None, bad
    images, bad = torch.empty(total, *shape, dtype=torch.uint8), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the GIL
        starts = range(0, total, FILES_PER_TASK)
        for start, more in zip(
            starts, pool.map(partial(_load, source, images), starts), strict=True
        ):
            bad += more
            if report:
                report(min(start + FILES_PER_TASK, total), total)
    return images, bad


def _load(source: ImageSource, images: Tensor, start: int) -> list[tuple[int, str]]:
    """Decode the files from `start` on into their rows; return the bad ones."""
    rows, bad = images.numpy(), []
    for index in range(start, min(start + FILES_PER_TASK, len(source))):
        try:
            image = source.read(index).numpy()
        except BadImage as error:
            bad.append((index, error.reason))
            continue
        if image.shape != rows.shape[1:]:
            raise MixedSizes(rows.shape[2:], image.shape[1:], source.paths[index])
        rows[index] = image
    return bad


def estimate_bytes(source: ImageSource, samples: int = 64) -> tuple[int, tuple[int, int] | None]:
    """Estimate the bytes of all images decoded, from the headers of some.

    Returns:
        The bytes, exact for arrays; and (H, W) if the images looked at agree, else None.
    """
    if source.images is not None:
        return source.images.nbytes, tuple(source.images.shape[2:])
    sizes = []
    count = min(samples, len(source))
    for index in range(count):
        with contextlib.suppress(BadImage):
            path = source.paths[index * len(source) // count]
            sizes.append(image_size(path, source.channels))
    if not sizes:
        return 0, None
    area = sum(height * width for height, width in sizes) / len(sizes)
    common = sizes[0] if len(set(sizes)) == 1 else None
    return round(area * source.channels * len(source)), common


def check_files(
    source: ImageSource,
    bad: list[tuple[int, str]],
    max_bad_fraction: float,
    report_path: str | None,
) -> ImageSource:
    """Drop the bad images, or refuse to go on when they are too many.

    Args:
        source: Files.
        bad: (index, reason) of each bad image, as `load_all` returns them.
        max_bad_fraction: Share of the images that may be bad.
        report_path: Where the bad ones are listed: path, tab, reason per line; None for nowhere.

    Raises:
        UserError: More are bad, or no image is left.
    """
    if not bad:
        return source
    if report_path:
        with open(report_path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{_one_line(source.paths[i])}\t{reason}\n" for i, reason in bad)
    index, reason = bad[0]
    share = len(bad) / len(source)
    if share > max_bad_fraction or share == 1:
        listed = f" (all are listed in {shown(report_path)})" if report_path else ""
        raise UserError(
            f"{len(bad)} of {len(source)} images of {source.name} ({100 * share:.3g} %) cannot be "
            f"used, first {shown(source.paths[index])}: {reason}{listed}: mend or remove them, "
            f"or raise data.max_bad_fraction (now {max_bad_fraction:g})"
        )
    dropped = {index for index, _ in bad}
    kept = [index for index in range(len(source)) if index not in dropped]
    labels = None if source.labels is None else source.labels[torch.tensor(kept)]
    return replace(source, paths=[source.paths[index] for index in kept], labels=labels)


def shown(path: str) -> str:
    """Return a path as one printable line, whatever bytes its name holds."""
    return _one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def _one_line(text: str) -> str:
    return "".join(c if c >= " " else c.encode("unicode_escape").decode() for c in text)


# Data sets held as arrays


def _open_digits(data: DataConfig, split: str) -> ImageSource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if data.channels not in (1, 3):
        raise UserError(f"data.channels is {data.channels}: digits are grey, set it to 1 or 3")
    digits = load_digits()
    rows = train_test_split(
        np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0
    )[split == "test"]
    images = torch.from_numpy(_to_uint8(digits.images[rows], 16))[:, None]  # N 1 8 8
    return _array_source(
        data, split, images.repeat(1, data.channels, 1, 1), digits.target[rows], "0123456789"
    )


def _open_cifar(data: DataConfig, split: str) -> ImageSource:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.dataset]
    found = _open_torchvision(kind, data, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    return _array_source(data, split, images.contiguous(), found.targets, found.classes)


def _open_stl10(data: DataConfig, split: str) -> ImageSource:
    from torchvision import datasets

    found = _open_torchvision(datasets.STL10, data, split=split)
    images = torch.from_numpy(found.data).contiguous()
    if split == "unlabeled":
        return _array_source(data, split, images, None, [])
    classes = getattr(found, "classes", range(1, 11))  # the file of names may be missing
    return _array_source(data, split, images, found.labels, map(str, classes))


def _array_source(
    data: DataConfig, split: str, images: Tensor, labels: Any, classes: Iterable[str]
) -> ImageSource:
    labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64))
    name = f"{data.dataset} {split}"
    return ImageSource(name, images, [], labels, list(classes), data.channels, data.max_value)


def _open_torchvision(kind: Any, data: DataConfig, **split: Any) -> Any:
    """Open a set of torchvision, which checks the MD5 of every file before it reads one."""
    if data.channels != 3:
        raise UserError(f"data.channels is {data.channels}: {data.dataset} is RGB, set it to 3")
    root = _expanded(data.root)
    try:
        return kind(root, download=data.download, **split)
    except (OSError, RuntimeError) as error:
        if data.download:
            raise UserError(
                f"data.root {data.root!r}: {data.dataset} cannot be fetched "
                f"({_one_line(str(error))}): mend that, or extract {kind.filename} there yourself"
            ) from error
        first = os.path.join(root, kind.base_folder, kind.train_list[0][0])
        raise UserError(
            f"data.root {data.root!r} lacks {data.dataset}, or a checksum differs (looked for "
            f"{shown(first)} and so on): give the directory that holds {kind.base_folder}, "
            "or fetch it with --data.download true"
        ) from error


# Folders


def _split_folders(data: DataConfig) -> tuple[str, str | None]:
    """Return the directories of the train and the held-out split, by their names below the root."""
    root = _check_root(data.root)
    names = [entry.name for entry in os.scandir(root) if _visible(entry.name) and _is_dir(entry)]
    by_name = {name.lower(): os.path.join(root, name) for name in sorted(names)}
    train = by_name.get("train")
    if data.dataset == "imagenet":
        if train is None or "val" not in by_name:
            raise UserError(
                f"data.root {data.root!r} lacks train/ or val/: lay imagenet out as "
                "train/CLASS/*.JPEG and val/CLASS/*.JPEG; for another tree set data.dataset folder"
            )
        return train, by_name["val"]
    test = by_name.get("test") or by_name.get("val") or by_name.get("validation")
    # Among others `train` may be a class (railways); a split has a held-out one beside it, or nothing.
    if train and (test or len(names) == 1):
        return train, test
    return root, None


def _open_folder(data: DataConfig, top: str, classes: list[str] | None = None) -> ImageSource:
    """List a directory; the first-level subfolders are its labels, by `classes` where given."""
    paths = _list_images(data, top)
    start = len(os.path.join(top, ""))
    parts = [path[start:].split(os.sep, 1) for path in paths]
    names = {part[0] for part in parts}
    labelled = all(len(part) == 2 for part in parts)
    if data.dataset == "imagenet" and not labelled:
        raise UserError(
            f"data.root {data.root!r}: images lie directly in {shown(top)}, imagenet has them in "
            "one subfolder per class; for another tree set data.dataset folder"
        )
    source = ImageSource(
        f"folder {shown(top)}", None, paths, None, [], data.channels, data.max_value
    )
    if not labelled or classes == [] or (len(names) < 2 and not names <= set(classes or [])):
        return source
    classes = sorted(names) if classes is None else classes
    unknown = sorted(names - set(classes))
    if unknown:
        raise UserError(
            f"data.root {data.root!r}: {len(unknown)} class folders of {shown(top)} are not in the "
            f"train split ({', '.join(map(shown, unknown[:5]))}): give both the same class names"
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[part[0]] for part in parts])
    return replace(source, labels=labels, classes=classes)


def _list_images(data: DataConfig, top: str) -> list[str]:
    paths, unread = _walk(top)
    if unread:
        LOGGER.warning(
            "%d folders cannot be read and are skipped, first %s", len(unread), unread[0]
        )
    if not paths:
        where = f"{data.root!r}" if top == _expanded(data.root) else f"{data.root!r}: {shown(top)}"
        skipped = f"; {len(unread)} of them cannot be read" if unread else ""
        raise UserError(
            f"data.root {where} holds no images (looked for {' '.join(EXTENSIONS)} in all "
            f"subfolders{skipped}): give the folder that holds them"
        )
    return paths


def _walk(top: str) -> tuple[list[str], list[str]]:
    """Return the sorted images below `top`, each once though links go round, and what failed."""
    paths, links, unread = [], [], []
    listed, waiting = set(), [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in listed:
            continue
        try:
            with os.scandir(folder) as entries:
                found = sorted((e for e in entries if _visible(e.name)), key=lambda e: e.name)
        except OSError as error:
            unread.append(f"{shown(folder)}: {error.strerror}")
            continue
        listed.add(real)
        waiting += [entry.path for entry in reversed(found) if _is_dir(entry)]
        files = [entry for entry in found if _extension(entry.name) in EXTENSIONS]
        paths += [entry.path for entry in files if entry.is_file(follow_symlinks=False)]
        links += [entry.path for entry in files if entry.is_symlink() and _maybe_file(entry.path)]
    return sorted(paths + _new_links(links, listed)), unread


def _new_links(links: list[str], listed: set[str]) -> list[str]:
    """Keep the links to files not listed already, and dangling ones: those get named as bad."""
    new: dict[str, str] = {}
    for path in sorted(links):
        real = os.path.realpath(path)
        folder, name = os.path.split(real)
        image = _visible(name) and _extension(name) in EXTENSIONS
        if not (image and folder in listed and os.path.exists(real)):
            new.setdefault(real, path)
    return list(new.values())


def _check_root(root: str) -> str:
    """Return the root as an absolute path if it is a directory that can be listed."""
    path = _expanded(root)
    parent, name = os.path.split(path)
    try:
        with os.scandir(path):
            return path
    except NotADirectoryError:
        problem = "is a file: give a folder of images, extracted if it is an archive"
    except FileNotFoundError:
        near = []
        with contextlib.suppress(OSError):
            near = difflib.get_close_matches(name, os.listdir(parent), n=1)
        hint = (
            f": did you mean {os.path.join(parent, near[0])!r}?"
            if near
            else ": give a folder of images"
        )
        problem = f"does not exist{hint}"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error}): make it readable"
    raise UserError(f"data.root {root!r} {problem}")


def _maybe_file(link: str) -> bool:
    return os.path.isfile(link) or not os.path.exists(link)  # but no folder, nor a pipe


def _expanded(root: str) -> str:
    return os.path.abspath(os.path.expanduser(root))


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_dir(entry: os.DirEntry) -> bool:
    # entry.is_dir() raises on a link to itself, os.path.isdir does not.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


# Decoding


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into BadImage; on broken files that is not only OSError."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            if os.path.getsize(path) == 0:
                raise BadImage(path, "is empty") from None
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(path, "is no image of a known format") from None
        reason = f"cannot be decoded: {_one_line(str(error)) or type(error).__name__}"
        raise BadImage(path, getattr(error, "strerror", None) or reason) from error


def _decode_pillow(path: str, channels: int, max_value: int) -> np.ndarray:
    """Decode with Pillow to C H W uint8; of an animation, the first frame.

    EXIF orientation is not applied: torchvision's ImageFolder, on which published numbers stand,
    ignores it too.
    """
    with Image.open(path, formats=FORMATS) as image:
        _check_pixels(path, image.height, image.width)
        if max_value != 65535:
            if len(image.getbands()) > 1 and ";16" in str(image.tile):
                raise BadImage(
                    path,
                    f"has 16 bits a band, which Pillow cuts to 8: max_value {max_value} needs .npy",
                )
            if image.tile and image.tile[0][0] == "ppm":
                max_value = 65535  # the file names its own maximum, and Pillow has applied it
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_uint8(np.asarray(image), max_value))
        if channels not in (1, 3, 4) and len(image.getbands()) != channels:
            raise _other_bands(path, len(image.getbands()))
        if image.mode != MODES[channels]:
            image.load()
            if channels != 4:
                image.info.pop("transparency", None)  # else Pillow warns that it is lost
            image = image.convert(MODES[channels])
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decode_npy(path: str, channels: int, max_value: int) -> np.ndarray:
    _npy_header(path)
    values = np.load(path, allow_pickle=False)
    if values.dtype.kind == "f":
        if (values > 1.5).any():
            raise BadImage(path, "holds floats above 1: scale them to 0..1, or store uint8")
        max_value = 1
    return _fit_bands(path, _to_uint8(_bands_first(path, values, channels), max_value), channels)


def _npy_header(path: str) -> np.ndarray:
    """Map an array without reading it; raises when the file is shorter than its header says."""
    return np.lib.format.open_memmap(path, mode="r")


def _decode_tiff(path: str, channels: int, max_value: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        tiff = _tiff_header(path)
        raise BadImage(
            path, f"has {tiff.bands} bands of {tiff.bits} bits, to read them: pip install tifffile"
        ) from None
    with tifffile.TiffFile(path) as file:
        values = file.series[0]
        _bands_first(path, np.broadcast_to(np.uint8(0), values.shape), channels)
        values = values.asarray()
    return _fit_bands(path, _to_uint8(_bands_first(path, values, channels), max_value), channels)


def _needs_tifffile(path: str, channels: int, max_value: int) -> bool:
    """Whether a file is a TIFF that Pillow does not read, or reads with a loss of bands or bits."""
    tiff = _tiff_header(path)
    if tiff is None:
        return False
    if tiff.bands > 1 and tiff.bands != channels and (tiff.bands > 4 or channels not in (1, 3, 4)):
        raise _other_bands(path, tiff.bands)
    several_deep = tiff.bands > 1 and tiff.bits > 8
    if tiff.bands > 4 or channels not in (1, 3, 4) or (several_deep and max_value != 65535):
        return True
    try:
        with Image.open(path, formats=FORMATS) as image:
            return (
                tiff.bands == channels != len(image.getbands())
            )  # RGB and a band that is no alpha
    except UnidentifiedImageError:
        if tiff.bands > 1:
            return True
        raise


class _TiffHeader(NamedTuple):
    height: int
    width: int
    bands: int
    bits: int


def _tiff_header(path: str) -> _TiffHeader | None:
    """Read the first directory of a TIFF or BigTIFF; None for any other file."""
    if _extension(path) not in (".tif", ".tiff"):
        return None
    with open(path, "rb") as file:
        start = file.read(16)
        if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
        order, big = "<" if start[:1] == b"I" else ">", b"+" in start[2:4]
        offset, count, entry = ("8xQ", "Q", "HHQ8s") if big else ("4xI", "H", "HHI4s")
        file.seek(struct.unpack_from(order + offset, start)[0])
        (num_tags,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
        rows = file.read(min(num_tags, 4096) * struct.calcsize(order + entry))
        tags = {277: 1, 258: 1}
        for tag, kind, number, value in struct.iter_unpack(order + entry, rows):
            form = {3: "H", 4: "I", 16: "Q"}.get(kind)
            if tag not in (256, 257, 258, 277) or form is None:
                continue
            if number * struct.calcsize(order + form) > len(
                value
            ):  # then it is where the values are
                file.seek(struct.unpack(order + ("Q" if big else "I"), value)[0])
                value = file.read(8)
            tags[tag] = struct.unpack_from(order + form, value)[0]
    _check_pixels(path, tags[257], tags[256])
    return _TiffHeader(tags[257], tags[256], tags[277], tags[258])


def _bands_first(path: str, array: np.ndarray, channels: int) -> np.ndarray:
    """View H W, H W C or C H W as C H W; C is the axis of `channels`, else the shorter one."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        first, last = array.shape[0], array.shape[2]
        if last == channels or (first != channels and last <= first):
            array = array.transpose(2, 0, 1)
    else:
        raise BadImage(path, f"has the shape {array.shape}: give H W, H W C or C H W")
    _check_pixels(path, *array.shape[1:])
    return array


def _fit_bands(path: str, pixels: np.ndarray, channels: int) -> np.ndarray:
    """Bring C H W uint8 to `channels`: grey is repeated for RGB, RGB weighted for grey."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=0)
    if len(pixels) == 3 and channels == 1:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return np.asarray(image.convert("L"))[None]
    raise _other_bands(path, len(pixels))


def _other_bands(path: str, bands: int) -> BadImage:
    return BadImage(path, f"has {bands} band{'s'[: bands != 1]}: set --data.channels {bands}")


def _check_pixels(path: str, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(path, f"has {width} x {height} pixels, above the limit of {MAX_PIXELS}")
    if height * width == 0:
        raise BadImage(path, "has no pixels")


def _to_uint8(values: np.ndarray, max_value: int) -> np.ndarray:
    """Scale 0..max_value to 0..255, rounded and clipped; NaN, a usual mark of no data, gives 0."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"holds values of type {values.dtype}")
    top = 1 if values.dtype.kind == "b" else max_value
    values = np.nan_to_num(values.astype(np.float64))
    return np.rint(np.clip(values, 0, top) * (255 / top)).astype(np.uint8)
