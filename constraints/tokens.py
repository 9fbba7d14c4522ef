"""An automaton over bytes times a vocabulary: which tokens it tells apart, and where they lead.

Tokens are strings of bytes, and a string is a function from states to states. Functions are composed a byte at a time
for all tokens at once: equal functions are one, so that what is computed are the few hundred functions that occur and
not a walk for each of 262,144 tokens from each state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import DgemmaError
from ..text.spelling import Bytes, Spelling
from .automaton import TokenAutomaton
from .minimal import equal_rows, minimal, trimmed
from .utf8 import ByteDfa

LARGEST = 1 << 28
"""Entries of the table of functions by states."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Tokens with a meaning of their own.

    Attributes:
        ends: end-of-sequence ids, at least one.
        pad: what may follow them besides, or None.
        channel: what opens and closes thinking before the answer; None where nothing is thought.
        open: the answer begins inside the channel, which the prompt has opened.
    """

    ends: tuple[int, ...]
    pad: int | None = None
    channel: tuple[int, int] | None = None
    open: bool = False


def token_automaton(dfa: ByteDfa, spelling: Spelling, ends: Ends) -> TokenAutomaton:
    """Return the automaton of a text over a vocabulary, with its ends, its padding and the thinking before it.

    Raises:
        DgemmaError: no end token, or a text that the vocabulary cannot write.
    """
    size = len(spelling.known)
    stops = sorted({one for one in ends.ends if 0 <= one < size})
    if not stops:
        raise DgemmaError(
            "a constraint needs a token that ends the answer, and eos names none of the model's; name one, or drop "
            "the constraint"
        )
    usable = spelling.known.copy()
    usable[stops] = False
    if ends.pad is not None and 0 <= ends.pad < size:
        usable[ends.pad] = False
    if ends.channel is not None:
        usable[list(ends.channel)] = False
    vectors, functions = _functions(dfa, spelling.inside, usable)
    table, classes, start, accepting = _with_first(dfa, spelling, usable, vectors, functions)
    table, classes, accepting = _settled(table, classes, start, accepting)
    return _finished(table, classes, accepting, spelling, ends, stops)


def _functions(dfa: ByteDfa, said: Bytes, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the functions that tokens are, int32 [F, S] with S for none; each token's, int64 [V], −1 for none."""
    count = len(dfa.table)
    symbols_of, columns = _symbols(dfa.table)
    table = np.vstack([np.where(columns >= 0, columns, count), np.full((1, columns.shape[1]), count)]).astype(np.int32)
    number = table.shape[1]
    vectors = [np.arange(count, dtype=np.int32)]
    known = {vectors[0].tobytes(): 0}
    dead = np.full(count, count, np.int32).tobytes()
    result = np.full(len(usable), -1, np.int64)
    tokens = np.flatnonzero(usable)
    at, left = said.firsts[tokens], said.sizes[tokens]
    current = np.zeros(len(tokens), np.int64)
    while len(tokens):
        pairs = current * number + symbols_of[said.flat[at]]
        seen = np.zeros(len(vectors) * number, bool)
        seen[pairs] = True
        made = np.full(len(seen), -1, np.int64)
        for pair in np.flatnonzero(seen).tolist():
            found = table[vectors[pair // number], pair % number]
            key = found.tobytes()
            if key == dead:
                continue
            if key not in known:
                if (len(vectors) + 1) * count > LARGEST:
                    raise DgemmaError(
                        f"the pattern tells too many tokens apart in too many states ({len(vectors):,} × {count:,}); "
                        "bound its repeats lower"
                    )
                known[key] = len(vectors)
                vectors.append(found)
            made[pair] = known[key]
        current = made[pairs]
        left, at = left - 1, at + 1
        over = (left == 0) & (current >= 0)
        result[tokens[over]] = current[over]
        going = (left > 0) & (current >= 0)
        tokens, at, left, current = tokens[going], at[going], left[going], current[going]
    return np.array(vectors), result


def _symbols(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each byte's symbol, int64 [256], and the table by symbols: bytes that no state tells apart are one."""
    firsts, groups = equal_rows(table.T)
    return groups, table[:, firsts]


def _with_first(
    dfa: ByteDfa, spelling: Spelling, usable: np.ndarray, vectors: np.ndarray, functions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Add a state for the beginning, where tokens may say something else → table [S, C], classes, start, accepting."""
    count = len(dfa.table)
    padded = np.append(np.where(vectors < count, vectors, -1), np.full((1, count), -1), 0)  # the last: no function
    starting = padded[functions, dfa.start]
    differing = usable & (spelling.first.sizes != spelling.inside.sizes)
    for token in np.flatnonzero(differing).tolist():  # those with a space in front
        state = dfa.start
        for byte in spelling.first.of(token):
            state = int(dfa.table[state, byte]) if state >= 0 else -1
        starting[token] = state
    live = np.flatnonzero(usable & ((functions >= 0) | (starting >= 0)))
    pairs = (functions[live] + 1) * (count + 1) + starting[live] + 1
    _, firsts, groups = np.unique(pairs, return_index=True, return_inverse=True)
    classes = np.full(len(usable), -1, np.int64)
    classes[live] = groups.reshape(-1)
    representatives = live[firsts]
    table = np.vstack([padded[functions[representatives]].T, starting[representatives][None]])
    accepting = np.append(dfa.accepting, dfa.accepting[dfa.start : dfa.start + 1])
    return table.astype(np.int32), classes, count, accepting


def _settled(
    table: np.ndarray, classes: np.ndarray, start: int, accepting: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop states that no tokens come to, or lead on from to an end; merge states and classes until nothing changes."""
    kept = trimmed(table, start, accepting) if table.shape[1] else accepting & (np.arange(len(table)) == start)
    if not kept[start]:
        raise DgemmaError("no text that the constraint allows can be written with this vocabulary")
    numbers = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)
    table, start, accepting = numbers[table[kept]].astype(np.int32), int(numbers[start]), accepting[kept]
    while True:
        before = table.shape
        table, classes = _merged(table, classes)
        if table.shape[1]:
            table, start, accepting = minimal(table, start, accepting)
        if table.shape == before:
            return table, classes, accepting


def _merged(table: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make classes with equal columns one, drop those without edges, and order them by their first token."""
    firsts, groups = equal_rows(table.T) if table.shape[1] else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    live = np.any(table[:, firsts] >= 0, axis=0)
    classes = np.append(np.where(live[groups], groups, -1), -1)[classes]
    tokens = np.flatnonzero(classes >= 0)
    found, at = np.unique(classes[tokens], return_index=True)
    order = found[np.argsort(at)]
    numbers = np.full(len(firsts) + 1, -1, np.int64)
    numbers[order] = np.arange(len(order))
    return table[:, firsts[order]], numbers[classes]


def _finished(
    table: np.ndarray, classes: np.ndarray, accepting: np.ndarray, spelling: Spelling, ends: Ends, stops: Sequence[int]
) -> TokenAutomaton:
    """Add the end of the answer, padding, and thinking; the text's first state is 0."""
    count, ending = table.shape
    over, start, states = count, 0, count + 1
    sources, labels = np.nonzero(table >= 0)
    edges = [np.column_stack([sources, labels, table[sources, labels]])]
    classes, label = classes.copy(), ending + 1

    def add(sources: Any, labels: Any, target: int) -> None:
        edges.append(np.column_stack(np.broadcast_arrays(sources, labels, target)))

    classes[stops] = ending
    add(np.append(np.flatnonzero(accepting), over), ending, over)
    pad = ends.pad if ends.pad is not None and 0 <= ends.pad < len(classes) and ends.pad not in stops else None
    if pad is not None:
        classes[pad] = label
        add([over], label, over)
        label += 1
    if ends.channel is not None:
        opening, closing, label = label, label + 1, label + 2
        classes[list(ends.channel)] = opening, closing
        others = (classes < 0) & spelling.named
        classes[others] = label
        label += bool(others.any())
        thinking, states = states, states + 1
        add([thinking], [one for one in range(label) if one not in (ending, closing)], thinking)
        add([thinking], closing, 0)
        if ends.open:
            start = thinking
        else:
            start, states = states, states + 1
            so_far = np.concatenate(edges)
            edges.append(np.where([True, False, False], start, so_far[so_far[:, 0] == 0]))
            add([start], opening, thinking)
    final = np.zeros(states, bool)
    final[:count] = accepting
    final[over] = True
    final[start] = accepting[0] and not (ends.channel is not None and ends.open)
    return _record(classes, label, np.concatenate(edges), start, final)


def _record(classes: np.ndarray, count: int, edges: np.ndarray, start: int, accepting: np.ndarray) -> TokenAutomaton:
    """Order classes by first token and edges by source and label."""
    tokens = np.flatnonzero(classes >= 0)
    found, at = np.unique(classes[tokens], return_index=True)
    numbers = np.full(count + 1, -1, np.int64)
    numbers[found[np.argsort(at)]] = np.arange(len(found))
    sources, labels, targets = edges.T
    labels = numbers[labels]
    order = np.lexsort((labels, sources))
    as_int32 = [one[order].astype(np.int32) for one in (sources, labels, targets)]
    return TokenAutomaton(
        classes=numbers[classes].astype(np.int32),
        count=len(found),
        sources=as_int32[0],
        labels=as_int32[1],
        targets=as_int32[2],
        states=len(accepting),
        start=start,
        accepting=accepting,
    )
