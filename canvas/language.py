"""What may stand in the holes of a canvas, as an automaton over classes of tokens.

    text      ordinary tokens, no control tokens; what they spell is UTF-8, with no character left half at a hole's end
    filler    padding or an end of sequence: what the model was trained to see behind the end of an answer
    held      whatever is given; it counts as a class of its own

A hole of a length is text throughout. One of any length is text, then filler to its end, which is left out of the
result: so it may come back shorter. Holes are told apart by what is held between them; where nothing is, their
positions are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..constraints.automaton import TokenAutomaton
from ..constraints.compiled import compile_constraint
from ..constraints.stored import cache_folder
from ..constraints.walk import Constraint
from ..core.errors import DgemmaError
from ..text.tokens import Tokenizer

FILLER, HELD = -1, -2
"""Labels beside the classes of text, which count from 0."""

Edge = tuple[int, int, int]
"""A state, a label, and the state that it leads to."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A hole on a canvas."""

    start: int
    length: int
    open: bool
    """Whether what is in it may be shorter."""

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Which tokens follow each other in a text."""

    classes: np.ndarray
    """int32 [V]: the class of each token, −1 for what is no text."""
    edges: tuple[Edge, ...]
    states: int
    whole: int
    """The state of a text whose characters are all complete, where it begins."""


def any_text(ids: np.ndarray, vocab_size: int) -> Text:
    """Return the language of these tokens in any order."""
    classes = np.full(vocab_size, -1, np.int32)
    classes[ids] = 0
    return Text(classes=classes, edges=((0, 0, 0),), states=1, whole=0)


def text_of(tokenizer: Tokenizer, ids: np.ndarray, vocab_size: int, end: int) -> Text:
    """Return the language of these tokens where they spell UTF-8; of all of them where their bytes are not known.

    `end` is an end-of-sequence token.
    """
    try:
        found = compile_constraint(r"[\s\S]*", tokenizer, ends=[end], cache=cache_folder())
    except DgemmaError:  # a decoder whose bytes cannot be followed
        return any_text(ids, vocab_size)
    closing = int(found.classes[end])
    classes = np.full(vocab_size, -1, np.int32)
    classes[ids] = found.classes[ids]
    used = set(np.unique(classes).tolist()) - {-1, closing}
    classes[~np.isin(classes, sorted(used))] = -1
    columns = (found.sources, found.labels, found.targets)
    edges = [(int(a), int(k), int(b)) for a, k, b in zip(*columns, strict=True) if int(k) in used]
    whole = next((a for a, _, b in edges if a == b and found.accepting[a]), None)
    if whole is None:
        return any_text(ids, vocab_size)
    return Text(classes=classes, edges=tuple(edges), states=found.states, whole=whole)


def language_of(rooms: Sequence[Room], text: Text, filler: np.ndarray) -> Constraint:
    """Return the language of a canvas whose holes are `rooms`, in order, and whose other positions are held.

    filler int [n]: ids of tokens that stand for nothing.
    """
    made = _Made(text)
    ways, ends = [0], [0]  # states in which the next room may begin, and those in which the canvas may end
    made.edges.append((0, HELD, 0))
    for i, room in enumerate(rooms):
        adjacent = i + 1 < len(rooms) and rooms[i + 1].start == room.end
        ways = made.counted(ways, room) if adjacent else made.free(ways, room)
        if not adjacent:
            after = made.state()
            made.edges += [(way, HELD, after) for way in [*ways, after]]
            ways, ends = [after], [*ways, after]
    return _automaton(made, ends, filler)


class _Made:
    """States and edges so far; state 0 is where a canvas begins."""

    def __init__(self, text: Text) -> None:
        self.text, self.states = text, 1
        self.edges: list[Edge] = []

    def state(self) -> int:
        self.states += 1
        return self.states - 1

    def free(self, ways: list[int], room: Room) -> list[int]:
        """Add a room that ends where something is held → the states that it may end in."""
        text, base = self.text, self.states
        self.states += text.states
        self.edges += [(base + a, label, base + b) for a, label, b in text.edges]
        self.edges += [(way, label, base + b) for way in ways for a, label, b in text.edges if a == text.whole]
        if not room.open:
            return [base + text.whole]
        filler = self.state()
        self.edges += [(way, FILLER, filler) for way in [*ways, base + text.whole, filler]]
        return [base + text.whole, filler]

    def counted(self, ways: list[int], room: Room) -> list[int]:
        """Add a room that ends where another begins: its length says where."""
        text, fillers = self.text, list[int]()
        now: dict[int, list[int]] = {text.whole: ways}
        for i in range(room.length):
            last, then = i + 1 == room.length, dict[int, list[int]]()
            for a, label, b in text.edges:
                if a in now and (b == text.whole or not last):
                    if b not in then:
                        then[b] = [self.state()]
                    self.edges += [(way, label, then[b][0]) for way in now[a]]
            if room.open:
                behind = then[text.whole][0] if last else self.state()
                self.edges += [(way, FILLER, behind) for way in [*now.get(text.whole, []), *fillers]]
                fillers = [behind]
            now = then
        return now[text.whole]


def _automaton(made: _Made, ends: list[int], filler: np.ndarray) -> Constraint:
    edges, numbers = _trimmed(made.edges, ends)
    used = {label for _, label, _ in edges}
    classes = np.full(len(made.text.classes), -1, np.int32)
    found = {label: np.flatnonzero(made.text.classes == label) for label in used if label >= 0}
    if FILLER in used:
        found[FILLER] = filler
    order = sorted(found, key=lambda label: int(found[label].min()))  # by first token, as every automaton's
    for number, label in enumerate(order):
        classes[found[label]] = number
    named = {label: i for i, label in enumerate([*order, HELD])}
    table = sorted((numbers[a], named[label], numbers[b]) for a, label, b in edges)
    sources, labels, targets = (np.array(column, np.int32) for column in zip(*table, strict=True))
    accepting = np.zeros(len(numbers), bool)
    accepting[[numbers[end] for end in ends if end in numbers]] = True
    return Constraint(
        automaton=TokenAutomaton(
            classes=classes, count=len(named), sources=sources, labels=labels, targets=targets, states=len(numbers),
            start=numbers[0], accepting=accepting, held_class=named[HELD],
        )
    )  # fmt: skip


def _trimmed(edges: list[Edge], ends: list[int]) -> tuple[set[Edge], dict[int, int]]:
    """Return the edges between states that are reached and lead to an end, and these states' numbers."""
    kept = set(edges)
    ahead, back = _reached([0], kept), _reached(ends, {(b, label, a) for a, label, b in kept})
    numbers = {state: i for i, state in enumerate(sorted(ahead & back | {0}))}
    return {edge for edge in kept if edge[0] in numbers and edge[2] in numbers}, numbers


def _reached(starts: list[int], edges: set[Edge]) -> set[int]:
    following: dict[int, set[int]] = {}
    for a, _, b in edges:
        following.setdefault(a, set()).add(b)
    found, left = set(starts), list(starts)
    while left:
        for state in following.get(left.pop(), ()):
            if state not in found:
                found.add(state)
                left.append(state)
    return found
