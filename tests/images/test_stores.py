"""Shards in stores: the same bits as from a disk, through failures; the cache; one line if not."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from webserver import S3Server, WebServer

from moco.checks import check_root
from moco.config import DataConfig, RunError, UserError
from moco.images import cache as cache_room
from moco.images import shards, sources, stores
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


def opened(root, **changes) -> PretrainData:
    """Open images without what the index has left in the cache."""
    source = sources.open_source(settings(root, **changes), "train")
    for path in source.paths.cache.folder.glob("*-*"):
        path.unlink()
    data = PretrainData(settings(root, **changes), seed=3, shuffle=False, symmetric=False)
    data.prepare(CPU)
    return data


def crops(root, **changes) -> torch.Tensor:
    """Return what two epochs give, and the rows of the images."""
    data = opened(root, **changes)
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
    data = PretrainData(settings(root, num_workers=2), seed=3, shuffle=False, symmetric=False)
    data.prepare(CPU)
    loader = StepLoader(data, lambda: 0)
    assert len(list(loader)) == 6
    loader.close()
    assert {method for method, _ in server.asked} == {"HEAD"}, "which ask for size and mark"


@pytest.mark.parametrize("kind", ["500", "cut"])
def test_requests_that_fail_now_and_then_change_no_bit(packed, server, kind):
    server.fault = lambda number, method, name: kind if number % 5 == 2 else ""
    assert same(crops(pattern(packed, server.address)), crops(packed))
    assert sum(number % 5 == 2 for number in range(len(server.asked))) > 3


def test_a_store_that_stays_away_is_one_line_with_the_address(packed, server):
    root = pattern(packed, server.address)
    data = opened(root, num_workers=2)
    server.fault = lambda number, method, name: "500"
    loader = StepLoader(data, lambda: 0)
    with pytest.raises(RunError, match=r"http://127.0.0.1:\d+/train-0000\d.tar cannot be read: "):
        next(iter(loader))
    loader.close()


def test_an_address_that_is_not_there_is_one_line(server):
    with pytest.raises(RunError, match=r"/nowhere.tar cannot be read: it is not there"):
        sources.open_source(settings(f"{server.address}/nowhere.tar"), "train")
    assert len(server.asked) < 5, "what no attempt mends is not tried again"


@pytest.fixture
def own_server(packed, tmp_path):
    """A server of a copy of the shards, which a test may replace."""
    with WebServer(shutil.copytree(packed, tmp_path / "copy")) as running:
        yield running


def replace(path: Path) -> None:
    """Put another file of the same size in the place of a shard, with the same images."""
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes()[:-1] + b"x")  # behind the last member
    new.replace(path)


def replaces(folder: Path, method: str):
    """Return a fault that replaces each shard when it is asked for: after a look at its mark."""
    waiting, turn = {path.name for path in folder.glob("train-*")}, threading.Lock()

    def fault(number, asked, name):
        with turn:
            if asked == method and name in waiting:
                waiting.remove(name)
                replace(folder / name)
        return ""

    return fault


@pytest.mark.parametrize("moment", ["before", "GET"])
def test_a_shard_replaced_in_a_store_is_one_line(packed, own_server, moment):
    """Before it is asked for, and between a look at its mark and its bytes."""
    data = opened(pattern(packed, own_server.address))
    if moment == "before":
        for path in own_server.folder.glob("train-*"):
            replace(path)
    own_server.fault = replaces(own_server.folder, moment)
    loader = StepLoader(data, lambda: 0)
    with pytest.raises(RunError, match=r"train-0000\d.tar was replaced since"):
        list(loader)
    loader.close()


def test_what_is_read_for_the_index_stays_in_the_cache_where_there_is_room(packed, server, cache):
    root, held = pattern(packed, server.address), lambda: [*cache.glob("*-*")]
    sources.open_source(settings(root, cache_gib=2**-30), "train")
    assert held() == []
    (cache / "index.sqlite").unlink()
    sources.open_source(settings(root), "train")
    assert len(held()) == len([*packed.glob("train-*")])


def test_headers_that_are_looked_at_fetch_no_shard(packed, server, cache):
    source = opened(pattern(packed, server.address)).source
    source.paths[5].content(False)
    assert not [path for path in cache.iterdir() if "-" in path.name]
    source.paths[5].content(True)
    assert len([path for path in cache.iterdir() if "-" in path.name]) == 1


# S3


@pytest.fixture(scope="module")
def s3_server():
    """An S3 server on loopback; starting one and its client takes seconds."""
    for name in ("moto.server", "boto3"):
        pytest.importorskip(name)
    with S3Server() as running:
        yield running


@pytest.fixture
def s3(packed, s3_server, monkeypatch):
    """The shards in a bucket of an S3 server that answers at once and without a fault."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # which knows an older bucket
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.latency, s3_server.fault = 0.0, lambda number, method, name: ""
    s3_server.upload(packed)
    s3_server.asked.clear()
    return s3_server


BUCKET = "s3://images/set"


def test_shards_of_s3_give_the_bits_of_a_disk_by_any_pattern(packed, s3, cache):
    """Each pattern gives the same shards down to their marks, so the images of one are read."""
    roots = (BUCKET, f"{BUCKET}/*.tar", pattern(packed, BUCKET))
    shards, *others = (sources.open_source(settings(r), "train").paths.shards for r in roots)
    assert len(shards) > 3 and others == [shards, shards]
    assert same(crops(BUCKET), crops(packed))
    assert not any(b"c0ffee" in path.read_bytes() for path in cache.iterdir())


