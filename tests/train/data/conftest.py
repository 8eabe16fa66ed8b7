"""Seven uneven shards of small pictures, and what makes rows of them."""

import io
from pathlib import Path

import pytest
from PIL import Image

from visplice.train.data.prepare import AlignPreparer
from visplice.train.data.record import Sample
from visplice.train.data.shards import write_manifest, write_shard
from visplice.vision.transform import Transform

SHARDS = (17, 3, 29, 1, 11, 8, 23)
CAPTIONS = ["a ring", "a red circle", "a blue star at the top"]


@pytest.fixture(scope="session")
def write_uneven():
    """Writes samples s000 to s091; the pictures of those in `bad` are none."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    picture = buffer.getvalue()

    def write(folder: Path, bad=()):
        folder.mkdir()
        keys, entries = iter(f"s{index:03d}" for index in range(sum(SHARDS))), []
        for number, count in enumerate(SHARDS):
            samples = []
            for _ in range(count):
                key = next(keys)
                data = b"no picture" if key in bad else picture
                samples.append(Sample(key=key, images=(("png", data),), record={"captions": CAPTIONS}))
            entries.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
        write_manifest(folder, source={}, shards=entries)
        return folder

    return write


@pytest.fixture(scope="session")
def uneven(write_uneven, tmp_path_factory):
    return write_uneven(tmp_path_factory.mktemp("uneven") / "good")


@pytest.fixture(scope="session")
def preparer(tokenizer):
    """That of stage 1, for pictures of 4 pixels."""
    transform = Transform(image_size=4, resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return AlignPreparer(transform=transform, tokenizer=tokenizer)
