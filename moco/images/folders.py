"""Folders: which image files a tree holds, each once, whatever links and names it has.

This room needs no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections import Counter
from typing import NamedTuple

from moco.config import DataConfig, UserError
from moco.images.dicom import with_frames
from moco.images.formats import (
    ARCHIVES,
    UNNAMED,
    extension,
    has_signature,
    listed,
    looks_like_image,
    passed_over,
    readable,
    shown,
)

log = logging.getLogger("moco")
_SNIFFED = 16  # files without an ending that are looked into

# Folders that systems and archives keep beside the images, in lower case; so are hidden ones.
_HOUSEKEEPING = {
    *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("~snapshot", "lost+found", "$recycle.bin", "system volume information", "recycler"),
}


class Tree(NamedTuple):
    """What lies below a folder.

    Attributes:
        paths: The images that can be read here, sorted, each once.
        unread: The folders that cannot be listed, each with its reason.
        foreign: Ending to the number of images that are not read here.
        left_out: Name to the number of hidden and housekeeping folders.
    """

    paths: list[str]
    unread: list[str]
    foreign: Counter[str]
    left_out: Counter[str]


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


def has_image(top: str) -> bool:
    """Tell whether an image is seen soon below `top`, without following links."""
    endings = readable()
    return any(extension(name) in endings for *_, names in os.walk(top) for name in names)


def list_images(data: DataConfig, top: str) -> list[str]:
    """List the images below `top`, and say what is passed over.

    Raises:
        UserError: There are none.
    """
    tree = walk(top)
    paths, unread = with_frames(tree.paths), tree.unread
    if unread:
        log.warning("%d folders cannot be read and are skipped, first %s", len(unread), unread[0])
    foreign = passed_over(tree.foreign)
    if foreign and paths:
        log.info("%s: passed over, not read here: %s", shown(top), foreign)
    if tree.left_out:
        counts = sorted(tree.left_out.items(), key=lambda item: (-item[1], item[0]))
        names = ", ".join(f"{count} {shown(name)}" for name, count in counts[:9])
        log.info("%s: hidden and system folders are left out: %s", shown(top), names)
    if not paths:
        where = f"{data.root!r}" if top == expanded(data.root) else f"{data.root!r}: {shown(top)}"
        skipped = f"; {len(unread)} of them cannot be read" if unread else ""
        skipped += f"; there are {foreign}" if foreign else ""
        raise UserError(
            f"data.root {where} holds no images (looked for {listed(readable())} in all "
            f"subfolders{skipped}): {_remedy(top)}"
        )
    return paths


def _remedy(top: str) -> str:
    """Say what to do about a folder without images, in which shards may lie."""
    with contextlib.suppress(OSError):
        names = os.listdir(top)
        for dataset, ending in (("shards", ".tar"), ("parquet", ".parquet")):
            if any(name.endswith(ending) for name in names):
                return f"it holds {ending} files, which are read with --data.dataset {dataset}"
    return "give the folder that holds them"


def walk(top: str) -> Tree:
    """List the images below `top`, each once, even where links go in circles."""
    paths, links, endings = [], [], readable()
    unread, unnamed, foreign, left_out = [], [], Counter(), Counter()
    listed, waiting = set(), [top]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in listed:
            continue
        try:
            with os.scandir(folder) as entries:
                everything = list(entries)
        except OSError as error:
            unread.append(f"{shown(folder)}: {error.strerror}")
            continue
        listed.add(real)
        found = sorted((e for e in everything if visible(e.name)), key=lambda e: e.name)
        left_out.update(e.name for e in everything if not visible(e.name) and is_dir(e))
        waiting += [entry.path for entry in reversed(found) if is_dir(entry)]
        kinds = [(entry, extension(entry.name)) for entry in found]
        files = [entry for entry, ending in kinds if ending in endings]
        others = [(entry, x) for entry, x in kinds if x not in endings and _is_file(entry)]
        foreign.update(x for _, x in others if looks_like_image(x) or x in ARCHIVES)
        unnamed += [entry.path for entry, x in others if not x or x[1:].isdigit()]
        paths += [entry.path for entry in files if entry.is_file(follow_symlinks=False)]
        links += [entry.path for entry in files if entry.is_symlink() and _maybe_file(entry.path)]
    if any(map(has_signature, unnamed[:: max(1, len(unnamed) // _SNIFFED)])):
        foreign[UNNAMED] = len(unnamed)
    return Tree(sorted(paths + _new_links(links, listed, endings)), unread, foreign, left_out)


def _new_links(links: list[str], listed: set[str], endings: frozenset[str]) -> list[str]:
    """Keep the links to files not listed already, and dangling ones: those get named as bad."""
    new: dict[str, str] = {}
    for path in sorted(links):
        real = os.path.realpath(path)
        folder, name = os.path.split(real)
        image = visible(name) and extension(name) in endings
        if not (image and folder in listed and os.path.exists(real)):
            new.setdefault(real, path)
    return list(new.values())


def _maybe_file(link: str) -> bool:
    return os.path.isfile(link) or not os.path.exists(link)  # but no folder, nor a pipe


def visible(name: str) -> bool:
    """Tell whether a name is neither hidden nor that of a system's own folder."""
    return not name.startswith(".") and name.lower() not in _HOUSEKEEPING


def _is_file(entry: os.DirEntry) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def is_dir(entry: os.DirEntry) -> bool:
    """Tell whether an entry is a directory or a link to one."""
    # entry.is_dir() raises on a link to itself, os.path.isdir does not.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def expanded(root: str) -> str:
    """Return the absolute path, `~` replaced."""
    return os.path.abspath(os.path.expanduser(root))


def is_same_place(root: str, other: str) -> bool:
    """Tell whether two paths lead to one directory."""
    return os.path.realpath(expanded(root)) == os.path.realpath(expanded(other))
