"""Formats: which endings of file names are images, what reads them, and which package that needs.

The content decides what a file is, not its ending; the ending decides which decoders may look.
`shown` writes names of any bytes. This room needs no torch.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from importlib.util import find_spec

# Only these decoders run, whatever a file claims to be: Pillow's EPS reader starts Ghostscript.
ORDINARY = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
TIFF, DICOM = (".tif", ".tiff"), (".dcm", ".dicom")
_ALWAYS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", *TIFF),
    *(".webp", ".ppm", ".pgm", ".pbm", ".npy"),
)
# Further decoders of Pillow, which only files of these endings meet.
_FURTHER = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}
_FURTHER |= dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG2000")
_PACKAGES = {"HEIF": ("pillow_heif", "pillow-heif"), "DICOM": ("pydicom", "pydicom")}
_FEATURES = {"AVIF": ("avif", "'pillow>=11.3'"), "JPEG2000": ("jpg_2000", "pillow")}
# What looks like an image, and is read by nothing here.
_FOREIGN = (
    *(".svg", ".eps", ".psd", ".xcf", ".exr", ".hdr", ".ico", ".tga", ".pcx", ".jxl", ".dng"),
    *(".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".fits", ".fit", ".nii", ".mha", ".nrrd"),
    *(".czi", ".lif", ".nd2", ".svs", ".ndpi", ".mrxs", ".npz", ".mat", ".h5", ".hdf5"),
)
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".parquet", ".tfrecord")
UNNAMED = "without an image's ending"
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")  # of common images
_IMAGES = frozenset((*_ALWAYS, *_FURTHER, *DICOM, *_FOREIGN))


def extension(name: str) -> str:
    """Return a file name's extension in lower case, dot included."""
    return os.path.splitext(name)[1].lower()


def pillow_formats(ending: str) -> tuple[str, ...]:
    """Return the decoders of Pillow that may look at a file of this ending."""
    return (*ORDINARY, _FURTHER[ending]) if ending in _FURTHER else ORDINARY


def needed(ending: str) -> str:
    """Return what to install before files of this ending are read; empty if they are already."""
    name = "DICOM" if ending in DICOM else _FURTHER.get(ending, "")
    if name in _PACKAGES:
        module, package = _PACKAGES[name]
        return "" if find_spec(module) else package
    if name in _FEATURES:
        from PIL import features

        feature, package = _FEATURES[name]
        return "" if features.check(feature) else package
    return ""


def readable() -> frozenset[str]:
    """Return the endings of the files that can be read here."""
    optional = (*_FURTHER, *DICOM)
    return frozenset((*_ALWAYS, *(ending for ending in optional if not needed(ending))))


def looks_like_image(ending: str) -> bool:
    """Tell whether files of this ending are images, whether or not they can be read here."""
    return ending in _IMAGES


def has_signature(path: str) -> bool:
    """Tell whether a file begins as images do, whatever its name."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError:
        return False
    is_other = (start[:4], start[8:12]) == (b"RIFF", b"WEBP") or start[128:] == b"DICM"
    return start.startswith(_SIGNATURES) or is_other


def passed_over(counts: dict[str, int]) -> str:
    """Say in words which images are not read, by ending, and what would read them; may be empty."""
    parts = []
    for ending, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        hint = f"pip install {needed(ending)}" if needed(ending) else ""
        hint = "an archive" if ending in ARCHIVES else hint
        parts.append(f"{count} {ending}" + (f" ({hint})" if hint else ""))
    return ", ".join(parts)


def listed(endings: Iterable[str]) -> str:
    """Write endings as a list for people."""
    return " ".join(sorted(endings))


class Member(str):
    """The name of an image that is no file of its own, such as one inside a shard.

    Attributes:
        content: Returns its bytes; false asks for them without what else would come with them.
    """

    def __new__(cls, name: str, content: Callable[[bool], bytes]) -> Member:
        member = super().__new__(cls, name)
        member.content = content
        return member


class BadImage(ValueError):
    """A file that does not become an image of the wanted channels; has `path` and `reason`."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


def shown(path: str) -> str:
    """Return a path as one printable line, whatever bytes its name holds."""
    return escaped(os.fsencode(path).decode("utf-8", "backslashreplace"))


def lettered(name: str) -> str:
    """Return a name as one line in letters that Pillow's own font has: without their accents."""
    parts = unicodedata.normalize("NFKD", shown(name))
    return "".join(c for c in parts if not unicodedata.combining(c))


def escaped(text: str) -> str:
    """Escape control characters, so that a message stays on one line."""
    return "".join(c if c >= " " else c.encode("unicode_escape").decode() for c in text)