def test_a_slow_and_faulty_s3_changes_no_bit(packed, s3):
    """200 ms before each answer, and every seventh one an error or cut short."""
    s3.latency, kinds = 0.2, {2: "500", 5: "cut"}
    s3.fault = lambda number, method, name: kinds.get(number % 7, "")
    assert same(crops(pattern(packed, BUCKET)), crops(packed))
    assert len(s3.asked) > 28


def test_a_slow_and_faulty_web_server_changes_no_bit(packed, server):
    server.latency, kinds = 0.2, {2: "500", 5: "cut"}
    server.fault = lambda number, method, name: kinds.get(number % 7, "")
    assert same(crops(pattern(packed, server.address)), crops(packed))
    assert len(server.asked) > 28


def test_a_bucket_is_listed_anew_whenever_it_is_opened(packed, s3):
    """A process that trains twice is not told what the bucket held at first."""
    s3.client.delete_object(Bucket="images", Key="set/train-00001.tar")
    sources.open_source(settings(BUCKET), "train")  # reading headers forgets the listing
    before = sources.open_source(settings(BUCKET), "train")
    s3.client.upload_file(str(packed / "train-00001.tar"), "images", "set/train-00001.tar")
    s3.client.upload_file(str(packed / "train-00002.tar"), "images", "set/train-00000.tar")
    after = sources.open_source(settings(BUCKET), "train")
    assert len(after.paths.shards) == len(before.paths.shards) + 1
    first = [source.paths.shards[0].facts for source in (before, after)]
    assert first[0] != first[1]


# Images that come alone, while their shards are fetched


@pytest.fixture
def large(monkeypatch):
    """Take the shards for large ones."""
    monkeypatch.setattr(shards, "_SMALL", 0)


def test_the_first_batches_wait_for_no_shard(packed, server, large):
    """A worker gives four batches although no whole shard can be fetched yet."""
    came = threading.Event()

    def hold(number, method, name):
        if method == "GET":
            came.wait()
        return ""

    data = opened(pattern(packed, server.address))
    server.fault = hold
    loader = StepLoader(data, lambda: 0)
    batches = iter(loader)
    found = [next(batches) for _ in range(4)]
    came.set()
    found += list(batches)
    loader.close()
    whole = crops(packed)
    crops_of_epoch = torch.cat([batch.crops.flatten() for batch in found])
    assert crops_of_epoch.equal(whole[0][: len(crops_of_epoch)])
    assert ("RANGE", "train-00000.tar") in server.asked


def test_images_that_come_alone_through_failures_change_no_bit(packed, server, large):
    server.fault = lambda number, method, name: "500" if number % 5 == 2 else ""
    assert same(crops(pattern(packed, server.address)), crops(packed))
    assert "RANGE" in {method for method, _ in server.asked}


def test_a_shard_replaced_while_its_images_come_alone_is_one_line(packed, own_server, large):
    data = opened(pattern(packed, own_server.address))
    own_server.fault = replaces(own_server.folder, "RANGE")
    loader = StepLoader(data, lambda: 0)
    with pytest.raises(RunError, match=r"train-0000\d.tar was replaced since"):
        next(iter(loader))
    loader.close()


@pytest.mark.parametrize("room", [100.0, 2.6e-5])  # of all shards, and of one or two
def test_a_web_server_that_sends_no_parts_changes_no_bit(packed, server, large, room):
    server.fault = lambda number, method, name: "whole"
    assert same(crops(pattern(packed, server.address), cache_gib=room), crops(packed))


# The cache


def shard(server, name="train-00000.tar") -> Shard:
    address = f"{server.address}/{name}"
    return Shard(address, stores.look_up(address))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def size_or_0(path):
    """Return a file's size; files are renamed and removed while they are counted."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def test_the_cache_stays_within_its_bound_and_the_bits_are_the_same(packed, server, cache):
    sizes = [path.stat().st_size for path in packed.glob("train-*")]
    most = 3 * max(sizes)
    held = []
    fetch = cache_room.download

    def watched(address, target, facts):
        fetch(address, target, facts)
        with Cache(cache, most)._locked("room.lock"):  # none is removed while others are counted
            held.append(sum(map(size_or_0, cache.glob("*-*"))))

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


def test_room_that_comes_free_while_it_is_looked_for_is_taken(server, cache, monkeypatch):
    """What another process fetches may be whole just after there was no room beside it."""
    made, part = Cache(cache, 21000), cache / f"{'0' * 24}-9999.part"
    cache.mkdir()
    part.touch()
    answers, find = [made.make_room(shard(server))], made.make_room
    monkeypatch.setattr(made, "make_room", lambda *a: answers.pop() if answers else find(*a))
    part.rename(part.with_suffix(""))
    assert answers == [False] and made.bring(shard(server)).exists()


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, packed):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot hold shards .* set MOCO_CACHE"):
        sources.open_source(settings(packed), "train")


def test_a_cache_that_takes_no_file_is_one_line(monkeypatch, packed, cache):
    def read_only(*_, **__) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cache.mkdir(exist_ok=True)
    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(UserError, match="cannot hold shards .Read-only file .* set MOCO_CACHE"):
        sources.open_source(settings(packed), "train")


def test_a_copy_that_was_cut_short_is_fetched_again(server, cache, caplog):
    caplog.set_level("INFO", logger="moco")
    one, here = shard(server), Cache(cache, 1e9)
    whole = here.bring(one).read_bytes()
    here.path(one).write_bytes(whole[:700])
    assert here.bring(one).read_bytes() == whole
    assert "was cut short and is fetched again" in caplog.text


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
        check_root(DataConfig(dataset="shards", root=root))
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
