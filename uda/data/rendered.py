"""A real domain shift that needs no download: digits drawn in fonts, and digits written by hand.

The source draws the figures 0 to 9 in the text fonts that matplotlib ships; the target is scikit-learn's
copy of the UCI handwritten digits (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998).
Both come as 8x8 counts of ink: UCI scaled a digit to a 32x32 bitmap and counted the set pixels of each 4x4
block. The rendering takes the same last steps, so that the shift is one of shape and not of the file format.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from uda.errors import UDAError, nearest

# Text fonts with ten lining figures. matplotlib's other files are symbol fonts (cmsy, cmex), have no digits
# (STIX size and non-Unicode fonts, DejaVu display fonts) or old-style figures of uneven height (cmmi).
FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
CLASSES = 10
_CANVAS = 96
_MESH = 4
_FONT_SIZE = 64
_BITMAP = 32
_BLOCK = 4
_BINARY = [255 * (v > 127) for v in range(256)]


def font_path(name: str) -> Path:
    """The file of one of :data:`FONTS` in the installed matplotlib."""
    import matplotlib

    if name not in FONTS:
        raise UDAError(f"There is no font {name!r} for rendered digits. {nearest(name, FONTS)}")
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise UDAError(
            f"The installed matplotlib has no {path}; reinstall matplotlib, or leave {name!r} out of fonts."
        )
    return path


@cache
def glyph(font: str, digit: int, stroke: int = 0) -> np.ndarray:
    """One figure, centred and unrotated: uint8 (96, 96), ink 255; ``stroke`` pixels thicker on each side."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (_CANVAS, _CANVAS))
    face = ImageFont.truetype(str(font_path(font)), _FONT_SIZE)
    middle = (_CANVAS // 2, _CANVAS // 2)
    ImageDraw.Draw(image).text(middle, str(digit), fill=255, font=face, anchor="mm", stroke_width=stroke)
    array = np.array(image)
    array.flags.writeable = False  # it is cached
    return array


def _count_blocks(image, aspect: float) -> np.ndarray:
    """Bounding box to full height, centred in 32x32, binarised, counted in 4x4 blocks: (8, 8) in [0, 1]."""
    from PIL import Image

    box = image.point(_BINARY).getbbox()
    left, top, right, bottom = box
    width = round(_BITMAP * (right - left) / (bottom - top) * aspect)
    width = min(max(width, _BLOCK), _BITMAP)
    scaled = image.crop(box).resize((width, _BITMAP), Image.Resampling.BOX)
    bitmap = np.zeros((_BITMAP, _BITMAP), dtype=np.float32)
    start = (_BITMAP - width) // 2
    bitmap[:, start : start + width] = np.asarray(scaled) > 127
    blocks = _BITMAP // _BLOCK
    return bitmap.reshape(blocks, _BLOCK, blocks, _BLOCK).mean(axis=(1, 3))


def _meshes(turns: np.ndarray, moves: np.ndarray) -> list[list[tuple[tuple[int, ...], list[float]]]]:
    """PIL's maps from output cells to input quadrilaterals, one an image.

    Args:
        turns: (n, 2, 2), about the canvas's middle.
        moves: (n, 5, 5, 2), of the corners.
    """
    side, ends = _CANVAS // _MESH, np.arange(_MESH + 1)
    corners = np.stack(np.meshgrid(ends, ends), axis=-1) * side  # [row, column] -> x, y
    middle = _CANVAS / 2
    places = (corners - middle) @ turns.transpose(0, 2, 1)[:, None] + middle + moves
    around = [places[:, :-1, :-1], places[:, 1:, :-1], places[:, 1:, 1:], places[:, :-1, 1:]]
    quads = np.concatenate(around, axis=-1).reshape(len(places), -1, 8).tolist()
    boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(_MESH) for c in range(_MESH)]
    return [list(zip(boxes, cells, strict=True)) for cells in quads]


def render_digits(
    n: int = 3000,
    seed: int = 0,
    *,
    fonts: tuple[str, ...] = FONTS,
    rotation: float = 15.0,
    shear: float = 0.25,
    stretch: float = 0.2,
    max_stroke: int = 2,
    wobble: float = 5.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Digits drawn in fonts, distorted at random, as 8x8 counts of ink.

    Args:
        n: number of images; classes take turns, so that their sizes differ by at most one.
        seed: the result is a function of all the arguments and no global random state.
        fonts: names from :data:`FONTS`.
        rotation: largest angle either way, in degrees.
        shear: largest horizontal shear either way, in widths per height.
        stretch: largest relative change of the width either way.
        max_stroke: strokes are thickened by 0 to this many pixels a side (of 64 to the em).
        wobble: standard deviation in pixels (of 64 to the em) by which the corners of a 4x4 mesh over the
            canvas move, each way on its own: hands do not draw straight. 0 leaves the font's shapes.

    Returns:
        ``x`` float32 (n, 1, 8, 8) in [0, 1] and ``y`` int64 (n,), in random order.

    Raises:
        UDAError: on an n below 1, no fonts, an unknown font or a distortion out of range.
    """
    if n < 1:
        raise UDAError(f"render_digits needs n >= 1, got n={n}.")
    if not fonts:
        raise UDAError("render_digits needs at least one font; leave fonts out to use them all.")
    if not (0 <= rotation <= 90 and 0 <= shear <= 1 and 0 <= stretch < 1 and max_stroke >= 0 and 0 <= wobble <= 8):
        raise UDAError(
            "render_digits needs rotation in [0, 90], shear in [0, 1], stretch in [0, 1), max_stroke >= 0, "
            f"wobble in [0, 8], got rotation={rotation}, shear={shear}, stretch={stretch}, max_stroke={max_stroke}, "
            f"wobble={wobble}."
        )
    x, y = _drawn(n, seed, tuple(fonts), rotation, shear, stretch, max_stroke, wobble)
    return x.copy(), y.copy()


@lru_cache(maxsize=2)  # a suite draws the same source for each of its runs
def _drawn(
    n: int,
    seed: int,
    fonts: tuple[str, ...],
    rotation: float,
    shear: float,
    stretch: float,
    max_stroke: int,
    wobble: float,
) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % CLASSES).astype(np.int64)
    which = rng.integers(len(fonts), size=n)
    strokes = rng.integers(max_stroke + 1, size=n)
    angles = np.deg2rad(rng.uniform(-rotation, rotation, size=n))
    shears = rng.uniform(-shear, shear, size=n)
    aspects = rng.uniform(1 - stretch, 1 + stretch, size=n)
    moves = rng.normal(scale=wobble, size=(n, _MESH + 1, _MESH + 1, 2))
    x = np.empty((n, 1, _BITMAP // _BLOCK, _BITMAP // _BLOCK), dtype=np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    shearing = np.stack([np.ones(n), shears, np.zeros(n), np.ones(n)], axis=1).reshape(n, 2, 2)
    turns = np.stack([cos, -sin, sin, cos], axis=1).reshape(n, 2, 2) @ shearing
    for i, mesh in enumerate(_meshes(turns, moves)):
        image = Image.fromarray(glyph(fonts[which[i]], int(y[i]), int(strokes[i]))).transform(
            (_CANVAS, _CANVAS), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR
        )
        x[i, 0] = _count_blocks(image, aspects[i])
    return x, y


def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: ``x`` float32 (1797, 1, 8, 8) in [0, 1], ``y`` int64 (1797,).

    The values are the files' counts of 0 to 16 set pixels divided by 16. The order is the files' own, in
    which one writer's digits follow each other: shuffle before splitting.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images / 16.0).astype(np.float32)[:, None]
    return x, data.target.astype(np.int64)
