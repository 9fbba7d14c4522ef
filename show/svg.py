"""A recording as an SVG that plays by itself.

Where motion is unwelcome (prefers-reduced-motion), or style sheets are not read at all, the last frame stands still:
looks are attributes of the elements, and the style sheet holds nothing but the motion. A row that is the same in
several frames is drawn once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

from .picture import BACKGROUND, BARS, END, SHADE, Colour, Look, Row, Run, Shot, characters

WIDTH, HEIGHT, MARGIN = 8.4, 19, 14
"""Of a cell in units of the picture, 14 of which are the font's size; and of the edge."""
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PLACEHOLDER = "\ufffd"


def draw(shots: Sequence[Shot], *, columns: int, title: str) -> str:
    """Return the picture; the same shots give the same text.

    Args:
        columns: cells that its width holds.
        title: what a screen reader says of it.
    """
    tall = max((len(shot.rows) for shot in shots), default=1)
    width, height = columns * WIDTH + 2 * MARGIN, tall * HEIGHT + 2 * MARGIN
    whole = sum(shot.seconds for shot in shots) or 1.0
    groups: dict[tuple[int, int], list[str]] = {}
    for i in range(tall):
        for begin, end, row in _stretches(shots, i):
            groups.setdefault((begin, end), []).append(_row(row, i))
    starts = [sum(shot.seconds for shot in shots[:i]) for i in range(len(shots) + 1)]
    rules, elements = [], []
    for (begin, end), drawn in sorted(groups.items()):
        if (begin, end) == (0, len(shots)):
            elements.append(f"<g>{''.join(drawn)}</g>")
            continue
        last = end == len(shots)
        name = f"f{begin}-{end}"
        before = "0%{opacity:0}" if begin else ""
        after = "" if last else f"{100 * starts[end] / whole:.3f}%{{opacity:0}}"
        rules.append(f"@keyframes {name}{{{before}{100 * starts[begin] / whole:.3f}%{{opacity:1}}{after}}}")
        rules.append(f"#{name}{{animation:{name} {whole:.2f}s step-end infinite}}")
        hidden = "" if last else ' opacity="0"'
        elements.append(f'<g id="{name}"{hidden}>{"".join(drawn)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_figure(width)} {_figure(height)}" role="img">\n'
        f"<title>{_text(title)}</title>\n"
        "<style>\n@media (prefers-reduced-motion: no-preference) {\n" + "\n".join(rules) + "\n}\n</style>\n"
        f'<defs><pattern id="shade" width="3" height="3" patternUnits="userSpaceOnUse">'
        f'<path d="M0 3 3 0" stroke="{_hex((66, 96, 140))}" stroke-width=".8"/></pattern></defs>\n'
        f'<rect width="100%" height="100%" rx="6" fill="{_hex(BACKGROUND)}"/>\n'
        f'<g transform="translate({MARGIN} {MARGIN})" font-family="{FONT}" font-size="14">\n'
        + "\n".join(elements)
        + "\n</g>\n</svg>\n"
    )


def _stretches(shots: Sequence[Shot], i: int) -> list[tuple[int, int, Row]]:
    """Row i of every shot, those of the same content in turn as one: (first shot, behind the last, row)."""
    found: list[tuple[int, int, Row]] = []
    for at, shot in enumerate(shots):
        row = shot.rows[i] if i < len(shot.rows) else ()
        if found and found[-1][2] == row:
            found[-1] = (found[-1][0], at + 1, row)
        else:
            found.append((at, at + 1, row))
    return [one for one in found if one[2]]


def _row(row: Row, i: int) -> str:
    return "".join(_run(run, i) for run in row)


def _run(run: Run, i: int) -> str:
    top = i * HEIGHT
    parts = []
    if run.look.ground is not None:
        parts.append(_box(run.column, run.cells, top, HEIGHT, _hex(run.look.ground)))
    for column, cells, text in characters(run):
        if text[0] == SHADE:
            parts.append(_box(column, cells, top + 2, HEIGHT - 4, "url(#shade)"))
        elif text in BARS:
            high = 2 + 12 * (BARS.index(text) + 1) / len(BARS)
            parts.append(_box(column, cells, top + 16 - high, high, _hex(run.look.ink)))
        elif text == END:
            parts.append(_box(column + 0.2, 0.6, top + 6, 8, _hex(run.look.ink)))
        elif text.strip():
            parts.append(_glyphs(column, cells, text, top, run.look))
    return "".join(parts)


def _box(column: float, cells: float, top: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{_figure(column * WIDTH)}" y="{_figure(top)}" width="{_figure(cells * WIDTH)}" '
        f'height="{_figure(height)}" fill="{fill}"/>'
    )


def _glyphs(column: int, cells: int, text: str, top: int, look: Look) -> str:
    more = ' font-weight="700"' if look.bold else ""
    more += ' font-style="italic"' if look.italic else ""
    more += ' text-decoration="underline"' if look.underline else ""
    # Spaces at its ends would be dropped, and those inside be one.
    spaced = _text(text).replace(" ", "\u00a0")
    return (
        f'<text x="{_figure(column * WIDTH)}" y="{top + 14}" textLength="{_figure(cells * WIDTH)}" '
        f'fill="{_hex(look.ink)}"{more}>{spaced}</text>'
    )


def _text(text: str) -> str:
    return escape(_ILLEGAL.sub(_PLACEHOLDER, text))


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _figure(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
