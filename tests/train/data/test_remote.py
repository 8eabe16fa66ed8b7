"""Shards behind a URL, from a server on this machine that cuts connections, fails, lies and stays away."""

import multiprocessing
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from visplice.train.data import remote
from visplice.train.data.loader import ShardLoader
from visplice.train.data.module import ShardData
from visplice.train.data.record import Sample
from visplice.train.data.remote import RemoteFolder, shown
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import read_manifest, read_samples, write_shards

SECRET = "user:s3cret@"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty samples in five shards of 20 kB."""
    folder = tmp_path_factory.mktemp("served") / "data"
    samples = (
        Sample(key=f"s{n:02d}", images=(("jpg", bytes([n]) * 2000),), record={"captions": ["a"]}) for n in range(20)
    )
    write_shards(samples, folder, source={}, per_shard=4)
    return folder


class Server:
    """Serves a folder; `faults` are what goes wrong with the next requests for a file, one after the other."""

    def __init__(self, folder):
        self.asked, self.faults = Counter(), {}
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder.parent))

            def do_GET(self):
                name = self.path.partition("?")[0].rpartition("/")[2]
                outer.asked[name] += 1
                waiting = outer.faults.get(name, outer.faults.get("*", []))
                getattr(self, waiting.pop(0) if waiting else "whole")(name)

            def whole(self, name):
                super().do_GET()

            def broken(self, name):
                self.send_error(500)

            def forbidden(self, name):
                self.send_error(403)

            def _reply(self, content, length):
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()
                self.connection.close()

            def cut(self, name):
                content = (folder / name).read_bytes()
                self._reply(content[: len(content) // 2], len(content))

            def short(self, name):
                """Says that half of it is all."""
                content = (folder / name).read_bytes()
                self._reply(content[: len(content) // 2], len(content) // 2)

            def changed(self, name):
                """The right length, and other bytes."""
                content = bytearray((folder / name).read_bytes())
                content[1000] ^= 1
                self._reply(content, len(content))

            def slow(self, name):
                time.sleep(0.3)
                super().do_GET()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://{self.host}/data"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote, "DELAY", 0.001)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def cached(cache):
    return {file.name.removesuffix(".tar") for file in cache.glob("*.tar")}


def hashes(folder):
    return [shard["sha256"] for shard in read_manifest(folder)["shards"]]


def read_all(source):
    return [source.read(shard, slot) for shard, count in enumerate(source.counts) for slot in range(count)]


# --- fetching --------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_folder_and_each_shard_is_fetched_once(server, folder, cache):
    for _ in range(2):
        source = ShardSet(server.url, cache=cache)
        assert read_all(source) == list(read_samples(sorted(folder.glob("*.tar"))))
    assert source.is_remote and source.describe()["digest"] == ShardSet(folder).describe()["digest"]
    assert cached(cache) == set(hashes(folder))
    assert [server.asked[f"shard-{n:06d}.tar"] for n in range(5)] == [1] * 5


def test_nothing_is_fetched_before_it_is_read(server, cache):
    source = ShardSet(server.url, cache=cache)
    assert source.counts == [4] * 5 and not cached(cache)
    source.read(3, 0)
    assert len(cached(cache)) == 1


@pytest.mark.parametrize("fault", ["broken", "cut", "short", "changed"])
def test_what_comes_wrong_is_fetched_again(server, folder, cache, fault):
    server.faults = {"shard-000000.tar": [fault] * 3}
    if fault in ("broken", "cut"):
        server.faults["manifest.json"] = [fault] * 2
    source = ShardSet(server.url, cache=cache)
    assert source.read(0, 2).key == "s02"
    assert server.asked["shard-000000.tar"] == 4
    (file,) = cache.glob("*.tar*")
    assert file.read_bytes() == (folder / "shard-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("broken", "HTTP status 500 Internal Server Error"),
        ("short", "10,240 bytes came, the manifest states 20,480"),
        ("changed", r"SHA-256 \w{12}\.\.\. came, the manifest states \w{12}\.\.\."),
    ],
)
def test_what_never_comes_right_names_url_attempts_and_reason(server, cache, fault, reason):
    server.faults = {"shard-000001.tar": [fault] * 99}
    source = ShardSet(server.url, cache=cache)
    where = rf"{server.url}/shard-000001\.tar"
    with pytest.raises(OSError, match=rf"^{where}: not fetched in 6 attempts, the last one failed by: {reason}$"):
        source.read(1, 0)
    assert not list(cache.glob("*.tar*"))
    assert source.read(0, 0).key == "s00"


def test_server_that_stays_away_is_named(server, cache):
    source = ShardSet(server.url, cache=cache)
    server.close()
    with pytest.raises(OSError, match=rf"{server.url}/shard-000000\.tar: not fetched in 6 attempts.*[Cc]onnect"):
        source.read(0, 0)
    with pytest.raises(OSError, match=rf"{server.url}/manifest\.json: not fetched in 6 attempts"):
        ShardData(server.url, cache=str(cache))


def test_refusal_is_not_asked_again(server, cache):
    server.faults = {"shard-000000.tar": ["forbidden"]}
    with pytest.raises(OSError, match=r"shard-000000\.tar: HTTP status 403 Forbidden$"):
        ShardSet(server.url, cache=cache).read(0, 0)
    assert server.asked["shard-000000.tar"] == 1


def test_missing_manifest_and_missing_shard_are_named(server, folder, cache):
    with pytest.raises(ValueError, match=rf"http://{server.host}/none/manifest\.json: no such file; data\.path is"):
        ShardSet(f"http://{server.host}/none", cache=cache)
    source = ShardSet(server.url, cache=cache)
    source._entries[0]["name"] = "gone.tar"
    with pytest.raises(FileNotFoundError, match=r"/data/gone\.tar: there is no such file"):
        source.read(0, 0)


def test_kind_of_url_that_needs_another_package_says_so(cache):
    with pytest.raises(ValueError, match=r"s3://bucket/data/manifest\.json: .*s3fs"):
        ShardSet("s3://bucket/data", cache=cache)


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://user:pw@host/a/b?token=x", "http://host/a/b"),
        ("could not open 'https://u:p@h:1/x?sig=1&b=2' twice", "could not open 'https://h:1/x' twice"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("is it? yes", "is it? yes"),
    ],
)
def test_urls_are_shown_without_secrets(url, expected):
    assert shown(url) == expected


def test_secrets_reach_the_server_and_no_message_and_no_checkpoint(server, cache):
    url = f"http://{SECRET}{server.host}/data?token=t0ken"
    source = ShardSet(url, cache=cache)
    assert source.read(0, 0).key == "s00"
    server.faults = {"*": ["broken"] * 99}
    with pytest.raises(OSError) as caught:
        source.read(1, 0)
    state = ShardLoader([source], None, batch_size=1).state_dict()
    for text in (str(caught.value), str(state), source.path, *(str(f) for f in cache.rglob("*"))):
        assert "s3cret" not in text and "t0ken" not in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


# --- the cache -------------------------------------------------------------------------------------------------------


def test_least_recently_used_shards_make_room(server, folder, cache):
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    source = ShardSet(server.url, cache=cache, cache_gb=2.5 * size / 1e9, keep=1)
    first, second, third, *_ = hashes(folder)
    for shard, left in ((0, {first}), (1, {first, second}), (0, {first, second}), (2, {first, third})):
        source.read(shard, 0)
        assert cached(cache) == left
        time.sleep(0.01)
    source.read(1, 3)  # fetched again
    assert server.asked["shard-000001.tar"] == 2


def test_shard_that_made_room_is_read_on_by_who_has_it_open(server, cache):
    source = ShardSet(server.url, cache=cache)
    source.read(0, 0)
    for file in cache.glob("*.tar"):
        file.unlink()
    assert source.read(0, 3).key == "s03"


def test_damaged_file_in_the_cache_is_fetched_again(server, folder, cache):
    ShardSet(server.url, cache=cache).read(0, 0)
    (file,) = cache.glob("*.tar")
    file.write_bytes(b"half")
    (cache / f"{file.name}.partial").write_bytes(b"of a run that was killed")
    assert ShardSet(server.url, cache=cache).read(0, 0).key == "s00"
    assert [file.name for file in cache.glob("*.tar*")] == [file.name]


def test_cache_that_cannot_hold_two_windows_is_refused(server, cache):
    source = ShardSet(server.url, cache=cache, cache_gb=50e-6)
    source.check_cache(2)
    with pytest.raises(ValueError, match=r"4 shards are .*, up to 8\.19e-05 GB, but data\.cache_gb is 5e-05"):
        source.check_cache(4)


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.default_cache() == tmp_path / "visplice/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert remote.default_cache() == Path.home() / ".cache/visplice/shards"


def fetch(url, cache, name, size, sha256):
    RemoteFolder(url, cache=cache).fetch(name, size=size, sha256=sha256)


def test_processes_of_one_machine_fetch_a_shard_once(server, folder, cache):
    server.faults = {"shard-000000.tar": ["slow"]}
    entry = read_manifest(folder)["shards"][0]
    context = multiprocessing.get_context("fork")
    arguments = (server.url, cache, entry["name"], entry["bytes"], entry["sha256"])
    processes = [context.Process(target=fetch, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert server.asked["shard-000000.tar"] == 1


# --- training --------------------------------------------------------------------------------------------------------


class Keys:
    def __call__(self, sample, rng):
        return sample.key

    def collate(self, rows):
        return {"keys": rows}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_url_sees_what_training_from_the_folder_sees(server, folder, cache, workers):
    server.faults = {"shard-000002.tar": ["broken", "cut"]}
    options = {"batch_size": 3, "shuffle_shards": 2}
    here = ShardLoader([ShardSet(folder)], Keys(), **options)
    there = ShardLoader(
        [ShardSet(server.url, cache=cache)], Keys(), num_workers=workers, context="fork" if workers else None, **options
    )
    for _ in range(2):
        assert list(here) == list(there)
    there.close()
    assert there.state_dict() | {"order": 0} == here.state_dict() | {"order": 0}
    assert sorted(server.asked[f"shard-{n:06d}.tar"] for n in range(5)) == [1, 1, 1, 1, 3]


def test_next_window_is_fetched_while_this_one_is_read(server, cache):
    loader = ShardLoader([ShardSet(server.url, cache=cache)], Keys(), batch_size=1, shuffle_shards=1)
    next(iter(loader))
    for _ in range(200):
        if len(cached(cache)) == 2:
            break
        time.sleep(0.01)
    assert len(cached(cache)) == 2
    first, second = (loader.order.batch(4 * n)[0].shard for n in range(2))
    assert server.asked[f"shard-{first:06d}.tar"] == server.asked[f"shard-{second:06d}.tar"] == 1


def test_server_that_goes_away_ends_training_in_one_line(server, cache):
    loader = ShardLoader(
        [ShardSet(server.url, cache=cache)], Keys(), batch_size=1, shuffle_shards=1, num_workers=1, context="fork"
    )
    server.close()
    with pytest.raises(OSError, match=rf"^{server.url}/shard-\d{{6}}\.tar: not fetched in 6 attempts[^\n]*$"):
        next(iter(loader))
    loader.close()
