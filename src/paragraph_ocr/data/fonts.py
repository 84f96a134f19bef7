"""Handwriting-like faces: the ones installed as packages, or a folder of the user's own."""

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from fontTools.ttLib import TTFont
from PIL import ImageFont

from paragraph_ocr.errors import UserError

SUFFIXES = (".ttf", ".otf", ".woff", ".woff2")

_LEAST_DRAWN_PX = 16
"""Of the sizes that FreeType draws letters at; each is twice the one before."""

_COMPARED = string.ascii_letters + string.digits
_COMPARED_PX, _SQUARE_PX = 60, 24
"""Height of a face whose letters are compared, and side of the square that each is brought to."""


@dataclass(frozen=True)
class Face:
    """One weight range of one font file, measured in em (the nominal size of the font)."""

    path: Path
    weights: tuple[float, float] | None = field(default=None, compare=False)
    """Ends of the variable weight axis; None when the file holds one weight."""

    @property
    def name(self) -> str:
        return self.path.stem

    def glyphs(self, size_px: int, weight: int | None = None) -> "Glyphs":
        """Return the face's letters at a size and a weight, kept for as long as they are in use."""
        return _glyphs(self.path, size_px, weight)

    def drawn_weight(self, generator: np.random.Generator) -> int | None:
        """Return one of the face's weights, in hundreds; None where it has no choice."""
        if self.weights is None:
            return None
        return round(generator.uniform(*self.weights) / 100) * 100

    @cached_property
    def height(self) -> float:
        """Ink from the top of `l` to the bottom of `p`, in em."""
        _, top, _, bottom = _open(self.path, 200, None).getbbox("dlgpy")
        return (bottom - top) / 200

    def width(self, text: str) -> float:
        """Return the advance width in em, without kerning."""
        return sum(map(self._advances.__getitem__, text), 0.0)

    @cached_property
    def _advances(self) -> "_Advances":
        return _Advances(_open(self.path, 100, None))


class Glyph(NamedTuple):
    """The ink of one letter, and where it stands to the pen on the baseline, in pixels."""

    ink: np.ndarray
    left: int
    top: int
    advance: float


Glyphs = Mapping[str, Glyph]
"""Letters of one face at one size, each made when first wanted."""


class _Drawn(dict[str, Glyph]):
    """Letters of one face at one size, each drawn by FreeType when first wanted.

    Putting down letters kept as arrays is five times as fast as drawing every word anew.
    """

    def __init__(self, font: ImageFont.FreeTypeFont) -> None:
        super().__init__()
        self._font = font

    def __missing__(self, character: str) -> Glyph:
        mask, (left, top) = self._font.getmask2(character, mode="L", anchor="ls")
        width, height = mask.size
        ink = np.zeros((max(1, height), max(1, width)), np.uint8)
        if width and height:
            ink[:] = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
        glyph = Glyph(ink, left, top, self._font.getlength(character))
        self[character] = glyph
        return glyph


class _Shrunk(dict[str, Glyph]):
    """Letters of one face at one size, each made from a larger one of at most twice its size.

    That is a quarter of the work of drawing it, and a size that few words have costs no letters of its own.
    """

    def __init__(self, larger: Glyphs, scale: float) -> None:
        super().__init__()
        self._larger, self._scale = larger, scale

    def __missing__(self, character: str) -> Glyph:
        ink, left, top, advance = self._larger[character]
        scale, (height, width) = self._scale, ink.shape
        begin = math.floor(scale * left), math.floor(scale * top)
        end = math.ceil(scale * (left + width)), math.ceil(scale * (top + height))
        # of the middles of pixels, which are half a pixel from their corners
        shift = [
            scale * (old + 0.5) - 0.5 - new for old, new in zip((left, top), begin, strict=True)
        ]
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        size = (end[0] - begin[0], end[1] - begin[1])
        glyph = Glyph(
            cv2.warpAffine(ink, matrix, size, flags=cv2.INTER_LINEAR), *begin, scale * advance
        )
        self[character] = glyph
        return glyph


class _Advances(dict[str, float]):
    """Advance widths in em, measured when first wanted."""

    def __init__(self, font: ImageFont.FreeTypeFont) -> None:
        super().__init__()
        self._font = font

    def __missing__(self, character: str) -> float:
        self[character] = self._font.getlength(character) / self._font.size
        return self[character]


def drawn_size(size_px: int) -> int:
    """Return the size, one of few, at which FreeType draws the letters that are shrunk to this size."""
    return max(_LEAST_DRAWN_PX, 2 ** math.ceil(math.log2(size_px)))


