"""Sets of characters, as sorted intervals of code points; surrogates are no characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from typing import Any

import numpy as np

Intervals = tuple[tuple[int, int], ...]
"""First and last code points, rising and apart."""

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)

_WRITTEN = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}


def union(parts: Iterable[Intervals]) -> Intervals:
    """Return all characters of some sets, surrogates left out."""
    spans: list[tuple[int, int]] = []
    for first, last in sorted(span for part in parts for span in part):
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    low, high = SURROGATES
    halves = (half for first, last in spans for half in ((first, min(last, low - 1)), (max(first, high + 1), last)))
    return tuple((first, last) for first, last in halves if first <= last)


def complement(found: Intervals) -> Intervals:
    """Return all other characters."""
    edges = [-1, *(edge for span in union([found]) for edge in span), LAST + 1]
    gaps = ((a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True))
    return union([tuple((first, last) for first, last in gaps if first <= last)])


def intersection(one: Intervals, other: Intervals) -> Intervals:
    return complement(union([complement(one), complement(other)]))


@lru_cache(maxsize=512)
def matched(written: str, flags: int) -> Intervals:
    """Return the characters that a set matches, as `re` has it: asked of every character there is."""
    whole = np.arange(LAST + 1, dtype="<u4")
    whole = whole[(whole < SURROGATES[0]) | (whole > SURROGATES[1])]
    gap, cut = SURROGATES[1] - SURROGATES[0] + 1, SURROGATES[0]
    spans = (match.span() for match in re.finditer(f"(?:{written})+", whole.tobytes().decode("utf-32-le"), flags))
    return union(
        ((first if first < cut else first + gap, end - 1 if end - 1 < cut else end - 1 + gap),) for first, end in spans
    )


def category(name: Any, ascii_only: bool) -> Intervals:
    """Return the characters of `\\d`, `\\s`, `\\w` or of what they leave out."""
    return matched(_WRITTEN[name], re.ASCII if ascii_only else 0)


@lru_cache(maxsize=1024)
def folded(span: tuple[int, int], flags: int) -> Intervals:
    """Return a span's characters, and those that differ from one of them in case alone, as `re` has it."""
    judge = re.compile(f"[\\U{span[0]:08x}-\\U{span[1]:08x}]", re.IGNORECASE | flags)
    return union([(span,), *(((ord(c), ord(c)),) for c in judge.findall(_cased()))])


@lru_cache(maxsize=1)
def _cased() -> str:
    """All characters that have a case; the planes from the third on hold none."""
    every = map(chr, range(0x20000))
    return "".join(c for c in every if c.lower() != c or c.upper() != c)
