"""Stores: files at addresses such as s3://bucket/name, through fsspec; local files are one of them.

What fails is tried again a few times, ever later, and then told in one line with the address. The
back ends find credentials in the environment; addresses have none, and the queries of addresses
that a store signs itself are cut from its messages. This room needs no torch.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moco.config import RunError, UserError

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between the attempts
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError)  # which no attempt mends
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
_LASTING_ANSWERS = (400, 401, 403, 404, 410)  # of a web server
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp"}
_PACKAGES |= {"https": "aiohttp", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Last-Modified", "mtime")
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "az")  # schemes whose addresses begin with one
REQUESTS = 64  # that a process makes of a store at a time
_parts: dict[str, bool] = {}  # by folder of a web server: whether it gives parts of files


class Facts(NamedTuple):
    """What tells a file from another at the same address: bytes, and the store's own mark."""

    size: int
    tag: str


def is_remote(address: str) -> bool:
    """Tell whether an address is one of a store, and no path of this machine."""
    return "://" in address


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the file's name in it.

    Raises:
        UserError: Its scheme is unknown, or its package is missing.
    """
    from fsspec.core import url_to_fs

    scheme = address.partition("://")[0] if is_remote(address) else ""
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            # Its own limit covers a whole download, however large it is.
            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_read=60)}
        elif scheme in ("s3", "s3a"):
            # Its own limit is 10 connections, and files in several parts come through memory. It
            # repeats each request five times, and botocore below it as often again.
            own = {"max_pool_connections": REQUESTS, "retries": {"total_max_attempts": 1}}
            options = {"config_kwargs": own, "max_concurrency": 1}
        return url_to_fs(address, **options)
    except ImportError:
        package = _PACKAGES.get(scheme, f"fsspec's back end for {scheme}")
        raise UserError(f"{address} needs a package: pip install {package}") from None
    except ValueError as error:
        raise UserError(f"{address} is no address that can be read: {_reason(error)}") from None


def listed(pattern: str, ending: str) -> list[str]:
    """Return the sorted addresses of a remote pattern with stars, or of a remote folder's files.

    Raises:
        UserError: The store has no such bucket.
    """
    store, path = file_system(pattern)
    path = path if "*" in path else f"{path.rstrip('/')}/*{ending}"
    names = _tried(pattern, lambda: _glob(pattern, store, path))
    if not names:
        _check_bucket(pattern, store, path)
    return sorted(store.unstrip_protocol(name) for name in names)


def _glob(pattern: str, store: Any, path: str) -> list[str]:
    """Return a store's names by a pattern; of an empty bucket older releases of s3fs raise."""
    try:
        return store.glob(path)
    except FileNotFoundError:
        if pattern.partition("://")[0] not in _BUCKETS:
            raise
        return []


def _check_bucket(pattern: str, store: Any, path: str) -> None:
    """Raise UserError where the store says that it has no bucket of the name in a pattern."""
    scheme, bucket = pattern.partition("://")[0], path.partition("/")[0]
    if scheme not in _BUCKETS or "*" in bucket:
        return
    try:
        store.ls(bucket)
    except FileNotFoundError:
        raise UserError(
            f"data.root {pattern!r}: the store has no bucket {bucket}: mend its name, or what the "
            "environment says of the store (for S3 AWS_ENDPOINT_URL, AWS_PROFILE)"
        ) from None
    except Exception:  # as where only a part of the bucket may be listed
        return


def forget_listings(address: str) -> None:
    """Have a store asked anew which files it has; a process keeps what it was told before."""
    if is_remote(address):
        file_system(address)[0].invalidate_cache()


def look_up(address: str) -> Facts:
    """Ask for size and mark of a file."""
    if not is_remote(address):
        found = os.stat(address)
        return Facts(found.st_size, str(found.st_mtime_ns))
    store, path = file_system(address)

    def ask() -> dict[str, Any]:
        store.invalidate_cache()
        return store.info(path)

    return _facts(_tried(address, ask))


