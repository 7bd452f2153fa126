"""Shards in stores: the same bits as from a disk, through failures; the cache; one line if not."""

from __future__ import annotations

import errno
import os
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from webserver import WebServer

from moco.checks import check_root
from moco.config import DataConfig, RunError, UserError
from moco.images import cache as cache_room
from moco.images import sources, stores
from moco.images.cache import Cache, Shard
from moco.images.loader import PretrainData
from moco.images.packing import pack
from moco.images.steps import StepLoader
from moco.images.stores import Facts

pytestmark = pytest.mark.skipif(not find_spec("aiohttp"), reason="needs aiohttp")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test, and no time between attempts."""
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "WAITS_S", (0.0,) * 5)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """48 images in two classes as shards of some each, and 8 that are held out."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for name in ("cat", "dog"):
            names = [f"{i}.png" for i in range(count)]
            write_pictures(root / "files" / split / name, names, rng, small=4, size=(20, 24))
    pack(str(root / "files"), str(root / "set"), 0.006)
    return root / "set"


@pytest.fixture
def server(packed):
    with WebServer(packed) as running:
        yield running


def pattern(packed, base) -> str:
    train, test = (len(list(packed.glob(f"{split}-*"))) - 1 for split in ("train", "test"))
    return f"{base}/{{train-{{00000..{train:05d}}},test-{{00000..{test:05d}}}}}.tar"


def settings(root, **changes) -> DataConfig:
    options = {"dataset": "shards", "root": str(root), "image_size": 16, "batch_size": 8}
    return DataConfig(**options | {"num_workers": 0, "streams": 4, "window": 4} | changes)


def crops(root, **changes) -> torch.Tensor:
    """Return what two epochs give, and the rows of the images."""
    data = PretrainData(settings(root, **changes), seed=3, shuffle=False, symmetric=False)
    data.prepare(CPU)
    found = []
    for position in (0, data.steps_per_epoch):
        loader = StepLoader(data, lambda position=position: position)
        found += [(batch.index, batch.crops) for batch in loader]
        loader.close()
    assert len(found) == 12
    return torch.cat([c.flatten() for _, c in found]), torch.cat([rows for rows, _ in found])


def same(one, other) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_shards_of_a_web_server_give_the_bits_of_a_disk(packed, server):
    assert same(crops(pattern(packed, server.address)), crops(packed))
    bank, queries = sources.open_labelled(settings(pattern(packed, server.address)))
    assert (len(bank), len(queries), bank.classes) == (48, 8, ["cat", "dog"])


def test_a_shard_is_fetched_once_whatever_the_epochs_and_processes(packed, server, cache):
    root = pattern(packed, server.address)
    crops(root)
    shards = {name for _, name in server.asked if name.startswith("train")}
    assert len([p for p in cache.iterdir() if "-" in p.name]) == len(shards) > 3
    server.asked.clear()
    crops(root, num_workers=2)
    assert {method for method, _ in server.asked} == {"HEAD"}, "which ask for size and mark"


@pytest.mark.parametrize("kind", ["500", "cut"])
def test_requests_that_fail_now_and_then_change_no_bit(packed, server, kind):
    server.fault = lambda number, method, name: kind if number % 5 == 2 else ""
    assert same(crops(pattern(packed, server.address)), crops(packed))
    assert sum(number % 5 == 2 for number in range(len(server.asked))) > 3


def test_a_store_that_stays_away_is_one_line_with_the_address(packed, server):
    root = pattern(packed, server.address)
    data = PretrainData(settings(root, num_workers=2), seed=3, shuffle=False, symmetric=False)
    data.prepare(CPU)
    server.fault = lambda number, method, name: "500"
    loader = StepLoader(data, lambda: 0)
    with pytest.raises(RunError, match=r"http://127.0.0.1:\d+/train-0000\d.tar cannot be read: "):
        next(iter(loader))
    loader.close()


def test_an_address_that_is_not_there_is_one_line(server):
    with pytest.raises(RunError, match=r"/nowhere.tar cannot be read: it is not there"):
        sources.open_source(settings(f"{server.address}/nowhere.tar"), "train")
    assert len(server.asked) < 5, "what no attempt mends is not tried again"


def test_a_shard_replaced_in_a_store_is_one_line(packed, server, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    server.folder = folder
    data = PretrainData(
        settings(pattern(packed, server.address)), seed=3, shuffle=False, symmetric=False
    )
    data.prepare(CPU)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[::-1])  # of the same size
    loader = StepLoader(data, lambda: 0)
    with pytest.raises(RunError, match=r"train-0000\d.tar was replaced since"):
        list(loader)
    loader.close()


def test_headers_that_are_looked_at_fetch_no_shard(packed, server, cache):
    source = sources.open_source(settings(pattern(packed, server.address)), "train")
    source.paths[5].content(False)
    assert not [path for path in cache.iterdir() if "-" in path.name]
    source.paths[5].content(True)
    assert len([path for path in cache.iterdir() if "-" in path.name]) == 1


# S3


