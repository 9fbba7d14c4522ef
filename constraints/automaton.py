"""The record that a constraint compiles to: a deterministic automaton over classes of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAutomaton:
    """Which sequences of tokens an answer may be, ends and padding included.

    Tokens that no state tells apart are one class, and edges are labelled with classes. The end of the answer is an
    edge like any other: from every accepting state of the text the class of the end-of-sequence tokens leads to a
    state END, which is accepting too and goes round on that class and on the class of the padding token. Padding leads
    nowhere else, because text is cut at its first end token and not at padding.

    Every state can be reached from `start` and can reach an accepting one. Edges are sorted by source, then label; a
    source has one target for a label. Classes are ordered by their first token, so that equal input gives equal
    numbers, and every class has an edge.
    """

    classes: np.ndarray
    """int32 [V]: the class of each token, −1 where no edge takes it."""

    count: int
    """C, how many classes there are."""

    sources: np.ndarray
    """int32 [E]"""

    labels: np.ndarray
    """int32 [E]: classes."""

    targets: np.ndarray
    """int32 [E]"""

    states: int
    """S"""

    start: int

    accepting: np.ndarray
    """bool [S]: where an answer may be over because nothing more of it fits, END included."""

    held_class: int | None = None
    """A class that no token has: what a held position counts as, whatever token it holds. None: held tokens count as
    what they are."""

    @cached_property
    def key(self) -> str:
        """Hash of the content, in hexadecimal: the same for equal automata in every process."""
        found = hashlib.sha256()
        for array in (self.classes, self.sources, self.labels, self.targets, self.accepting):
            found.update(np.int64(array.size).tobytes() + np.ascontiguousarray(array).tobytes())
        found.update(repr((self.count, self.states, self.start, self.held_class)).encode())
        return found.hexdigest()

    def step(self, state: int, token: int) -> int:
        """Return the state that a token leads to, −1 where none does, or from −1."""
        label = int(self.classes[token]) if 0 <= token < len(self.classes) else -1
        if state < 0 or label < 0:
            return -1
        start, end = np.searchsorted(self.sources, [state, state + 1])
        at = start + np.searchsorted(self.labels[start:end], label)
        return int(self.targets[at]) if at < end and self.labels[at] == label else -1

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Whether these tokens are a whole answer, with or without its end tokens."""
        state = self.start
        for token in tokens:
            state = self.step(state, token)
        return state >= 0 and bool(self.accepting[state])
