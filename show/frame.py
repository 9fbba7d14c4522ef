"""What a canvas looks like after a pass: one model of it for every drawing, on a terminal, as a picture or in a page.

Five states, which every drawing tells apart without colour as well:

    changing   not accepted, and another token than one pass before: noise
    guess      not accepted, but the same token as one pass before
    accepted   within the entropy bound, and new
    settled    within the entropy bound, and the same as before
    held       given with the request: it was never open
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from ..core.events import Draft

CHANGING, GUESS, ACCEPTED, SETTLED, HELD = range(5)
STATES = ("changing", "guess", "accepted", "settled", "held")


class Decodes(Protocol):
    """The part of a tokenizer that drawing needs."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str: ...


class Numbers:
    """Stands for the tokenizer of a checkpoint that has none: tokens are shown by their ids."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(f"[{i}]" for i in ids)


def printable(text: str, *, grid: bool = False) -> str:
    """Make control characters visible, so that what a model writes cannot steer the terminal.

    Line breaks and tabs stay. With `grid`, characters without a width go too: they would shift a drawing's columns.
    """
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" else _visible(c, grid) for c in text)


def _visible(c: str, grid: bool) -> str:
    category = unicodedata.category(c)
    if category == "Cc":
        return chr(0x2400 + ord(c)) if ord(c) < 32 else "␡" if c == "\x7f" else "\ufffd"
    if grid and category in ("Cf", "Zl", "Zp", "Cs"):
        return "\ufffd"
    return c


class Pieces:
    """The text of single tokens; those that hold a part of a character only are joined with their neighbours."""

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def spans(self, tokens: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """Yield (start, stop, text) that cover the tokens in order."""
        start = 0
        while start < len(tokens):
            stop, text = start + 1, self.text(tokens[start])
            if "\ufffd" in text:
                while stop < len(tokens) and "\ufffd" in self.text(tokens[stop]):
                    stop += 1
                text = printable(self._tokenizer.decode(tokens[start:stop], special=True), grid=True)
            yield start, stop, text
            start = stop

    def text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = printable(self._tokenizer.decode([token], special=True), grid=True)
        return self._known[token]


class Span(NamedTuple):
    """Positions that are drawn as one: a token, or several that spell a character together."""

    start: int
    stop: int
    text: str
    state: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """The canvas after one pass."""

    draft: Draft
    states: np.ndarray
    """int8 [L], an index of `STATES` for each position."""
    pieces: Pieces = field(repr=False)
    ends: np.ndarray
    """int32, end-of-sequence token ids."""
    budget: int
    """Tokens that may still be written; nothing beyond is shown."""

    @property
    def free(self) -> np.ndarray:
        """bool [L], positions that are not held."""
        return self.states != HELD

    @property
    def accepted(self) -> int:
        """How many of the free positions are accepted."""
        return int((self.draft.accepted & self.free).sum())

    @property
    def uncertainty(self) -> float:
        """Mean entropy of the free positions, nats."""
        entropy = self.draft.entropy[self.free]
        return float(np.nan_to_num(entropy.mean(), nan=0.0, posinf=0.0)) if len(entropy) else 0.0

    @cached_property
    def end(self) -> int | None:
        """The position of the first accepted end-of-sequence token within the budget; nothing is shown behind it.

        Where a held token follows, it is no end: the filler of a hole.
        """
        tokens = self.draft.tokens[: self.budget]
        states = self.states[: len(tokens)]
        found = np.flatnonzero(np.isin(tokens, self.ends) & (states >= ACCEPTED))
        found = found[found >= np.flatnonzero(states == HELD).max(initial=-1)]
        return int(found[0]) if len(found) else None

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """What is shown, up to the end. A span that holds several tokens is in the state of the least certain."""
        tokens = self.draft.tokens[: self.budget if self.end is None else self.end].tolist()
        return tuple(Span(i, j, text, int(self.states[i:j].min())) for i, j, text in self.pieces.spans(tokens))

    @property
    def blank(self) -> int:
        """How many positions lie behind what is shown, the end's own left out."""
        shown = self.spans[-1].stop if self.spans else 0
        return len(self.states) - shown - (self.end is not None)


class Frames:
    """Makes frames of drafts, in the order in which they come.

    Args:
        pieces: text of tokens.
        ends: end-of-sequence token ids.
        budget: tokens that may be written.
    """

    def __init__(self, pieces: Pieces, ends: Sequence[int], budget: int) -> None:
        self._pieces = pieces
        self._ends = np.asarray(ends, np.int32)
        self._budget = budget
        self._before: Draft | None = None
        self.uncertainty: list[float] = []
        """Mean entropy of each pass over this canvas."""

    def add(self, draft: Draft) -> Frame:
        before = self._before
        if before is None or before.canvas != draft.canvas or len(before.tokens) != len(draft.tokens):
            before, self.uncertainty = None, []
        same = np.zeros(len(draft.tokens), bool) if before is None else before.tokens == draft.tokens
        states = (2 * draft.accepted.astype(np.int8) + same).astype(np.int8)
        if draft.held is not None:
            states[draft.held] = HELD
        frame = Frame(draft=draft, states=states, pieces=self._pieces, ends=self._ends, budget=self._budget)
        self.uncertainty.append(frame.uncertainty)
        self._before = draft
        return frame

    def commit(self, tokens: int) -> None:
        """So many tokens are final, and leave the budget."""
        self._budget -= tokens
