"""What may stand in the holes of a canvas, as an automaton over classes of tokens.

    text      an ordinary token: it spells something, and is no control token
    filler    padding or an end of sequence: what the model was trained to see behind the end of an answer
    held      whatever is given; it counts as a class of its own

A hole of a length is text throughout. One of any length is text, then filler to its end, which is left out of the
result: so it may come back shorter. Holes are told apart by what is held between them; where nothing is, their
positions are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..constraints.automaton import TokenAutomaton
from ..constraints.walk import Constraint

TEXT, FILLER, HELD = "text", "filler", "held"


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


class Spells(Protocol):
    """The part of a tokenizer that is asked which tokens are text."""

    def text_ids(self) -> np.ndarray: ...


def language_of(rooms: Sequence[Room], text: np.ndarray, filler: np.ndarray, vocab_size: int) -> Constraint:
    """Return the language of a canvas whose holes are `rooms`, in order, and whose other positions are held.

    text, filler int [n]: ids of ordinary tokens, and of those that stand for nothing.
    """
    edges: list[tuple[int, str, int]] = [(0, HELD, 0)]
    count, ways, ends = 1, [0], [0]  # states so far; those in which the next room may begin; and the canvas end
    for i, room in enumerate(rooms):
        adjacent = i + 1 < len(rooms) and rooms[i + 1].start == room.end
        count, ways = (_counted if adjacent else _free)(edges, count, ways, room)
        if not adjacent:
            edges += [(way, HELD, count) for way in [*ways, count]]
            ways, ends, count = [count], [*ways, count], count + 1
    return _automaton(edges, count, ends, text, filler, vocab_size)


def _free(edges: list[tuple[int, str, int]], count: int, ways: list[int], room: Room) -> tuple[int, list[int]]:
    """Add a room that ends where something is held → states so far, those that it may end in."""
    text, filler = count, count + 1
    edges += [(way, TEXT, text) for way in [*ways, text]]
    if not room.open:
        return count + 1, [text]
    edges += [(way, FILLER, filler) for way in [*ways, text, filler]]
    return count + 2, [text, filler]


def _counted(edges: list[tuple[int, str, int]], count: int, ways: list[int], room: Room) -> tuple[int, list[int]]:
    """Add a room that ends where another begins: its length says where."""
    texts, fillers = ways, []
    for i in range(room.length):
        last = i + 1 == room.length
        after = count
        count += 1
        edges += [(way, TEXT, after) for way in texts]
        if room.open:
            behind = after if last else count
            count += not last
            edges += [(way, FILLER, behind) for way in [*texts, *fillers]]
            fillers = [behind]
        texts = [after]
    return count, texts


def _automaton(
    edges: list[tuple[int, str, int]], count: int, ends: list[int], text: np.ndarray, filler: np.ndarray, size: int
) -> Constraint:  # fmt: skip
    used = {label for _, label, _ in edges}
    classes = np.full(size, -1, np.int32)
    members = {label: ids for label, ids in ((TEXT, text), (FILLER, filler)) if label in used and len(ids)}
    order = sorted(members, key=lambda label: int(members[label].min()))
    for number, label in enumerate(order):
        classes[members[label]] = number
    numbers = {label: i for i, label in enumerate([*order, HELD])}
    table = sorted({(a, numbers[label], b) for a, label, b in edges if label in numbers})
    sources, labels, targets = (np.array(column, np.int32) for column in zip(*table, strict=True))
    accepting = np.zeros(count, bool)
    accepting[ends] = True
    return Constraint(
        automaton=TokenAutomaton(
            classes=classes, count=len(numbers), sources=sources, labels=labels, targets=targets, states=count,
            start=0, accepting=accepting, held_class=numbers[HELD],
        )
    )  # fmt: skip