@pytest.fixture
def bucket(packed, monkeypatch):
    """The shards in a bucket of an S3 server on loopback."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "c0ffee",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in packed.iterdir():
        client.upload_file(str(path), "images", f"set/{path.name}")
    yield "s3://images/set"
    server.stop()


def test_shards_of_s3_give_the_bits_of_a_disk_by_any_pattern(packed, bucket, cache):
    whole = crops(packed)
    for root in (pattern(packed, bucket), f"{bucket}/*.tar", bucket):
        assert same(crops(root), whole)
    assert not any(b"c0ffee" in path.read_bytes() for path in cache.iterdir())


# The cache


def shard(server, name="train-00000.tar") -> Shard:
    address = f"{server.address}/{name}"
    return Shard(address, stores.look_up(address))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_cache_stays_within_its_bound_and_the_bits_are_the_same(packed, server, cache):
    sizes = [path.stat().st_size for path in packed.glob("train-*")]
    most = 3 * max(sizes)
    held = []
    fetch = cache_room.download

    def watched(address, target, facts):
        fetch(address, target, facts)
        held.append(sum(p.stat().st_size for p in cache.iterdir() if "-" in p.name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_room, "download", watched)
        found = crops(pattern(packed, server.address), cache_gib=most / 2**30)
    assert same(found, crops(packed))
    assert len(held) > len(sizes) and max(held) <= most


def test_processes_that_want_one_shard_fetch_it_once(server, cache):
    made, wanted = Cache(cache, 2**30), shard(server)
    server.asked.clear()
    threads = [threading.Thread(target=made.bring, args=[wanted]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [method for method, _ in server.asked].count("GET") == 1
    assert names(cache) == [wanted.name]


def test_what_a_kill_has_left_is_no_shard_and_goes(packed, server, cache):
    made, wanted = Cache(cache, 2**30), shard(server)
    cache.mkdir()
    (cache / f"{wanted.name}.part").write_bytes(b"half")
    assert not made.has(wanted)
    path = made.bring(wanted)
    assert path.read_bytes() == (packed / "train-00000.tar").read_bytes()
    (cache / f"{'0' * 24}-77.part").write_bytes(b"half")
    made.tidy()
    assert names(cache) == [wanted.name]


def test_a_killed_download_leaves_nothing_that_is_read(server, cache):
    made, wanted = Cache(cache, 2**30), shard(server)
    child = os.fork()
    if child == 0:  # it dies when half of the shard has come
        cache_room.download = lambda address, target, facts: (
            target.write_bytes(b"half"),
            os.kill(os.getpid(), 9),
        )
        made.bring(wanted)
    os.waitpid(child, 0)
    assert names(cache) == [f"{wanted.name}.part"]
    assert made.bring(wanted).stat().st_size == wanted.facts.size
    assert names(cache) == [wanted.name]


def test_a_full_disk_takes_the_place_of_other_shards_or_is_one_line(server, cache, monkeypatch):
    made = Cache(cache, 2**30)
    first, second = shard(server), shard(server, "train-00001.tar")
    made.bring(first)
    fetch = cache_room.download

    def full(address, target, facts):
        if made.has(first):
            raise OSError(errno.ENOSPC, "No space left on device")
        fetch(address, target, facts)

    monkeypatch.setattr(cache_room, "download", full)
    made.bring(second)
    assert names(cache) == [second.name]

    def always(address, target, facts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_room, "download", always)
    with pytest.raises(RunError, match=r"has no room left for http.*00000.tar.*MOCO_CACHE"):
        made.bring(first)
    assert not any(name.endswith(".part") for name in names(cache))


def test_a_shard_above_the_bound_names_the_setting(server, cache):
    with pytest.raises(RunError, match=r"more than data.cache_gib"):
        Cache(cache, 1000).bring(shard(server))


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, packed):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot hold shards .* set MOCO_CACHE"):
        sources.open_source(settings(packed), "train")


def test_room_is_made_at_the_cost_of_what_is_needed_last(cache):
    made = Cache(cache, 300)
    cache.mkdir()
    there = [Shard(f"http://x/{n}.tar", Facts(100, str(n))) for n in range(4)]
    for each in there[:3]:
        made.path(each).touch()
    use = {each.name: turn for each, turn in zip(there, (4, 9, 1, 5), strict=True)}
    assert made.make_room(there[3], lambda path: use[path.name], after=5)
    assert names(cache) == sorted([there[0].name, there[2].name, f"{there[3].name}.part"])
    other = Shard("http://x/9.tar", Facts(100, "9"))
    assert not made.make_room(other, lambda path: use[path.name], after=5), "all is needed sooner"


# Credentials


@pytest.mark.parametrize(
    "root", ["s3://me:c0ffee@host/x.tar", "https://c0ffee@host/x.tar", "https://x/y.tar?k=c0ffee"]
)
def test_an_address_with_credentials_is_refused_and_not_repeated(root):
    with pytest.raises(UserError, match="environment") as caught:
        check_root(root)
    assert "c0ffee" not in str(caught.value)


def test_errors_of_a_store_show_no_signed_address():
    error = OSError("GET https://x.org/y?X-Amz-Signature=c0ffee failed at https://me:c0ffee@z/")
    assert "c0ffee" not in stores._reason(error) and "x.org/y" in stores._reason(error)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec.core

    def absent(address, **options):
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(UserError, match=r"gs://x/y.tar needs a package: pip install gcsfs"):
        stores.file_system("gs://x/y.tar")


def test_paths_of_a_disk_need_no_store():
    assert not stores.is_remote(str(Path("/a/b.tar"))) and stores.is_remote("s3://a/b.tar")
