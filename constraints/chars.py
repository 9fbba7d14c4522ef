"""Deterministic automata over characters: made of a pattern, or given by a user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import DgemmaError, quoted
from .minimal import equal_rows, minimal
from .patterns import SMALLER, Nfa, nfa_of
from .sets import LAST, Intervals, complement

LARGEST = 50_000
"""States of a deterministic automaton over characters."""

Config = tuple[int, frozenset[tuple[int, int]]]
"""A state, and what lookaheads still ask of the text from here on: number of the lookahead, its own state."""

_NOTHING: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class CharDfa:
    """A deterministic automaton over characters, as small as it can be.

    Characters that no state tells apart are one *atom*.
    """

    atoms: np.ndarray
    """int32 [0x110000]: the atom of each code point, −1 where no state takes it."""

    table: np.ndarray
    """int32 [S, A]: the next state, −1 where there is none."""

    start: int
    accepting: np.ndarray
    """bool [S]"""

    def matches(self, text: str) -> bool:
        """Whether the whole text is accepted."""
        state = self.start
        for character in text:
            atom = self.atoms[ord(character)]
            state = int(self.table[state, atom]) if atom >= 0 else -1
            if state < 0:
                return False
        return bool(self.accepting[state])


class _Machine:
    """An `Nfa` walked in all of its states at once; sets of configurations are numbered as they are met.

    A lookahead is a machine of its own that runs along: what it asks is part of a configuration until it is satisfied
    or refused.

    Args:
        holds: of each set, the atoms in it.
        loops: for a lookahead, which is satisfied however the text goes on.
    """

    def __init__(self, nfa: Nfa, sets: dict[Intervals, int], holds: list[frozenset[int]], loops: bool) -> None:
        self.nfa, self.holds, self.loops = nfa, holds, loops
        self.numbers = [sets[found] for found in nfa.sets]  # of the sets of this automaton among all sets
        self.ahead = [_Machine(inner, sets, holds, True) for inner, _ in nfa.ahead]
        self.sets: list[frozenset[Config]] = []
        self.known: dict[frozenset[Config], int] = {}
        self.closures: dict[tuple[int, bool], tuple[Config, ...]] = {}
        self.passed: dict[int, set[int]] = {}  # states that a closure comes by with nothing asked
        self.steps: dict[tuple[int, int], int] = {}

    def number(self, found: frozenset[Config]) -> int:
        """Return the number of a set of configurations, −1 of the empty one."""
        if not found:
            return -1
        if found not in self.known:
            self.known[found] = len(self.sets)
            self.sets.append(found)
        return self.known[found]

    def begin(self, at_start: bool) -> int:
        return self.number(frozenset(self.closure(self.nfa.start, at_start)))

    def closure(self, state: int, at_start: bool = False) -> tuple[Config, ...]:
        """Return what can be reached without a character, where characters, the end or acceptance follow."""
        if (state, at_start) not in self.closures:
            nfa, todo, seen = self.nfa, [(state, _NOTHING)], {(state, _NOTHING)}
            for one, asked in todo:
                further = nfa.free[one] + (nfa.begins[one] if at_start else [])
                steps = [(target, asked) for target in further]
                for number, target in nfa.asks[one]:
                    more = self.asked(number, self.ahead[number].begin(at_start))
                    if more is not None:
                        steps.append((target, asked | more))
                for step in steps:
                    if step not in seen:
                        seen.add(step)
                        todo.append(step)
            kept = (one for one in todo if nfa.arcs[one[0]] or nfa.ends[one[0]] or one[0] == nfa.final)
            self.closures[state, at_start] = tuple(kept)
            self.passed.setdefault(state, set()).update(one for one, asked in todo if not asked)
        return self.closures[state, at_start]

    def asked(self, number: int, state: int) -> frozenset[tuple[int, int]] | None:
        """Return what a lookahead in some state of its own still asks; None where the text has failed it."""
        machine, wanted = self.ahead[number], self.nfa.ahead[number][1]
        if state < 0:
            return None if wanted else _NOTHING
        if (machine.nfa.final, _NOTHING) in machine.sets[state]:
            return _NOTHING if wanted else None
        return frozenset({(number, state)})

    def later(self, asked: frozenset[tuple[int, int]], atom: int) -> frozenset[tuple[int, int]] | None:
        """Return what is still asked behind a character of an atom."""
        found = _NOTHING
        for number, state in asked:
            more = self.asked(number, self.ahead[number].step(state, atom))
            if more is None:
                return None
            found |= more
        return found

    def step(self, state: int, atom: int) -> int:
        """Return the number of the next set of configurations."""
        if (state, atom) not in self.steps:
            found: set[Config] = set()
            for one, asked in self.sets[state]:
                targets = [t for number, t in self.nfa.arcs[one] if atom in self.holds[self.numbers[number]]]
                if self.loops and one == self.nfa.final:
                    targets.append(one)
                after = self.later(asked, atom) if targets and asked else _NOTHING
                if after is not None:
                    for target in targets:
                        found.update((t, more | after) for t, more in self.closure(target))
            self.steps[state, atom] = self.number(frozenset(found))
        return self.steps[state, atom]

    def row(self, state: int, masks: list[int]) -> list[int]:
        """Return the next set of configurations on every atom.

        Args:
            masks: of each atom, the sets that it is in, as bits. Atoms that no set in use tells apart lead to one.
        """
        if any(asked for _, asked in self.sets[state]):
            return [self.step(state, atom) for atom in range(len(masks))]
        arcs = [(1 << self.numbers[number], t) for one, _ in self.sets[state] for number, t in self.nfa.arcs[one]]
        used = 0
        for bit, _ in arcs:
            used |= bit
        known: dict[int, int] = {0: -1}
        found = []
        for mask in masks:
            if (shared := mask & used) not in known:
                reached: set[Config] = set()
                passed: set[int] = set()
                for target in sorted({t for bit, t in arcs if bit & shared}):
                    if target not in passed:  # else all that it leads to is there
                        reached.update(self.closure(target))
                        passed |= self.passed[target]
                known[shared] = self.number(frozenset(reached))
            found.append(known[shared])
        return found

    def accepts(self, state: int, at_start: bool = False) -> bool:
        """Whether the text may end here."""
        todo = list(self.sets[state])
        seen = set(todo)
        for one, asked in todo:
            if one == self.nfa.final and self.satisfied(asked):
                return True
            for target in self.nfa.ends[one]:
                for further, more in self.closure(target, at_start):
                    if (further, more | asked) not in seen:
                        seen.add((further, more | asked))
                        todo.append((further, more | asked))
        return False

    def satisfied(self, asked: frozenset[tuple[int, int]]) -> bool:
        """Whether what is asked is there although nothing more comes."""
        return all(self.ahead[number].accepts(state) == self.nfa.ahead[number][1] for number, state in asked)


def from_pattern(pattern: str) -> CharDfa:
    """Compile a regular expression of Python's; what it matches is what `re.fullmatch` does.

    `^` and `$` are the ends of the whole answer. Lookaheads are known; what no finite automaton does is refused.

    Raises:
        DgemmaError: no pattern, one that cannot be done, one with too many states, or one that matches nothing.
    """
    nfa = nfa_of(pattern)
    sets: dict[Intervals, int] = {}
    _collect(nfa, sets)
    atoms, holds = partition(list(sets))
    count = 1 + max((atom for found in holds for atom in found), default=-1)
    machine = _Machine(nfa, sets, holds, False)
    start = machine.begin(True)
    ends_first = start >= 0 and machine.accepts(start, True)
    masks = [sum(1 << number for number, found in enumerate(holds) if atom in found) for atom in range(count)]
    rows: list[list[int]] = []
    if start >= 0:
        # The beginning is a state that nothing comes back to: there alone may ^ stand.
        rows.append(machine.row(start, masks))
        for i in range(LARGEST + 1):
            if i == len(machine.sets):
                break
            rows.append(machine.row(i, masks))
        if len(machine.sets) > LARGEST:
            raise DgemmaError(f"the pattern needs more than {LARGEST:,} states; {SMALLER}")
    table = np.full((max(len(rows), 1), count), -1, np.int32)
    if count and rows:
        table[:] = rows
        table[table >= 0] += 1
    accepting = np.array([ends_first, *(machine.accepts(i) for i in range(len(table) - 1))])
    return _smallest(atoms, table, 0, accepting, f"the pattern {quoted(pattern, 60)}")


def from_states(
    *,
    start: Any,
    accepting: Iterable[Any],
    transitions: Mapping[Any, Mapping[str, Any]],
    default: Mapping[Any, Any] | None = None,
) -> CharDfa:
    """Return a user's own automaton.

    Args:
        start: a state. States are whatever can be a key of a mapping.
        accepting: states in which the answer may be over.
        transitions: of each state, the next state by character. A key of several characters stands for each of them.
        default: of some states, where every other character leads.

    Raises:
        DgemmaError: of other shapes, a start that is no state, or an automaton that accepts nothing.
    """
    try:
        ways = {state: dict(found) for state, found in transitions.items()}
        others = dict(default or {})
        ends = set(accepting)
        names = dict.fromkeys(
            [start, *ways, *others, *others.values(), *(t for found in ways.values() for t in found.values())]
        )
    except (TypeError, ValueError, AttributeError):
        raise DgemmaError(
            "the automaton is of another shape; expected start, accepting states and {state: {characters: state}}"
        ) from None
    if len(names) > LARGEST:
        raise DgemmaError(f"the automaton has {len(names):,} states, more than {LARGEST:,}")
    numbers = {name: i for i, name in enumerate(names)}
    if unknown := next((name for name in ends if name not in numbers), None):
        raise DgemmaError(f"the automaton accepts in {quoted(unknown, 40)}, which is none of its states")
    bad = next((key for found in ways.values() for key in found if not isinstance(key, str) or not key), None)
    if bad is not None:
        raise DgemmaError(f"the automaton has an edge on {quoted(bad, 40)}, expected characters")
    used = sorted({ord(c) for found in ways.values() for key in found for c in key} - set(range(0xD800, 0xE000)))
    spans: list[Intervals] = [((code, code),) for code in used]
    atoms, _ = partition([*spans, complement(tuple(span for found in spans for span in found))])
    table = np.full((len(names), len(spans) + 1), -1, np.int32)
    for state, target in others.items():
        table[numbers[state]] = numbers[target]
    for state, found in ways.items():
        seen: set[str] = set()
        for key, target in found.items():
            for character in set(key) - {c for c in key if 0xD800 <= ord(c) < 0xE000}:
                if character in seen:
                    raise DgemmaError(f"the automaton's state {quoted(state, 40)} has two edges on {quoted(character)}")
                seen.add(character)
                table[numbers[state], atoms[ord(character)]] = numbers[target]
    return _smallest(atoms, table, numbers[start], np.array([name in ends for name in names]), "the automaton")


def partition(sets: list[Intervals]) -> tuple[np.ndarray, list[frozenset[int]]]:
    """Divide characters into atoms that no set divides → int32 [0x110000], −1 in no set; the atoms of each set."""
    cuts = np.unique([0, LAST + 1, *(edge for found in sets for first, last in found for edge in (first, last + 1))])
    members: list[list[int]] = [[] for _ in cuts]
    for number, found in enumerate(sets):
        for first, last in found:
            for i in range(int(np.searchsorted(cuts, first)), int(np.searchsorted(cuts, last + 1))):
                members[i].append(number)
    known: dict[tuple[int, ...], int] = {}
    numbers = [known.setdefault(tuple(found), len(known)) if found else -1 for found in members[:-1]]
    holds = [frozenset(atom for found, atom in known.items() if number in found) for number in range(len(sets))]
    return np.repeat(np.array(numbers, np.int32), np.diff(cuts)), holds


def _collect(nfa: Nfa, sets: dict[Intervals, int]) -> None:
    for found in nfa.sets:
        sets.setdefault(found, len(sets))
    for inner, _ in nfa.ahead:
        _collect(inner, sets)


def _smallest(atoms: np.ndarray, table: np.ndarray, start: int, accepting: np.ndarray, what: str) -> CharDfa:
    try:
        table, start, accepting = minimal(table, start, accepting)
    except ValueError:
        raise DgemmaError(f"{what} matches no text at all") from None
    if table.shape[1]:
        firsts, groups = equal_rows(table.T)
        table = table[:, firsts]
        atoms = np.append(np.where(np.any(table >= 0, axis=0)[groups], groups, -1), -1)[atoms]
    runs = np.append(0, np.flatnonzero(np.diff(atoms)) + 1)  # of a million characters, where something changes
    found, at = np.unique(atoms[runs], return_index=True)
    order = found[np.argsort(at)]
    order = order[order >= 0]
    numbers = np.full(table.shape[1] + 1, -1, np.int32)
    numbers[order] = np.arange(len(order))
    # Atoms are in the order of their first characters, and states in that of a search by breadth.
    table, start, accepting = (
        minimal(table[:, order], start, accepting) if len(order) else (table[:, :0], start, accepting)
    )
    return CharDfa(atoms=numbers[atoms], table=table, start=start, accepting=accepting)
