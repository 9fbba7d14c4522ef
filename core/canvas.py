"""What a request wants of its canvas beyond noise: held tokens, a draft to start from, a language to stay in.

A constraint looks at a pass through classes of tokens (`Masses`), chooses on the host, and says what every position
drew, what would be committed, and how unsure each position is once the language is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .parts import Masses

FREE = -1
"""Stands where no token is held, or where a draft has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Classes of tokens that nothing needs to tell apart."""

    of: np.ndarray
    """int32 [V]: each token's class, 0 … count − 1, or −1 for a token of none."""
    count: int
    key: str
    """Equal where the classes are."""


class Chosen(NamedTuple):
    """What a row's constraint makes of one pass, int32 [L] each where nothing else is said."""

    token: np.ndarray
    """The token that was drawn; −1 where its class has to be looked into."""
    label: np.ndarray
    """The class that was drawn."""
    rest: np.ndarray
    """float32 [L]: the uniform for the draw inside the class."""
    argmax: np.ndarray
    """The likeliest string of the language: what would be committed."""
    entropy: np.ndarray
    """float32 [L]: nats, of the distribution given the language."""
    factors: np.ndarray | None = None
    """float32 [L, C + 1]: by what each class's probabilities are multiplied, tokens of none last, for what the model is
    fed back; None feeds back the distribution as it came."""

    def rows(self, index: Sequence[int]) -> Chosen:
        """Return some rows of a batch's, in this order."""
        factors = None if self.factors is None else self.factors[index]
        return Chosen(*(one[index] for one in self[:-1] if one is not None), factors=factors)


class Walk(Protocol):
    """One row's way through a language, canvas by canvas."""

    log_accept: float
    """Of the last pass: the log of the probability that it gave to the language."""

    def choose(
        self, masses: Masses, *, uniforms: np.ndarray, held: np.ndarray, bound: float, greedy: bool
    ) -> Chosen:  # fmt: skip
        """Choose in one pass: masses [L, C], uniforms float32 [L], held int32 [L]; `bound` is the entropy bound."""
        ...

    def commit(self, argmax: np.ndarray) -> None:
        """A canvas, int32 [L], is final: the next one goes on from where it ends."""
        ...


class Constraint(Protocol):
    """A language that an answer has to be in. Immutable; rows and threads share it."""

    @property
    def classes(self) -> Classes: ...

    def begin(self, *, budget: int, canvas_length: int, held: np.ndarray) -> Walk:
        """Begin an answer of at most so many tokens, with some held: int32 [≤ budget], `FREE` elsewhere.

        Raises:
            DgemmaError: no text of the language fits.
        """
        ...


def part(values: Sequence[int], start: int, length: int) -> np.ndarray:
    """Return `length` of an answer's values from a position on, int32, `FREE` beyond their end."""
    found = np.full(length, FREE, np.int32)
    piece = values[start : start + length]
    found[: len(piece)] = piece
    return found


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The thinking channel's marks, and after how many tokens of the answer it is closed."""

    opens: int
    closes: int
    budget: int


class Plan:
    """What each canvas of an answer holds and starts from, as the answer grows.

    The thinking channel is closed by holding its end mark where the budget ends, for as long as the draft is inside the
    channel there: a model that ends it earlier, or opens none, is left alone.
    """

    def __init__(
        self, held: Sequence[int], init: Sequence[int], strength: float, channel: Channel | None, *, inside: bool
    ) -> None:  # fmt: skip
        """`inside` says whether the prompt leaves the channel open."""
        self.init, self.strength = init, strength
        both = np.where((fixed := part(held, 0, max(len(held), len(init)))) == FREE, part(init, 0, len(fixed)), fixed)
        self.fixed: Sequence[int] = both.tolist() if strength == 0 else held
        """What is held whatever the draft says, by position of the answer."""
        self.end, self._inside, self._at = channel, inside, 0
        self._closing: list[bool] = []  # of this canvas's passes: whether the end mark was held
        self._marked: list[np.ndarray | None] = []  # and what was held

    def canvas(self, noise: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return what a canvas starts from: its noise int32 [L], where nothing is held or drafted.

        A drafted token is lost to noise with probability `strength`, by its uniform.
        """
        self._closing, self._marked = [], []
        draft = part(self.init, self._at, len(noise))
        kept = np.where((draft != FREE) & (uniforms >= self.strength), draft, noise)
        held = self._held(len(noise), self.wants_end(None))
        return np.where(held == FREE, kept, held)

    def hold(self, length: int, draft: np.ndarray | None) -> np.ndarray:
        """Return what the next pass holds, int32 [L], after the newest draft that was seen; and count the pass."""
        self._closing.append(self.wants_end(draft))
        held = self._held(length, self._closing[-1])
        self._marked.append(held != FREE if (held != FREE).any() else None)
        return held

    def held_in(self, step: int) -> np.ndarray | None:
        """Return which positions pass `step` of this canvas held, bool [L]; None for none."""
        return self._marked[step]

    def skipped(self, steps: int) -> int:
        """Return how much of a schedule a drafted canvas is past as it begins."""
        return int((1 - self.strength) * steps) if self._at < len(self.init) else 0

    def settled(self, length: int, left: int) -> np.ndarray | None:
        """Return a canvas whose every position that counts is held, for which no pass is needed."""
        held = part(self.fixed, self._at, length)
        # What is behind the budget is cut off; it only must not look like an end.
        return np.where(held == FREE, held[min(left, length) - 1], held) if (held[:left] != FREE).all() else None

    def settles(self, step: int, draft: np.ndarray) -> bool:
        """Whether pass `step` held the channel's end where its own draft asks for it."""
        return not self.watches(len(draft)) or self._closing[step] == self.wants_end(draft)

    def closed(self, step: int, held: np.ndarray, draft: np.ndarray) -> np.ndarray:
        """Return what pass `step` should have held, int32 [L], where its own draft opens the channel: `held`, or that
        with the end mark too. Of a canvas's last pass, behind which none can hold it."""
        if self._closing[step] or not self.watches(len(draft)) or not self.wants_end(draft):
            return held
        self._closing[step] = True
        found = self._held(len(draft), True)
        self._marked[step] = found != FREE
        return found

    def watches(self, length: int) -> bool:
        """Whether what a pass holds depends on the draft before: in the one canvas in which the channel is closed."""
        return self.end is not None and 0 < self._end < length

    def commit(self, argmax: np.ndarray) -> None:
        """A canvas is final."""
        self._inside = self._inside_after(argmax)
        self._at += len(argmax)

    def wants_end(self, draft: np.ndarray | None) -> bool:
        """Whether the channel is open where its budget ends, in this canvas."""
        if self.end is None:
            return False
        return self._inside_after(draft[: self._end] if draft is not None else ())

    @property
    def _end(self) -> int:
        """Where in this canvas the channel is closed; its length or more where a later one is meant."""
        return max(self.end.budget - self._at, 0) if self.end else 0

    def _held(self, length: int, closing: bool) -> np.ndarray:
        held = part(self.fixed, self._at, length)
        if closing and self.end and self._end < length and held[self._end] == FREE:
            held[self._end] = self.end.closes
        return held

    def _inside_after(self, tokens: Sequence[int] | np.ndarray) -> bool:
        channel = self.end
        marks = [token for token in tokens if channel and token in (channel.opens, channel.closes)]
        return marks[-1] == channel.opens if marks and channel else self._inside
