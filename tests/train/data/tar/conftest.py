"""Shards as bytes, whole, and a reader that gives what is good and what is bad in them."""

import io
import json
import random
import tarfile

import pytest

from visplice.train.data.record import FAULTS, Fault
from visplice.train.data.tar_index import read_slot, scan_shard


@pytest.fixture(scope="session")
def record():
    """Makes the record of a sample."""

    def make(caption, images=("jpg",)):
        return json.dumps({"images": list(images), "captions": [caption]}).encode()

    return make


@pytest.fixture(scope="session")
def tar():
    """Makes a tar, as bytes, of pairs of a name or TarInfo and its content."""

    def make(members, form=tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as file:
            for name, content in members:
                info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.size = info.size or len(content)
                file.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def samples(record):
    """Makes the members of samples s00, s01, ..., a picture and a record each."""

    def make(count, folder="", size=700):
        rng = random.Random(1)
        for index in range(count):
            yield f"{folder}s{index:02d}.jpg", rng.randbytes(rng.randrange(1, size))
            yield f"{folder}s{index:02d}.json", record(f"caption {index}")

    return make


@pytest.fixture
def read(tmp_path):
    """Reads a shard from its bytes: samples by key, and names of faults by key."""

    def run(data):
        file = tmp_path / "x.tar"
        file.write_bytes(data)
        good, bad = {}, []
        slots = scan_shard(file)
        with open(file, "rb") as stream:
            for slot in slots:
                slot.key.encode()  # it can be written
                try:
                    good[slot.key] = read_slot(stream.fileno(), slot)
                except Fault as fault:
                    bad.append((slot.key, fault.name))
                    assert fault.name in FAULTS and str(fault).isprintable()
        assert len(good) + len(bad) == len(slots)
        return good, bad

    return run
