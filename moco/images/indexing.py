"""Indexing: the shards that `data.root` names become a set, once the index tells of all of them.

What the index lacks is read here, and what of it is passed over is said.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from moco.config import DataConfig, RunError, UserError
from moco.images.cache import Cache, Shard, cache_folder
from moco.images.formats import escaped, passed_over
from moco.images.patterns import find_shards
from moco.images.shard_headers import read_parquet, read_tar
from moco.images.shard_index import Index, Known, Members, known_formats
from moco.images.shards import ShardSet
from moco.images.stores import (
    REQUESTS,
    Facts,
    forget_listings,
    gives_parts,
    look_up,
    look_up_all,
    read_file,
)
from moco.log import track

log = logging.getLogger("moco")
_THREADS = 16  # that read shards for the index at a time
_AT_A_TIME = 64  # shards whose members are kept at once


def open_shards(data: DataConfig, held_out: bool = False) -> ShardSet | None:
    """Open one split of `data.root`; shards that are not indexed yet, or changed, are read for it.

    Returns:
        None where there are no held-out shards.

    Raises:
        UserError: There are no shards or no images, or a shard is none.
    """
    if not held_out:
        forget_listings(data.root)
    splits = find_shards(data)
    addresses = splits.held_out if held_out else splits.train
    if not addresses:
        return None
    cache = Cache(cache_folder(), data.cache_gib * 2**30)
    index = Index(cache.folder / "index.sqlite")
    with cache.alone():  # one process of this machine reads what the others find then
        cache.tidy()
        known = _indexed(index, cache, addresses)
    if not any(each.count for each in known.values()):
        raise UserError(
            f"data.root {data.root!r}: its {len(addresses)} shards hold no images that can be "
            "read here: give tars in WebDataset's layout (KEY.jpg, KEY.cls)"
        )
    return ShardSet(known, index, cache)


def _indexed(index: Index, cache: Cache, addresses: list[str]) -> dict[str, Known]:
    """Return what is known of shards; those that the index lacks are read and kept in it.

    A shard is read again too where files of another format can be read now.
    """
    known, facts, formats = index.known(), look_up_all(addresses), known_formats()
    with ThreadPoolExecutor(REQUESTS) as pool:
        rest = [address for address in addresses if address not in facts]
        facts |= zip(rest, pool.map(look_up, rest), strict=True)
    new = [
        address
        for address in addresses
        if address not in known
        or (known[address].facts, known[address].formats) != (facts[address], formats)
    ]
    if new:
        log.info("reading the headers of %d shards, once", len(new))
        known |= _read_all(index, cache, [Shard(address, facts[address]) for address in new])
    return {address: known[address] for address in addresses}


def _read_all(index: Index, cache: Cache, new: list[Shard]) -> dict[str, Known]:
    """Read shards into the index, and say which of their images are passed over."""
    known: dict[str, Known] = {}
    found: list[tuple[str, Facts, Members]] = []
    second, links, foreign, cut = 0, 0, Counter[str](), []
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(partial(_read, cache), new)
        for shard, members in zip(new, track(read, "index of shards", len(new)), strict=True):
            second += members.second
            links += members.links
            foreign.update(members.foreign)
            cut += [(shard.address, members.damaged)] if members.damaged else []
            found.append((*shard, members))
            if len(found) == _AT_A_TIME:
                known |= index.add(found)
                found = []
    known |= index.add(found)
    if cut:
        log.warning(
            "%s cannot be read on from byte %d (%d such shards): the images behind it are missing; "
            "make it anew (of tars one behind the other in a file the first is read)",
            *cut[0], len(cut),
        )  # fmt: skip
    if foreign:
        log.info("images that nothing here reads are passed over: %s", passed_over(foreign))
    if second:
        log.info(
            "%d images are passed over, since an image before them in their shard has the same "
            "key: the name up to its first dot", second,
        )  # fmt: skip
    if links:
        log.warning(
            "%d images or labels are passed over, since a shard holds a link in the place of each: "
            "make it with the files themselves (tar --dereference --hard-dereference)", links,
        )  # fmt: skip
    if nameless := sum(not shard.facts.tag for shard in new):
        log.warning(
            "%d shards have neither an ETag nor a date: another one of the same size in the place "
            "of one of them goes unnoticed", nameless,
        )  # fmt: skip
    return known


def _read(cache: Cache, shard: Shard) -> Members:
    """Read a shard; a tar of a store, of which all has to come for that, stays in the cache.

    That is where there is room without others having to go, or where parts cannot be asked for.
    """
    address = shard.address
    read: Callable[..., Members] = read_parquet if shard.is_parquet else read_tar
    if shard.is_parquet and not gives_parts(address):
        raise UserError(
            f"{address}: its web server sends no parts of files, in which Parquet is read: take "
            "one that does (nginx), a copy on this machine, or tars"
        )
    keeps = shard.is_cached and not shard.is_parquet
    keeps = keeps and (cache.make_room(shard, after=math.inf) or not gives_parts(address))
    try:
        path = str(cache.bring(shard)) if keeps else address
        return read_file(path, lambda file: read(file, address))
    except (UserError, RunError):
        raise
    except Exception as error:  # a broken Parquet file raises pyarrow's classes
        raise UserError(f"{address} cannot be read: {escaped(str(error))}") from None
