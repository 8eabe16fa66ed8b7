"""The other embedded task: slips, small printed receipts and labels, and their pictures.

A slip is lines of signs in cells of one width, as till and label printers set them, in one of five fonts and two sizes,
anywhere in the picture. Words are made of syllables and numbers drawn; a hash of each decides whether it belongs to
training or to testing, so that no word and no number of a test slip ever occurs in training.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visplice.train.scenes import IMAGE_SIZE, TEST, TRAIN

SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:/-"
FONTS = {  # of packages that are installed anyway: matplotlib ships DejaVu, and Pillow Aileron
    "sans mono": "DejaVuSansMono.ttf",
    "sans mono bold": "DejaVuSansMono-Bold.ttf",
    "sans": "DejaVuSans.ttf",
    "serif": "DejaVuSerif.ttf",
    "aileron": None,
}


@dataclass(frozen=True, kw_only=True)
class Print:
    """How large a slip is printed, in pixels."""

    advance: float  # from one cell to the next
    height: float  # of the font
    pitch: tuple[float, float]  # least and greatest distance of two lines
    most_cells: int  # in a line
    most_lines: int


# At most two cells have their centre in one patch of 14 pixels, and at most one line.
SIZES = {
    "small": Print(advance=7, height=11.5, pitch=(14, 16), most_cells=15, most_lines=7),
    "large": Print(advance=28 / 3, height=14.5, pitch=(15, 18), most_cells=11, most_lines=6),
}
PATCH = 14
_CLEAR = 0.75  # pixels that every centre keeps from the edge of a patch, so that it is plain which one it lies in

RECEIPT, LABEL = "receipt", "label"
MONEY, DATE, TIME, CODE, WEIGHT, WORD = "money", "date", "time", "code", "weight", "word"
# What stands in front of a value, and of which kind the value is. No two begin with the same two letters.
KEYS: dict[str, str] = {
    "TOTAL": MONEY,
    "TAX": MONEY,
    "PAID": MONEY,
    "DATE": DATE,
    "TIME": TIME,
    "NO": CODE,
    "NAME": WORD,
    "BATCH": CODE,
    "LOT": CODE,
    "WEIGHT": WEIGHT,
    "BEST": DATE,
    "PRICE": MONEY,
    "CODE": CODE,
}
ABOVE_ITEMS, BELOW_ITEMS = ("DATE", "TIME", "NO"), ("TAX", "TOTAL", "PAID")
ON_LABELS = ("BATCH", "LOT", "WEIGHT", "BEST", "PRICE", "CODE")
SHOP, ITEM = "shop", "item"  # roles of lines without a key: the name on top, and a thing with its price

_ONSETS = ("B", "C", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z", "BR", "ST", "TR")
_VOWELS = ("A", "E", "I", "O", "U", "Y")
_ENDS = ("", "", "", "L", "M", "N", "R", "S", "T", "X")
_CODE_LETTERS = "ABCDEFGHKLMNPQRTUVWXY"


@dataclass(frozen=True)
class Line:
    """A printed line: what it is, its name (a key, or the thing that it prices), its value, and how it is set."""

    role: str  # a key of KEYS, SHOP or ITEM
    name: str  # as printed; empty for SHOP
    value: str
    text: str  # the whole line, with blanks; no longer than the slip is wide
    start: int  # cell in which the value begins


@dataclass(frozen=True)
class Slip:
    """Lines, and where they are printed; `x` and `ys` are pixels, the centres of cell 0 and of every line."""

    kind: str
    font: str
    size: str
    lines: tuple[Line, ...]
    x: float
    ys: tuple[float, ...]

    def centre(self, cell: int) -> float:
        """Where the centre of a cell lies, in pixels from the left."""
        return self.x + cell * SIZES[self.size].advance


def is_held_out(text: str) -> bool:
    """Whether a word or number belongs to the test slips: one in five, by the hash of its letters and digits."""
    signs = "".join(sign for sign in text if sign.isalnum())
    return hashlib.sha256(signs.encode()).digest()[0] % 5 == 0


def sample_slip(rng: random.Random, split: str, *, most_lines: int = 7) -> Slip:
    """A slip of `split`: of a test slip every word and number is held out, of a training slip none."""
    if split not in (TRAIN, TEST):
        raise ValueError(f"split is {split!r}; it is {TRAIN!r} or {TEST!r}")
    size = rng.choice(list(SIZES))
    kind = rng.choice((RECEIPT, LABEL))
    plan = SIZES[size]
    roles = _roles(rng, kind, min(plan.most_lines, most_lines))
    colon = ":" if rng.random() < 0.4 else ""
    # Names and values first: how wide the slip is follows from them.
    parts: list[tuple[str, str, str]] = []
    initials: set[str] = set()
    for role in roles:
        while True:
            name = "" if role == SHOP else _word(rng, split, 3, plan.most_cells - 5) if role == ITEM else role
            if role != ITEM or name[0] not in initials:
                break
        initials |= {name[0]} if role == ITEM else set()
        printed = name + colon if role in KEYS and len(name) + 6 < plan.most_cells else name
        room = min(10, plan.most_cells - len(printed) - 1) if printed else min(8, plan.most_cells)
        kind_of_value = WORD if role == SHOP else MONEY if role == ITEM else KEYS[role]
        parts.append((role, printed, _value(rng, split, kind_of_value, room)))
    least = max(len(printed) + len(value) + bool(printed) for _, printed, value in parts)
    width = rng.randint(least, plan.most_cells)
    right = rng.random() < (0.7 if kind == RECEIPT else 0.3)  # values set flush right
    lines = []
    for role, printed, value in parts:
        if role == SHOP:
            start = (width - len(value)) // 2 if right else 0
        else:
            start = width - len(value) if right else len(printed) + 1
        text = printed.ljust(start) + value
        lines.append(Line(role, printed.removesuffix(colon) if colon else printed, value, text, start))
    x, ys = _place(rng, plan, width, len(lines))
    return Slip(kind, rng.choice(list(FONTS)), size, tuple(lines), x, ys)


def _roles(rng: random.Random, kind: str, most: int) -> list[str]:
    """The lines of a slip in their order."""
    if kind == LABEL:
        others = rng.sample(ON_LABELS, rng.randint(min(2, most - 1), min(len(ON_LABELS), most - 1)))
        return ["NAME", *others]
    items = rng.randint(1, min(3, most - 2))
    left = most - 2 - items
    above = rng.sample(ABOVE_ITEMS, min(left, rng.randint(0, 3)))
    below = {"TOTAL", *rng.sample(("TAX", "PAID"), min(left - len(above), rng.randint(0, 2)))}
    return [SHOP, *above, *[ITEM] * items, *(key for key in BELOW_ITEMS if key in below)]


def _word(rng: random.Random, split: str, least: int, most: int) -> str:
    """A word of syllables; none begins as a key does, which would leave open what a line is."""
    starts = {key[:2] for key in KEYS}
    while True:
        syllables = rng.choice((2, 2, 3)) if most > 5 else 2
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)
        if least <= len(word) <= min(8, most) and word[:2] not in starts and is_held_out(word) == (split == TEST):
            return word


def _value(rng: random.Random, split: str, kind: str, room: int) -> str:
    """Something of a kind to print in `room` cells."""
    if kind == WORD:
        return _word(rng, split, 4, room)
    digits = partial(rng.randrange, 10)
    while True:
        if kind == MONEY:
            whole = rng.choices((1, 2, 3), weights=(3, 5, 1))[0]
            value = f"{rng.randrange(10 ** (whole - 1), 10**whole)}.{rng.randrange(100):02d}"
        elif kind == DATE:
            value = f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}"
            value += f"/{rng.randint(10, 99)}" if room >= 8 else ""
        elif kind == TIME:
            value = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        elif kind == WEIGHT:
            value = f"{rng.randrange(10, 1000)}G" if rng.random() < 0.5 else f"{digits()}.{digits()}{digits()}KG"
        else:
            value = "".join(rng.choice(_CODE_LETTERS) for _ in range(rng.choice((0, 1, 1, 2))))
            value += "-" if value and rng.random() < 0.3 and room > 5 else ""
            value += "".join(str(digits()) for _ in range(rng.randint(3, 5)))
        if len(value) <= room and is_held_out(value) == (split == TEST):
            return value


def _place(rng: random.Random, plan: Print, width: int, count: int) -> tuple[float, tuple[float, ...]]:
    """Where the slip is printed: quarters of a pixel, every centre clear of the edges of the patches."""

    def clear(centre: float) -> bool:
        return min(centre % PATCH, -centre % PATCH) >= _CLEAR

    def quarter(low: float, high: float) -> float:
        return rng.randint(round(4 * low), round(4 * high)) / 4

    edge = plan.advance / 2 + 0.5
    while True:
        x = quarter(edge, IMAGE_SIZE - edge - (width - 1) * plan.advance)
        if all(clear(x + cell * plan.advance) for cell in range(width)):
            break
    half = plan.height / 2
    while True:
        most = (IMAGE_SIZE - 2 * half) / max(1, count - 1)
        pitch = quarter(plan.pitch[0], max(plan.pitch[0], min(plan.pitch[1], most)))
        below = IMAGE_SIZE - half - (count - 1) * pitch
        y = quarter(half, max(half, below))
        ys = tuple(y + line * pitch for line in range(count))
        if all(clear(centre) for centre in ys):
            return x, ys


# --- what lies where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A slip as the patches of its picture hold it, row by row; each list is `[P]`, 0 where there is nothing."""

    left: list[int]  # sign in the first cell with its centre in the patch, 1 + its index in SIGNS
    right: list[int]  # in the second
    cell: list[int]  # 1 + which cell of the line the first one is
    line: list[int]  # 1 + which line it is


