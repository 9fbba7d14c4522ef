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
from .picture import BACKGROUND, BARS, COLOURS, END, INK, SHADE, Look, Row, Run, Shot, characters, clusters, mixed

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

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
    pen = _Pen(_fonts(font), size[0] - 2 * MARGIN)
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in _colours() for part in colour])
    frames = []
    for shot in shots:
        frame = Image.new("RGB", size, BACKGROUND)
        for i, row in enumerate(shot.rows):
            frame.paste(pen.row(row), (MARGIN, MARGIN + i * HEIGHT))
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    file = io.BytesIO()
    milliseconds = [round(max(shot.seconds, SHORTEST) * 1000) for shot in shots]
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, disposal=1,
        optimize=False, comment=b"drawn by dgemma replay",
    )  # fmt: skip
    return file.getvalue()


def _colours() -> list[tuple[int, int, int]]:
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

    def of(self, look: Look) -> Any:
        return self.bold if look.bold else self.italic if look.italic else self.regular


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
    """Draws rows; one that comes again is drawn once."""

    def __init__(self, fonts: _Fonts, width: int) -> None:
        self._fonts = fonts
        self._width = width
        self.row = cache(self._row)

    def _row(self, row: Row) -> Image.Image:
        from PIL import Image, ImageDraw

        strip = Image.new("RGB", (self._width, HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(strip)
        for run in row:
            self._run(pen, run)
        return strip

    def _run(self, pen: ImageDraw.ImageDraw, run: Run) -> None:
        look = run.look
        left, right = run.column * WIDTH, (run.column + run.cells) * WIDTH - 1
        if look.ground is not None:
            pen.rectangle((left, 0, right, HEIGHT - 1), look.ground)
        for column, cells, text in characters(run):
            x = column * WIDTH
            if text == SHADE:
                for at in range(x - HEIGHT, x + cells * WIDTH, 4):  # slanted lines, cut off at the cell's edges
                    inside = [(at + dx, HEIGHT - 4 - dx) for dx in range(HEIGHT - 6)]
                    pen.point([one for one in inside if x <= one[0] < x + cells * WIDTH], look.ink)
            elif text in BARS:
                high = 2 + (HEIGHT - 8) * (BARS.index(text) + 1) // len(BARS)
                pen.rectangle((x, HEIGHT - 4 - high, x + WIDTH - 1, HEIGHT - 4), look.ink)
            elif text == END:
                pen.rectangle((x + 2, 7, x + 7, HEIGHT - 6), look.ink)
            else:
                self._glyphs(pen, x, cells, text, look)
        if look.underline:
            pen.line((left, HEIGHT - 3, right, HEIGHT - 3), look.ink)

    def _glyphs(self, pen: ImageDraw.ImageDraw, x: int, cells: int, text: str, look: Look) -> None:
        font = self._fonts.of(look)
        thicker = 0.35 if look.bold and font is self._fonts.regular else 0
        # One by one: fonts of more than one width keep to the grid too.
        for i, glyph in enumerate(clusters(text)):
            if not glyph.isspace():
                middle = x + (cells * WIDTH / 2 if cell_len(glyph) == cells else (i + 0.5) * WIDTH)
                pen.text((middle, HEIGHT - 6), glyph, look.ink, font=font, anchor="ms", stroke_width=thicker)
