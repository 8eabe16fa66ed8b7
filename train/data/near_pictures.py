"""Pictures that are nearly the same: saved again, resized, a little cropped, brighter or darker.

A perceptual hash of 64 bits finds candidates among millions, but takes simple pictures, forms and pages of text for
each other. So each is confirmed by two more: the finer waves of its brightness, in which pages of one layout differ,
and 12 x 12 colours, which tell a red ball from a blue one in its place. Brightness and contrast are taken out of both.

Candidates come from multi-index hashing (Norouzi, Punjani, Fleet, 2012): of hashes at most `max_distance` bits apart,
one of five bands differs in a fifth of those at most, so only hashes that nearly agree in a band are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_DISTANCE = 8  # bits of 64: 98 % of photographs cropped by 2 % a side stay within, other photographs are 18 apart
LIMIT = 14  # bits; three of a band, above which the search would compare nearly everything

_SIDE = 12  # of the thumbnail, pixels
_WAVES = 12  # of the cosine transform, each way; without the first 4 x 4, which the thumbnail has
_DETAIL = _WAVES**2 - 4**2
_HASH = 8  # bytes of the perceptual hash
_BYTES = _HASH + _DETAIL + _SIDE * _SIDE * 3
_STEP = 1 / 16  # of a wave, in units of their mean
# Half of the mean difference of waves in those units: 0 of the same, 0.7 of any two photographs. Saving again and
# resizing stay below 0.06, cropping by 2 % a side below 0.21; pages of one layout differ by 0.22 or more.
_DETAIL_DIFFERENCE = 0.2
# Differences of thumbnails in units of their own spread. Saving again and
# resizing stay below 0.14 and 0.9; a shape of another colour in its place is 1.4 or more in one value.
_MEAN_DIFFERENCE, _LARGEST_DIFFERENCE = 0.2, 1.25
_LEAST_SPREAD = 4.0  # levels of 255; a flatter picture has nothing to be told by, and is near to none
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and width
_BLOCK = 1 << 20  # pairs compared at a time: 8 MB
_CROWD = 32  # pictures with one perceptual hash, from where their groups are found first, without all their pairs

PictureHash = bytes
"""What a picture is compared by: 568 bytes, the same wherever Pillow and scipy are the same."""


def picture_hash(image: Image.Image) -> PictureHash:
    """The hash of an upright RGB picture, as `open_image` gives it.

    Raises:
        ValueError: imagehash is not installed.
    """
    try:
        import imagehash
        from scipy.fft import dctn  # which imagehash needs
    except ImportError:
        raise ValueError("near-same pictures need the package imagehash: pip install 'visplice[data]'") from None
    # Once to a small picture, which costs most, then all from that one.
    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=2.0)
    bits = np.packbits(imagehash.phash(small).hash.reshape(-1))
    waves = dctn(np.asarray(small.convert("L"), np.float32), norm="ortho")[:_WAVES, :_WAVES]
    detail = np.concatenate([waves[:4, 4:].ravel(), waves[4:].ravel()])
    steps = detail / max(float(np.abs(detail).mean()) * _STEP, 1e-6)
    thumbnail = np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    return bits.tobytes() + np.rint(steps).clip(-127, 127).astype(np.int8).tobytes() + thumbnail.tobytes()


def near_groups(hashes: Sequence[PictureHash], *, max_distance: int = MAX_DISTANCE) -> list[list[int]]:
    """Groups of near-same pictures, by index, each of two or more and rising; the first is the one to keep.

    Every member is near the first, or near one that is and has its perceptual hash: chains of small changes do not join
    what differs much. No index is in two groups. Pictures of one colour are in none.

    Args:
        max_distance: bits in which perceptual hashes may differ, 0 to 14; odd distances hardly occur.
    Raises:
        ValueError: max_distance is out of range.
    """
    kinds: dict[PictureHash, int] = {}  # the same hash and thumbnail many times over would give the square of it
    kind = [kinds.setdefault(item, len(kinds)) for item in hashes]
    pictures = _Pictures(list(kinds))
    leader = np.arange(len(kinds))
    _lead_crowds(pictures, leader)
    leading = np.flatnonzero(leader == np.arange(len(kinds)))
    found = [np.sort(pairs, axis=1) for pairs in _near(pictures, leading, pictures, leading, max_distance)]
    if found:
        for low, high in np.unique(np.concatenate(found), axis=0).tolist():
            if leader[low] == low and leader[high] == high:  # `low` rises, so whether it leads is settled
                leader[high] = low
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(kind):
        if pictures.usable[item]:
            groups.setdefault(int(leader[leader[item]]), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def near_matches(
    hashes: Sequence[PictureHash], others: Sequence[PictureHash], *, max_distance: int = MAX_DISTANCE
) -> list[tuple[int, int]]:
    """Every pair of a picture of `hashes` and a near-same one of `others`, by index, rising.

    Raises:
        ValueError: max_distance is out of range.
    """
    ours, theirs = _Pictures(hashes), _Pictures(others)
    found = _near(ours, np.arange(len(hashes)), theirs, np.arange(len(others)), max_distance)
    return sorted((own, other) for pairs in found for own, other in pairs.tolist())


class _Pictures:
    """Hashes as arrays over N pictures."""

    def __init__(self, hashes: Sequence[PictureHash]) -> None:
        rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _BYTES)
        self.bits = np.ascontiguousarray(rows[:, :_HASH]).view(np.uint64).reshape(-1)  # [N]
        self._detail = rows[:, _HASH : _HASH + _DETAIL].view(np.int8)
        self._thumbnails = rows[:, _HASH + _DETAIL :]
        self._spread = np.concatenate(
            [self._centred(slice(at, at + 4096)).std(axis=1) for at in range(0, len(rows), 4096)] or [np.zeros(0)]
        )
        self.usable = self._spread >= _LEAST_SPREAD

    def _centred(self, indices: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        levels = self._thumbnails[indices].reshape(-1, _SIDE * _SIDE, 3).astype(np.float32)
        return (levels - levels.mean(axis=1, keepdims=True)).reshape(len(levels), -1)

    def detail(self, indices: NDArray[np.int64]) -> NDArray[np.int16]:
        """Finer waves `[K, 128]`, in whole steps."""
        return self._detail[indices].astype(np.int16)

    def standard(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Thumbnails `[K, 432]` with mean 0 in each colour, and spread 1."""
        return self._centred(indices) / self._spread[indices, None]


