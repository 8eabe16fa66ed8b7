"""Samples made by hand, and what a filter of curation makes of them."""

import json

import pytest

from visplice.train.curate.curate import curate, make_filter
from visplice.train.curate.verdict import Located
from visplice.train.data.record import Sample, check_marks, check_record
from visplice.train.data.shard_set import ShardSet
from visplice.train.data.shards import write_shards

MAIL = "write to joe@example.com"


@pytest.fixture
def sample():
    """Makes a sample of captions; turns are questions and answers, one after the other."""

    def make(key, *captions, turns=(), images=(b"",), **fields):
        record = dict(fields)
        if captions:
            record["captions"] = list(captions)
        if turns:
            record["conversations"] = [
                {"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)
            ]
        return Sample(key=key, images=tuple(("png", data) for data in images), record=record)

    return make


@pytest.fixture
def apply():
    """What a filter leaves of samples, by key, and its verdicts."""

    def run(name, samples, **options):
        rule = make_filter(name, options)
        measured = [Located("shard", item.key, rule.measure(item)) for item in samples]
        verdicts = {key: verdict for _, key, verdict in rule.verdicts(measured)}
        left = {}
        for item in samples:
            verdict = verdicts.get(item.key)
            if verdict is None or not verdict.drop:
                left[item.key] = {**item.record, **(verdict.edits if verdict else {})}
                check_record(left[item.key])  # what is left is a sample
                check_marks(left[item.key], len(item.images))
        return left, verdicts

    return run


def samples(count=30):
    """Captions, every third the same; a conversation in every fifth; a private one in every seventh."""
    for index in range(count):
        captions = [f"caption number {index}", "image of" if index % 3 == 0 else f"another {index}"]
        if index % 7 == 0:
            captions.append(MAIL)
        record = {"captions": captions, "url": f"http://x.org/{index % 25}.jpg"}
        if index % 5 == 0:
            record["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "it"}]
        yield Sample(key=f"s{index:02d}", images=(("jpg", b"%d" % (index % 28)),), record=record)


@pytest.fixture
def write():
    """Writes a data set to try filters on."""

    def run(folder, *, count=30, per_shard=7):
        write_shards(samples(count), folder, source={"name": "by hand"}, per_shard=per_shard)
        return folder

    return run


@pytest.fixture
def folder(write, tmp_path):
    """Thirty samples in five shards."""
    return write(tmp_path / "data")


@pytest.fixture
def read():
    """Everything that a reader sees of a data set."""

    def run(folder):
        shards = ShardSet(folder)
        found = [
            (name, slot.key, json.dumps(shards.read(index, at).record))
            for index, name in enumerate(shards.names)
            for at, slot in enumerate(shards.slots(index))
        ]
        assert shards.counts == [len(shards.slots(index)) for index in range(len(shards.names))]
        assert len(found) == shards.describe()["samples"]
        return found, shards.describe(), shards.curation.describe()

    return run


@pytest.fixture
def content():
    """The bytes of all files of a folder, by name."""

    def run(folder):
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    return run


@pytest.fixture
def put():
    """Applies a filter."""

    def run(folder, name, **options):
        return curate(folder, make_filter(name, options))

    return run


@pytest.fixture
def captions(read):
    """The captions that a reader sees, by key."""

    def run(folder):
        return {key: json.loads(record)["captions"] for _, key, record in read(folder)[0]}

    return run
