"""Text with holes: `<fill>`, which may be any length, and `<fill:12>`, which is 12 tokens.

A marker with one colon more stands for itself: `<fill:>` is the text `<fill>`, and `<fill::12>` is `<fill:12>`. So
every text can be written, and whatever is no marker stands as it is: no character has a meaning of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..core.errors import DgemmaError, quoted
from ..core.given import integer

MARKER = "<fill>"

LONGEST = 1 << 20
"""Tokens of a hole, at most."""


@dataclass(frozen=True)
class Hole:
    """A place that is to be filled."""

    length: int | None = None
    """Tokens; None: at most as many as there is room for."""

    def __post_init__(self) -> None:
        if self.length is not None:
            integer("the length of a hole", self.length, 1, LONGEST)


@dataclass(frozen=True, kw_only=True)
class Template:
    """Text with holes in it: a piece before each, and one behind the last."""

    pieces: tuple[str, ...]
    holes: tuple[Hole, ...]

    def assembled(self, fillings: Sequence[str]) -> str:
        """Return the text with its holes filled."""
        return "".join(a + b for a, b in zip(self.pieces, [*fillings, ""], strict=True))

    def spans(self, fillings: Sequence[str]) -> list[tuple[int, int]]:
        """Return where in it each filling stands."""
        found, at = [], 0
        for piece, filling in zip(self.pieces, fillings, strict=False):
            at += len(piece)
            found.append((at, at + len(filling)))
            at += len(filling)
        return found


def template_of(text: str | Sequence[str | Hole], marker: str = MARKER) -> Template:
    """Read text with markers, or a sequence of text, as it stands, and holes.

    Args:
        marker: what stands for a hole, of two characters at least. Before its last one a colon and a number may stand.

    Raises:
        DgemmaError: no hole, or neither text nor a sequence of text and holes.
    """
    parts = _marked(text, marker) if isinstance(text, str) else _given(text)
    pieces, holes = [""], []
    for part in parts:
        if isinstance(part, Hole):
            holes.append(part)
            pieces.append("")
        else:
            pieces[-1] += part
    if not holes:
        more = f": put {marker}, or {_with(marker, ':12')} for 12 tokens, where text is missing"
        raise DgemmaError(f"the text has no hole{more if isinstance(text, str) else ''}")
    return Template(pieces=tuple(pieces), holes=tuple(holes))


def escaped(text: str, marker: str = MARKER) -> str:
    """Return text in which nothing is a hole: what `template_of` reads as this very text."""
    return _pattern(marker).sub(lambda found: _with(marker, f":{found[1]}{found[2] or ''}"), text)


def marked(template: Template, marker: str = MARKER) -> str:
    """Return a template as text with markers."""
    holes = [_with(marker, "" if hole.length is None else f":{hole.length}") for hole in template.holes]
    return "".join(escaped(piece, marker) + hole for piece, hole in zip(template.pieces, [*holes, ""], strict=True))


def _marked(text: str, marker: str) -> list[str | Hole]:
    parts: list[str | Hole] = []
    found = list(_pattern(marker).finditer(text))
    ends = [0, *(one.end() for one in found)]
    for one, before in zip(found, ends, strict=False):
        parts.append(text[before : one.start()])
        colons, digits = one[1], one[2] or ""
        if colons == "" or (colons == ":" and digits):
            parts.append(Hole(_length(digits, one[0])))
        else:
            parts.append(_with(marker, f"{colons[1:]}{digits}"))
    return [*parts, text[ends[-1] :]]


def _length(digits: str, spelled: str) -> int | None:
    if not digits:
        return None
    length = int(digits) if len(digits) < 10 else 0
    if not 1 <= length <= LONGEST:
        raise DgemmaError(f"{quoted(spelled, 40)}: a hole has from 1 to {LONGEST:,} tokens")
    return length


def _pattern(marker: str) -> re.Pattern[str]:
    if not isinstance(marker, str) or len(marker) < 2:
        raise DgemmaError(f"marker is {quoted(marker, 40)}, expected text of two characters or more, such as {MARKER}")
    head, last = re.escape(marker[:-1]), re.escape(marker[-1])
    return re.compile(f"{head}(:*)((?<=:)[0-9]+)?{last}")


def _with(marker: str, length: str) -> str:
    return f"{marker[:-1]}{length}{marker[-1]}"


def _given(parts: Any) -> list[str | Hole]:
    if not isinstance(parts, Sequence) or not all(isinstance(part, str | Hole) for part in parts):
        raise DgemmaError(
            f"the text is a {type(parts).__name__}, expected text with markers, or a list of text and Hole"
        )
    return list(parts)


def lines_of(text: str) -> list[tuple[int, int]]:
    """Return where each line begins and ends, its line end left out: \\n, \\r\\n and \\r end one."""
    ends = [(one.start(), one.end()) for one in re.finditer(r"\r\n|\r|\n", text)]
    starts = [0, *(end for _, end in ends), len(text)]
    found = [(start, next_) for start, next_ in pairwise(starts)]
    return [(start, ends[i][0] if i < len(ends) else end) for i, (start, end) in enumerate(found)]