def patch_of(slip: Slip, line: int, cell: int) -> int:
    """The patch in which the centre of a cell lies, counted row by row."""
    return int(slip.ys[line] // PATCH) * (IMAGE_SIZE // PATCH) + int(slip.centre(cell) // PATCH)


def grid_of(slip: Slip) -> Grid:
    """Which cells of which line have their centre in every patch."""
    grid = Grid(*([0] * (IMAGE_SIZE // PATCH) ** 2 for _ in range(4)))
    for number, line in enumerate(slip.lines):
        for cell, sign in enumerate(line.text):
            patch = patch_of(slip, number, cell)
            slot = grid.right if grid.cell[patch] else grid.left
            if not grid.cell[patch]:
                grid.cell[patch], grid.line[patch] = cell + 1, number + 1
            slot[patch] = SIGNS.index(sign) + 1 if sign != " " else 0
    return grid


# --- picture ---------------------------------------------------------------------------------------------------------

_SCALE = 4  # glyphs are drawn so much larger, and stand at quarters of a pixel


@cache
def _glyph(font: str, size: str, sign: str) -> np.ndarray:
    """How much ink a sign leaves, 0 to 255, in a box as high as the font, centred across; narrowed to fit its cell."""
    plan, file = SIZES[size], FONTS[font]
    height = round(plan.height * _SCALE)
    face: ImageFont.FreeTypeFont | ImageFont.ImageFont
    if file is None:
        face = ImageFont.load_default(height)
    else:
        import matplotlib

        face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / file), height)
    box = Image.new("L", (3 * height, 2 * height))
    ImageDraw.Draw(box).text((height, 1.5 * height), sign, fill=255, font=face, anchor="ls")
    left, _, right, _ = box.getbbox() or (0, 0, 1, 1)
    # Capitals, about 0.73 of the font high, have their middle in the middle of the box.
    rows = round(1.5 * height - 0.365 * height) - height // 2
    cut = box.crop((left, rows, right, rows + height))
    widest = round(0.94 * plan.advance * _SCALE)
    if cut.width > widest:
        cut = cut.resize((widest, height), Image.Resampling.BOX)
    return np.asarray(cut)


def render(slip: Slip, rng: random.Random) -> Image.Image:
    """The picture of a slip, RGB, `IMAGE_SIZE` square: paper on a table; `rng` varies colours, ink and grain."""
    side = IMAGE_SIZE * _SCALE
    ink = np.zeros((side, side), np.uint8)
    for line, y in zip(slip.lines, slip.ys, strict=True):
        for cell, sign in enumerate(line.text):
            if sign == " ":
                continue
            glyph = _glyph(slip.font, slip.size, sign)
            height, width = glyph.shape
            top = round(y * _SCALE - height / 2)
            left = round(slip.centre(cell) * _SCALE - width / 2)
            low, high = max(0, top), min(side, top + height)
            part = ink[low:high, left : left + width]
            np.maximum(part, glyph[low - top : high - top, : part.shape[1]], out=part)
    share = np.asarray(Image.fromarray(ink).reduce(_SCALE), np.float32)[..., None] / 255
    plan = SIZES[slip.size]
    cells = max(len(line.text) for line in slip.lines)
    margin = rng.uniform(2.0, 8.0)
    left_edge = slip.x - plan.advance / 2 - margin
    right_edge = slip.centre(cells - 1) + plan.advance / 2 + margin
    top_edge, low_edge = slip.ys[0] - plan.height / 2 - margin, slip.ys[-1] + plan.height / 2 + margin
    table = np.array([rng.uniform(30, 235) for _ in range(3)], np.float32)
    bright = rng.uniform(205, 250)
    paper = np.array([bright + rng.uniform(-14, 5) for _ in range(3)], np.float32)
    dark = rng.uniform(5, 90)
    stroke = np.array([dark + rng.uniform(-5, 25) for _ in range(3)], np.float32)
    picture = np.broadcast_to(table, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    rows = slice(max(0, round(top_edge)), max(0, round(low_edge)))
    picture[rows, max(0, round(left_edge)) : max(0, round(right_edge))] = paper
    picture += share * (stroke - picture)
    picture += np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, (IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int8)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
