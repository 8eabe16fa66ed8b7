"""Data with a known number of faults of every kind, from a seed: a published source, and shards.

Each faulty sample has one fault, and stands among good ones. What is only odd about a picture comes with the pixels
that it has to become, found without the code under test.
"""

import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from visplice.train.data.shards import write_manifest

# What is made, and the name it is counted under.
ODD = {
    "wrong extension": "wrong-extension",
    "CMYK": "cmyk",
    "16-bit": "16-bit",
    "palette with alpha": "alpha",
    "animated GIF": "animated",
    "EXIF rotation": "exif-rotation",
}
BAD_PICTURES = {
    "truncated JPEG": "damaged-image",
    "empty file": "empty-file",
    "50,000 x 50,000 bomb": "too-many-pixels",
}
IN_SHARDS = {
    **BAD_PICTURES,
    "missing member": "missing-image or missing-record",  # as chance has it
    "bad JSON": "bad-json",
    "wrong type": "wrong-type",
    "truncated tar": "truncated-tar",
    "duplicate key": "duplicate-key",
    "non-UTF-8": "not-utf8",
    "path traversal": "unsafe-name",
    **ODD,
}
IN_SOURCES = {
    **BAD_PICTURES,
    "missing file": "missing-image",
    "bad JSON": "bad-json",
    "wrong type": "wrong-type",
    "duplicate item": "duplicate-id",
    "non-UTF-8": "not-utf8",
    "path traversal": "unsafe-name",
    **ODD,
}


@dataclass
class Made:
    """What was written, and what has to come of it."""

    path: Path
    faults: Counter = field(default_factory=Counter)  # by the name they are counted under
    oddities: Counter = field(default_factory=Counter)
    good: dict = field(default_factory=dict)  # id to SHA-256 of the picture file and its upright RGB pixels
    odd: dict = field(default_factory=dict)  # the same, of odd ones

    @property
    def usable(self):
        return self.good | self.odd


def in_any_order(kinds, total, good, rng):
    """As many of each kind, `total` in all, among good ones, which are None."""
    names = list(kinds)
    mixed = [names[number % len(names)] for number in range(total)] + [None] * good
    rng.shuffle(mixed)
    return mixed