def _alike(own: _Pictures, other: _Pictures, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs `[K, 2]` of candidates show the same, whatever brightness and contrast."""
    alike = np.zeros(len(pairs), bool)
    for at in range(0, len(pairs), 8192):
        part = pairs[at : at + 8192]
        steps = np.abs(own.detail(part[:, 0]) - other.detail(part[:, 1])).mean(axis=1, dtype=np.float32)
        likely = np.flatnonzero(steps * (_STEP / 2) < _DETAIL_DIFFERENCE)
        for start in range(0, len(likely), 256):  # what fits the processor's cache
            chosen = likely[start : start + 256]
            difference = np.abs(own.standard(part[chosen, 0]) - other.standard(part[chosen, 1]))
            close = (difference.mean(axis=1) < _MEAN_DIFFERENCE) & (difference.max(axis=1) < _LARGEST_DIFFERENCE)
            alike[at + chosen] = close
    return alike


def _lead_crowds(pictures: _Pictures, leader: NDArray[np.int64]) -> None:
    """Gives pictures that share a perceptual hash with many others a leader among them, where one is near.

    Ten thousand copies of a "picture not found" page would be fifty million pairs; their leader is compared with each
    of them once.
    """
    order = np.argsort(pictures.bits, kind="stable")
    order = order[pictures.usable[order]]
    ends = np.flatnonzero(np.diff(pictures.bits[order])) + 1
    for crowd in np.split(order, ends):
        if len(crowd) <= _CROWD:
            continue
        while len(crowd) > 1:
            first, rest = crowd[0], crowd[1:]
            pairs = np.stack([np.full_like(rest, first), rest], axis=1)
            alike = _alike(pictures, pictures, pairs)
            leader[rest[alike]] = first
            crowd = rest[~alike]


def _near(
    own: _Pictures, own_indices: NDArray[np.int64], other: _Pictures, other_indices: NDArray[np.int64], distance: int
) -> Iterator[NDArray[np.int64]]:
    """Near pairs `[K, 2]`, each once; within one collection also in the order of its indices."""
    if not 0 <= distance <= LIMIT:
        raise ValueError(f"max_distance is {distance} bits; it is 0 to {LIMIT}")
    within = own is other
    own_indices = own_indices[own.usable[own_indices]]
    other_indices = other_indices[other.usable[other_indices]]
    flips = distance // len(_BANDS)
    for band in range(len(_BANDS)):
        left_buckets = _Buckets(own, own_indices, band)
        right_buckets = left_buckets if within else _Buckets(other, other_indices, band)
        masks = _masks(_BANDS[band][1], flips)
        for value in left_buckets.values():
            left, right = left_buckets.members(value), right_buckets.around(value, masks)
            for rows, columns in _close(own.bits[left], other.bits[right], band, flips, distance):
                pairs = np.stack([left[rows], right[columns]], axis=1)
                if within:
                    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
                pairs = pairs[_alike(own, other, pairs)]
                if len(pairs):
                    yield pairs


class _Buckets:
    """Indices of pictures by the value of one band of their hashes."""

    def __init__(self, pictures: _Pictures, indices: NDArray[np.int64], band: int) -> None:
        first_bit, width = _BANDS[band]
        values = (pictures.bits[indices] >> np.uint64(first_bit)).astype(np.int64) & ((1 << width) - 1)
        order = np.argsort(values, kind="stable")
        self._sorted = indices[order]
        self._starts = np.searchsorted(values[order], np.arange((1 << width) + 1))

    def values(self) -> list[int]:
        return np.flatnonzero(np.diff(self._starts)).tolist()

    def members(self, value: int) -> NDArray[np.int64]:
        return self._sorted[self._starts[value] : self._starts[value + 1]]

    def around(self, value: int, masks: list[int]) -> NDArray[np.int64]:
        """Members of the bucket and of those that differ from it by a mask."""
        return np.concatenate([self.members(value ^ mask) for mask in masks])


def _masks(width: int, flips: int) -> list[int]:
    """Bit masks of a band with at most `flips` bits set."""
    return [sum(1 << bit for bit in bits) for count in range(flips + 1) for bits in combinations(range(width), count)]


def _close(
    left: NDArray[np.uint64], right: NDArray[np.uint64], band: int, flips: int, distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows and columns of hashes at most `distance` bits apart that no earlier band has brought together."""
    step = max(1, _BLOCK // max(1, len(right)))
    for at in range(0, len(left), step):
        unlike = left[at : at + step, None] ^ right[None]
        rows, columns = np.nonzero(np.bitwise_count(unlike) <= distance)
        unlike = unlike[rows, columns]
        new = np.ones(len(rows), bool)
        for first_bit, width in _BANDS[:band]:
            new &= np.bitwise_count(unlike & np.uint64(((1 << width) - 1) << first_bit)) > flips
        yield rows[new] + at, columns[new]