def look_up_all(addresses: list[str]) -> dict[str, Facts]:
    """Return the facts of those files that one listing of their folders tells; it may be none."""
    found: dict[str, Facts] = {}
    for folder in {address.rpartition("/")[0] for address in addresses}:
        if not is_remote(folder) or folder.startswith("http"):
            continue  # a web server lists nothing that could be relied on
        store, path = file_system(folder)
        try:
            for info in store.ls(path, detail=True):
                if info.get("size"):
                    found[store.unstrip_protocol(info["name"])] = _facts(info)
        except Exception:  # then each file is asked for, which says what is wrong
            continue
    return found


def gives_parts(address: str) -> bool:
    """Tell whether parts of a file can be asked for; some web servers send whole files alone."""
    folder = address.rpartition("/")[0]
    if not folder.startswith("http"):
        return True
    if folder not in _parts:
        store, path = file_system(address)
        try:
            with store.open(path, "rb", cache_type="none", size=2) as file:
                file.seek(1)
                file.read(1)
            _parts[folder] = True
        except ValueError:  # by fsspec, from the headers alone: nothing has come
            _parts[folder] = False
        except Exception:  # which is told where the file is read
            return True
    return _parts[folder]


def read_range(address: str, start: int, end: int) -> bytes:
    """Read a part of a file, less than that where the file ends before."""
    store, path = file_system(address)
    return _tried(address, lambda: store.cat_file(path, start=start, end=end))


def read_file(address: str, read: Callable[[Any], T]) -> T:
    """Return what `read` makes of an open file, which is read from its start if that fails."""
    if not is_remote(address):
        with open(address, "rb") as file:
            return read(file)
    store, path = file_system(address)

    def attempt() -> T:
        with store.open(path, "rb", cache_type="readahead") as file:
            return read(file)

    return _tried(address, attempt)


def download(address: str, target: Path, facts: Facts) -> None:
    """Copy a file; a copy that is not whole is fetched again.

    Raises:
        RunError: The file is another one than `facts` tell of, it cannot be fetched, or there is no
            room for it.
    """
    store, path = file_system(address)

    def attempt() -> None:
        store.get_file(path, str(target))
        check_unchanged(address, facts)  # afterwards, since it may be replaced at any time before
        if target.stat().st_size != facts.size:
            raise OSError(f"{target.stat().st_size} of {facts.size} bytes came")

    _tried(address, attempt)


def check_unchanged(address: str, facts: Facts) -> None:
    """Raise RunError where another file is at an address than before."""
    found = look_up(address)
    if found != facts:
        raise RunError(
            f"{address} was replaced since its shards were listed ({facts.size} bytes then, "
            f"{found.size} now): put the former one back, or start a new run",
            local=True,
        )


def _facts(info: dict[str, Any]) -> Facts:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return Facts(int(info.get("size") or 0), tag.strip('"'))


def _tried(address: str, attempt: Callable[[], T]) -> T:
    """Return what an attempt gives; repeat it while it fails.

    Raises:
        RunError: It fails for good; the message is one line.
    """
    for wait in (*WAITS_S, None):
        try:
            return attempt()
        except (RunError, UserError):
            raise
        except Exception as error:  # each back end raises classes of its own
            no_room = getattr(error, "errno", None) in _NO_ROOM
            if no_room:
                raise
            if wait is None or _is_lasting(error):
                raise RunError(f"{address} cannot be read: {_reason(error)}", local=True) from None
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_lasting(error: BaseException) -> bool:
    """Tell whether no attempt mends an error; fsspec says not found of a web server's 500 too."""
    cause = error.__cause__ or error
    if type(cause).__name__ in _LASTING_NAMES:
        return True
    return isinstance(cause, _LASTING) or getattr(cause, "status", 0) in _LASTING_ANSWERS


def _reason(error: BaseException) -> str:
    """Write an error as one short line without the queries of addresses, which may be signed."""
    error = error.__cause__ or error
    if isinstance(error, FileNotFoundError) or getattr(error, "status", 0) == 404:
        return "it is not there"
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\?[^\s'\"]+", "?...", text)
    return re.sub(r"//[^/\s@]+@", "//...@", text)[:300]
