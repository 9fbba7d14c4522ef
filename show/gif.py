"""A recording as an animated GIF, for places that play no SVG. Needs Pillow: `pip install "dgemma[gif]"`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from ..core.errors import DgemmaError, shown
from .picture import BACKGROUND, BARS, COLOURS, END, INK, SHADE, Colour, Row, Run, Shot, characters, clusters, mixed

if TYPE_CHECKING:
    from PIL import Image

WIDTH, HEIGHT, MARGIN, SIZE = 10, 22, 16, 16
"""Pixels of a cell, of the edge, and of the font."""
LEVELS = 8
"""Shades between a colour and what it stands on, for smooth edges."""
SHORTEST = 0.02
"""Seconds of a frame; viewers slow down what is shorter."""
FAMILIES = (
    ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf"),
    ("Menlo.ttc", "Menlo.ttc", "Menlo.ttc"),
    ("consola.ttf", "consolab.ttf", "consolai.ttf"),
    ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf", "LiberationMono-Italic.ttf"),
    ("NotoSansMono-Regular.ttf", "NotoSansMono-Bold.ttf", "NotoSansMono-Regular.ttf"),
    ("UbuntuMono-R.ttf", "UbuntuMono-B.ttf", "UbuntuMono-RI.ttf"),
    ("cour.ttf", "courbd.ttf", "couri.ttf"),
)
"""Fonts of terminals, by the names under which systems have them: regular, bold, italic."""


def draw(shots: Sequence[Shot], *, columns: int, font: Path | None = None) -> bytes:
    """Return the picture.

    Args:
        columns: cells that its width holds.
        font: a file to take instead of the first of `FAMILIES` that is installed here; without any, Pillow's own.

    Raises:
        DgemmaError: Pillow is not installed, or cannot read the font.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DgemmaError('a GIF needs Pillow, which is not installed: pip install "dgemma[gif]"') from None
    tall = max((len(shot.rows) for shot in shots), default=1)
    size = (columns * WIDTH + 2 * MARGIN, tall * HEIGHT + 2 * MARGIN)
    palette = Image.new("P", (1, 1))
    colours = [part for colour in _colours() for part in colour]
    palette.putpalette(colours)
    pen = _Pen(_fonts(font), size[0] - 2 * MARGIN, palette)

    def frame(shot: Shot) -> Image.Image:
        found = Image.new("P", size, 0)  # the palette's first colour is the ground
        found.putpalette(colours)
        for i, row in enumerate(shot.rows):
            found.paste(pen.row(row), (MARGIN, MARGIN + i * HEIGHT))
        return found

    file = io.BytesIO()
    milliseconds = [round(max(shot.seconds, SHORTEST) * 1000) for shot in shots]
    frame(shots[0]).save(
        file, "GIF", save_all=True, append_images=map(frame, shots[1:]), duration=milliseconds, loop=0, disposal=1,
        optimize=False, comment=b"drawn by dgemma replay",
    )  # fmt: skip
    return file.getvalue()


def _colours() -> list[Colour]:
    """All that is drawn with, and what lies between it and its ground."""
    found = []
    for ink in (INK, *COLOURS.values()):
        for level in range(LEVELS):
            found.append(mixed(ink, BACKGROUND, (level + 1) / LEVELS))
    held = mixed(COLOURS["magenta"], BACKGROUND, 0.2)
    found += [mixed(COLOURS["magenta"], held, level / LEVELS) for level in range(LEVELS)]
    return [BACKGROUND, *found]


@dataclass(frozen=True)
class _Fonts:
    regular: Any
    bold: Any
    italic: Any


def _fonts(path: Path | None) -> _Fonts:
    from PIL import ImageFont

    if path is not None:
        try:
            one = ImageFont.truetype(str(path), SIZE)
        except (OSError, ValueError):
            raise DgemmaError(f"{shown(path)}: not a font that Pillow reads; expected a TTF, TTC or OTF file") from None
        return _Fonts(one, one, one)
    for names in FAMILIES:
        several = names[0].endswith(".ttc")  # a file of all three
        try:
            return _Fonts(*(ImageFont.truetype(name, SIZE, index=i if several else 0) for i, name in enumerate(names)))
        except OSError:
            continue
    one = ImageFont.load_default(SIZE)
    return _Fonts(one, one, one)


class _Pen:
    """Draws rows; a row, and a character, that comes again is drawn once."""

    def __init__(self, fonts: _Fonts, width: int, palette: Image.Image) -> None:
        self._fonts = fonts
        self._width = width
        self._palette = palette
        self.row = cache(self._row)
        self._glyph = cache(self._drawn)
        self._shade = cache(self._shaded)

    def _row(self, row: Row) -> Image.Image:
        from PIL import Image

        strip = Image.new("RGB", (self._width, HEIGHT), BACKGROUND)
        for run in row:
            self._run(strip, run)
        return strip.quantize(palette=self._palette, dither=Image.Dither.NONE)

    def _run(self, strip: Image.Image, run: Run) -> None:
        look = run.look
        left, right = run.column * WIDTH, (run.column + run.cells) * WIDTH
        if look.ground is not None:
            strip.paste(look.ground, (left, 0, right, HEIGHT))
        for column, cells, text in characters(run):
            x = column * WIDTH
            if text[0] == SHADE:
                box = (x, 3, x + cells * WIDTH, HEIGHT - 3)
                strip.paste(self._shade(look.ink).crop(box), box)
            elif text in BARS:
                high = 3 + (HEIGHT - 8) * (BARS.index(text) + 1) // len(BARS)
                strip.paste(look.ink, (x, HEIGHT - 3 - high, x + WIDTH, HEIGHT - 3))
            elif text == END:
                strip.paste(look.ink, (x + 2, 7, x + WIDTH - 2, HEIGHT - 5))
            else:  # one by one: fonts of more than one width keep to the grid too
                for i, glyph in enumerate(clusters(text)):
                    if not glyph.isspace():
                        mask = self._glyph(glyph, look.bold, look.italic)
                        strip.paste(look.ink, (x + i * WIDTH - WIDTH, 0), mask)
        if look.underline:
            strip.paste(look.ink, (left, HEIGHT - 3, right, HEIGHT - 2))

    def _drawn(self, glyph: str, bold: bool, italic: bool) -> Image.Image:
        """One character, with a cell of room on either side."""
        from PIL import Image, ImageDraw

        font = self._fonts.bold if bold else self._fonts.italic if italic else self._fonts.regular
        width = max(cell_len(glyph), 1) * WIDTH
        mask = Image.new("L", (width + 2 * WIDTH, HEIGHT))
        thicker = 0.35 if bold and font is self._fonts.regular else 0
        place = (WIDTH + width / 2, HEIGHT - 6)
        ImageDraw.Draw(mask).text(place, glyph, 255, font=font, anchor="ms", stroke_width=thicker)
        return mask

    def _shaded(self, ink: Colour) -> Image.Image:
        """A row of slanted lines."""
        from PIL import Image, ImageDraw

        found = Image.new("RGB", (self._width, HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(found)
        for x in range(-HEIGHT, self._width, 4):
            pen.line((x, HEIGHT, x + HEIGHT, 0), ink)
        return found