def find_faces(folder: Path | None) -> list[Path]:
    """Return font files in order of name: the folder's, or (None) those of the installed packages.

    Raises:
        UserError: there are none.
    """
    if folder is None:
        found = _installed()
        remedy = "Type `pip install fontpkg-kalam fontpkg-caveat font-intuitive`, or pass"
    else:
        found = [path for path in folder.glob("**/*") if path.suffix.lower() in SUFFIXES]
        remedy = "Pass"
    if not found:
        raise UserError(
            f"datamodule.fonts={'null' if folder is None else folder} gives no font files "
            f"({', '.join(SUFFIXES)}). {remedy} datamodule.fonts=<folder>."
        )
    return sorted(found, key=lambda path: (path.name, str(path)))


def load_faces(folder: Path | None, *, characters: str) -> tuple[list[Face], list[str]]:
    """Return the faces that draw every one of the characters, and what the other files lack.

    Raises:
        UserError: none is left.
    """
    faces, left_out = [], []
    for path in find_faces(folder):
        lacking, weights = _examine(path, characters)
        if lacking:
            left_out.append(f"{path.name} ({lacking})")
        else:
            faces.append(Face(path, weights))
    if not faces:
        raise UserError(
            f"datamodule.fonts={'null' if folder is None else folder} has no face that draws every "
            f"character of the vocabulary: {'; '.join(left_out[:5])}. Pass a folder of other fonts, "
            "or fewer vocabulary.characters."
        )
    return faces, left_out


def likeness(faces: Sequence[Face]) -> np.ndarray:
    """Return how alike each two faces are, (n, n): 1 is the same shapes, -1 on the diagonal.

    The mean correlation of their letters and figures, each stretched to one square and blurred.
    """
    descriptions = np.stack([_description(face) for face in faces])
    alike = np.einsum("ald,bld->ab", descriptions, descriptions) / len(_COMPARED)
    np.fill_diagonal(alike, -1)
    return alike


def _description(face: Face) -> np.ndarray:
    glyphs = face.glyphs(round(_COMPARED_PX / face.height))
    rows = []
    for character in _COMPARED:
        square = cv2.resize(
            glyphs[character].ink, (_SQUARE_PX, _SQUARE_PX), interpolation=cv2.INTER_AREA
        )
        blurred = cv2.GaussianBlur(square.astype(np.float32), (0, 0), _SQUARE_PX / 16).ravel()
        blurred -= blurred.mean()
        rows.append(blurred / max(1e-6, float(np.linalg.norm(blurred))))
    return np.stack(rows)


def digest_fonts(paths: Sequence[Path]) -> str:
    """Return what tells one set of font files from another: their names and bytes."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _installed() -> list[Path]:
    found = []
    if find_spec("fontpkg"):
        import fontpkg

        found += [
            file.path
            for family in fontpkg.families().values()
            for file in family.files
            if file.style == "normal"
        ]
    if (intuitive := find_spec("font_intuitive")) and intuitive.submodule_search_locations:
        found += Path(intuitive.submodule_search_locations[0]).glob("files/*.ttf")
    return [Path(path) for path in found]


def _examine(path: Path, characters: str) -> tuple[str, tuple[float, float] | None]:
    """Return what the file lacks ('' for nothing), and its weight axis."""
    visible = sorted({*characters} - {" ", "\n"})
    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            known = font.getBestCmap() or {}
            axes = font["fvar"].axes if "fvar" in font else []
            weights = next(((a.minValue, a.maxValue) for a in axes if a.axisTag == "wght"), None)
        font_at_40 = _open(path, 40, None)
        blank = [c for c in visible if ord(c) in known and not _draws(font_at_40, c)]
    except Exception as error:  # parsers of tables raise whatever a broken file leads them to
        return f"unreadable: {error}".splitlines()[0][:200], None
    return "".join(c for c in visible if ord(c) not in known or c in blank), weights


def _draws(font: ImageFont.FreeTypeFont, character: str) -> bool:
    left, top, right, bottom = font.getbbox(character)
    return right > left and bottom > top


@lru_cache(maxsize=4096)  # some 50 faces x 40 sizes, 50 kB each
def _glyphs(path: Path, size_px: int, weight: int | None) -> Glyphs:
    drawn_px = drawn_size(size_px)
    if size_px == drawn_px:
        return _Drawn(_open(path, size_px, weight))
    return _Shrunk(_glyphs(path, drawn_px, weight), size_px / drawn_px)


def _open(path: Path, size_px: int, weight: int | None) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)
    if weight is not None:
        axes = font.get_variation_axes()
        font.set_variation_by_axes(
            [weight if a["name"] in (b"Weight", "Weight") else a["default"] or 0 for a in axes]
        )
    return font
