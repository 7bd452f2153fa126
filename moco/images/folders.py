"""Folders: which image files a tree holds, each once, whatever links and names it has."""

from __future__ import annotations

import contextlib
import difflib
import os

from moco.config import UserError
from moco.images.decode import extension, shown

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff"),
    *(".webp", ".ppm", ".pgm", ".pbm", ".npy"),
)


def check_root(root: str) -> str:
    """Return the root as an absolute path if it is a directory that can be listed."""
    path = expanded(root)
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
            f"did you mean {os.path.join(parent, near[0])!r}?"
            if near
            else "give a folder of images"
        )
        problem = f"does not exist: {hint}"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error}): make it readable"
    raise UserError(f"data.root {root!r} {problem}")


def walk(top: str) -> tuple[list[str], list[str]]:
    """Return the images below `top`, sorted, and the folders that cannot be read.

    Each image comes once, even where links go in circles.
    """
    paths, links, unread = [], [], []
    listed, waiting = set(), [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in listed:
            continue
        try:
            with os.scandir(folder) as entries:
                found = sorted((e for e in entries if visible(e.name)), key=lambda e: e.name)
        except OSError as error:
            unread.append(f"{shown(folder)}: {error.strerror}")
            continue
        listed.add(real)
        waiting += [entry.path for entry in reversed(found) if is_dir(entry)]
        files = [entry for entry in found if extension(entry.name) in EXTENSIONS]
        paths += [entry.path for entry in files if entry.is_file(follow_symlinks=False)]
        links += [entry.path for entry in files if entry.is_symlink() and _maybe_file(entry.path)]
    return sorted(paths + _new_links(links, listed)), unread


def _new_links(links: list[str], listed: set[str]) -> list[str]:
    """Keep the links to files not listed already, and dangling ones: those get named as bad."""
    new: dict[str, str] = {}
    for path in sorted(links):
        real = os.path.realpath(path)
        folder, name = os.path.split(real)
        image = visible(name) and extension(name) in EXTENSIONS
        if not (image and folder in listed and os.path.exists(real)):
            new.setdefault(real, path)
    return list(new.values())


def _maybe_file(link: str) -> bool:
    return os.path.isfile(link) or not os.path.exists(link)  # but no folder, nor a pipe


def visible(name: str) -> bool:
    """Tell whether a name is neither hidden nor left over from an archive."""
    return not name.startswith(".") and name != "__MACOSX"


def is_dir(entry: os.DirEntry) -> bool:
    """Tell whether an entry is a directory or a link to one."""
    # entry.is_dir() raises on a link to itself, os.path.isdir does not.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def expanded(root: str) -> str:
    """Return the absolute path, `~` replaced."""
    return os.path.abspath(os.path.expanduser(root))