def _saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixels(rng):
    """Something like a photograph, 24 to 40 pixels a side."""
    random_state = np.random.default_rng(rng.getrandbits(64))
    coarse = Image.fromarray(random_state.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((rng.randint(24, 40), rng.randint(24, 40)), Image.Resampling.BICUBIC))
    return np.clip(smooth + random_state.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def _decoded(data):
    """Pixels of a plain file, by Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def good_picture(rng):
    """Suffix, file and pixels."""
    pixels = _pixels(rng)
    kind, suffix, options = rng.choice(
        [
            ("JPEG", "jpg", {"quality": 90}),
            ("JPEG", "jpg", {"progressive": True}),
            ("PNG", "png", {}),
            ("BMP", "bmp", {}),
        ]
    )
    data = _saved(Image.fromarray(pixels), kind, **options)
    return suffix, data, _decoded(data)


def odd_picture(kind, rng):
    """Suffix, file, and the upright RGB pixels that it stands for."""
    pixels = _pixels(rng)
    image = Image.fromarray(pixels)
    if kind == "wrong extension":
        suffix, data = rng.choice([("jpg", _saved(image, "PNG")), ("png", _saved(image, "BMP"))])
        return suffix, data, pixels
    if kind == "CMYK":
        data = _saved(image.convert("CMYK"), "JPEG", quality=95)
        return "jpg", data, _decoded(data)
    if kind == "16-bit":
        grey = pixels[..., 0]
        data = _saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
        return "png", data, np.stack([grey] * 3, axis=-1)
    if kind == "palette with alpha":
        flat = image.quantize(32)
        alpha = bytes(rng.choice((0, 96, 200, 255)) for _ in range(32))
        data = _saved(flat, "PNG", transparency=alpha)
        share = np.frombuffer(alpha, np.uint8)[np.asarray(flat)][..., None] / 255
        return "png", data, np.rint(np.asarray(flat.convert("RGB")) * share + 255 * (1 - share)).astype(np.uint8)
    if kind == "animated GIF":
        frames = [Image.fromarray(np.roll(pixels, shift, axis=0)).quantize(32) for shift in (0, 5, 11)]
        return (
            "gif",
            _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.asarray(frames[0].convert("RGB")),
        )
    assert kind == "EXIF rotation"
    exif = Image.Exif()
    exif[0x0112] = rng.randint(2, 8)
    data = _saved(image, "JPEG", quality=95, exif=exif)
    return "jpg", data, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def bad_picture(kind, rng):
    """Suffix and file of a picture that cannot be used."""
    if kind == "empty file":
        return rng.choice(("jpg", "png")), b""
    if kind == "truncated JPEG":
        data = _saved(Image.fromarray(_pixels(rng)), "JPEG", quality=95)
        start = data.index(b"\xff\xda") + 16  # behind the header of the only scan
        return "jpg", data[: rng.randrange(start, start + (len(data) - start) * 3 // 4)]
    assert kind == "50,000 x 50,000 bomb"
    side = 50_000
    which = rng.choice(("png", "gif", "bmp", "jpg"))
    if which == "png":

        def chunk(name, content):
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        return which, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    small = Image.fromarray(_pixels(rng))
    if which == "jpg":
        data = _saved(small, "JPEG")
        size = data.index(b"\xff\xc0") + 5
        return which, data[:size] + struct.pack(">HH", side, side) + data[size + 4 :]
    data = _saved(small, which.upper())
    at, form = (6, "<HH") if which == "gif" else (18, "<ii")
    data = data[:at] + struct.pack(form, side, side) + data[at + struct.calcsize(form) :]
    if which == "gif":  # the frame in it has a size of its own
        frame = data.index(b",", 13 + 3 * 256)
        data = data[: frame + 5] + struct.pack("<HH", side, side) + data[frame + 9 :]
    return which, data


def conversation(number):
    texts = {"human": "<image>\nWhat is in the picture?", "gpt": f"thing number {number}, größer als die anderen"}
    return [{"from": speaker, "value": text} for speaker, text in texts.items()]


def _json(record):
    return json.dumps(record, ensure_ascii=False).encode()


def bad_json(number, rng, *, line):
    """Text that is no JSON; in a file of lines there are no empty ones and no breaks."""
    whole = _json({"id": str(number), "conversations": conversation(number)})
    cut = whole.decode()[: rng.randrange(1, len(whole.decode()))].encode()  # not inside a letter
    forms = [cut, whole + b"}", whole.replace(b'"', b"'"), b"[" * 100_000]
    return rng.choice(forms if line else [*forms, b"", b"\0" * 40])


def wrong_type(number, rng):
    """A record, or an entry of LLaVA's file, with one field of another type."""
    turns = conversation(number)
    return rng.choice(
        [
            {"conversations": {"human": "What?", "gpt": "That."}},
            {"conversations": [turns[0], {"from": "gpt", "value": number}]},
            {"conversations": [turns[0]["value"], turns[1]["value"]]},
            {"conversations": [turns[0], ["gpt", "a thing"]]},
            {"conversations": "USER: What? ASSISTANT: That."},
        ]
    )


def not_utf8(number, rng):
    """A record whose bytes are no UTF-8, or whose text cannot be written in it."""
    whole = _json({"id": str(number), "conversations": conversation(number)})
    return rng.choice([whole.replace("ö".encode(), b"\xf6"), whole.replace("ß".encode(), b"\\ud83d")])


# --- shards ----------------------------------------------------------------------------------------------------------


def make_shards(folder, *, seed, faults=1000, good=560):
    """A data folder with a manifest from before the damage; each truncated tar costs the last sample of a shard."""
    rng = random.Random(seed)
    folder.mkdir()
    made = Made(folder)
    kinds = in_any_order(IN_SHARDS, faults, good, rng)
    made.faults["truncated-tar"] = num_shards = kinds.count("truncated tar")
    kinds = [kind for kind in kinds if kind != "truncated tar"]
    entries, number = [], 0
    for shard in range(num_shards):
        keys: list[str] = []  # of good samples
        name = f"shard-{shard:06d}.tar"
        share = _after_a_good_one(kinds[shard::num_shards], "duplicate key")
        with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
            for kind in share:
                _add_sample(tar, made, kind, f"{number:06d}", keys, rng)
                number += 1
            start = tar.offset
            _add_sample(tar, Made(folder), None, f"{number:06d}", keys, rng)
            number += 1
            end = tar.offset
        data = (folder / name).read_bytes()
        entry = {"name": name, "samples": len(share) + 1, "images": 0, "bytes": len(data)}
        entries.append(entry | {"sha256": hashlib.sha256(data).hexdigest()})
        # Past the first header, and short of the last byte of the last member: the padding is no part of the sample.
        (folder / name).write_bytes(data[: rng.randrange(start + 512, len(data[:end].rstrip(b"\0")))])
    write_manifest(folder, source={"kind": "faults"}, shards=entries)
    return made


def _after_a_good_one(kinds, repeating):
    """The same kinds; what repeats a good sample comes behind the first of those."""
    first = kinds.index(None)
    early = [kind for kind in kinds[:first] if kind == repeating]
    return [kind for kind in kinds[:first] if kind != repeating] + [None] + early + kinds[first + 1 :]


def _picture(made, kind, key, names, rng):
    """Suffix and file of a sample of this kind, which is counted."""
    if kind in BAD_PICTURES:
        suffix, data = bad_picture(kind, rng)
    else:
        suffix, data, pixels = odd_picture(kind, rng) if kind in ODD else good_picture(rng)
    if kind in ODD:
        made.oddities[ODD[kind]] += 1
        made.odd[key] = (hashlib.sha256(data).hexdigest(), pixels)
    elif kind is None:
        made.good[key] = (hashlib.sha256(data).hexdigest(), pixels)
    elif kind != "missing member":
        made.faults[names[kind]] += 1
    return suffix, data


def _add_sample(tar, made, kind, key, keys, rng):
    record = {"id": key, "conversations": conversation(int(key))}
    suffix, data = _picture(made, kind, key, IN_SHARDS, rng)
    names, text = (f"{key}.{suffix}", f"{key}.json"), None
    if kind is None:
        keys.append(key)
    elif kind == "bad JSON":
        text = bad_json(int(key), rng, line=False)
    elif kind == "wrong type":
        record = rng.choice(
            [wrong_type(int(key), rng), [record], {**record, "captions": "one"}, {**record, "images": 1}]
        )
    elif kind == "duplicate key":
        names = tuple(name.replace(key, keys[-1]) for name in names)
    elif kind == "non-UTF-8" and rng.random() < 0.5:
        text = not_utf8(int(key), rng)
    elif kind == "non-UTF-8":
        names = tuple(f"gr\udcf6\udcdfe-{name}" for name in names)
    elif kind == "path traversal":
        form = rng.choice(("../{}", "/tmp/{}", "a/../../{}", "..\\{}"))
        names = tuple(form.format(name) for name in names)
    if isinstance(record, dict):
        record = {"images": [suffix], **record}
    members = list(zip(names, (data, _json(record) if text is None else text), strict=True))
    if kind == "missing member":
        lost = rng.randrange(2)
        del members[lost]
        made.faults[("missing-image", "missing-record")[lost]] += 1
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


# --- a published source ----------------------------------------------------------------------------------------------


def make_source(folder, *, seed, faults=900, good=500):
    """LLaVA's file as lines of JSON, and the folder of its pictures `images` beside it."""
    rng = random.Random(seed)
    pictures = folder / "images"
    pictures.mkdir(parents=True)
    (folder / "secret.png").write_bytes(_saved(Image.new("RGB", (8, 8)), "PNG"))  # what `../secret.png` leads to
    made = Made(folder)
    kinds = in_any_order(IN_SOURCES, faults, good, rng)
    lines: list[bytes] = []
    for number, kind in enumerate(_after_a_good_one(kinds, "duplicate item")):
        lines.append(_line(made, kind, number, lines, pictures, rng))
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return made


def _line(made, kind, number, lines, pictures, rng):
    key = f"{number:06d}"
    suffix, data = _picture(made, kind, key, IN_SOURCES, rng)
    item = {"id": key, "conversations": conversation(number)}
    name = f"{rng.choice(('', 'coco/train/'))}{key}.{suffix}"
    if kind != "missing file":
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(data)
    item["image"] = name
    if kind == "bad JSON":
        return bad_json(number, rng, line=True)
    if kind == "wrong type":
        return _json(rng.choice([{**item, **wrong_type(number, rng)}, [item], {**item, "image": {"file": name}}]))
    if kind == "non-UTF-8":
        return not_utf8(number, rng)
    if kind == "path traversal":
        return _json({**item, "image": rng.choice(("../secret.png", str(pictures / name), "a/../../secret.png"))})
    if kind == "duplicate item":
        return lines[int(rng.choice(list(made.good)))]
    return _json(item)
