"""Regular expressions as Python writes them, as automata that may be in several states at once.

The grammar is Python's own: `re` parses the pattern, so that what `re.fullmatch` accepts is what is accepted here,
Unicode's letters, digits and spaces, flags and case included. What is done here is the step from the tree to states.

`\\d` is hundreds of digits then, and where characters are spelled in bytes a state for each of their beginnings:
`[0-9]`, or the flag `(?a)`, keeps an automaton small.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from re import _constants as sre  # type: ignore[attr-defined]  # the parser has no public name, and no other has its words
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from ..core.errors import DgemmaError, quoted
from .sets import Intervals, category, complement, folded, union

LARGEST = 100_000
"""States before they are made deterministic: what a pattern may come to with its repeats written out."""

SMALLER = "bound its repeats lower, or give fewer alternatives"

HINTS = {"bad escape \\p": "; classes of Unicode properties are not known here: write the characters as [...]"}

_NAMES = {
    sre.GROUPREF: "a backreference such as \\1",
    sre.GROUPREF_EXISTS: "a conditional (?(1)...|...)",
    sre.ATOMIC_GROUP: "an atomic group (?>...)",
    sre.POSSESSIVE_REPEAT: "a possessive quantifier such as *+",
    sre.AT_BOUNDARY: "a word boundary \\b",
    sre.AT_NON_BOUNDARY: "\\B",
}

Read = Callable[[Any, bool], Intervals]
"""How a category such as `\\d` is read: its name, whether it stands in a negated set → the characters."""


class Nfa:
    """States with edges on sets of characters, and edges that take none.

    Args:
        read: what categories mean, and `.`; the flags of the pattern decide where it is None.
    """

    def __init__(self, read: Read | None = None) -> None:
        self.read = read
        self.free: list[list[int]] = []
        """Of each state: where it leads without a character."""
        self.begins: list[list[int]] = []
        """Where it leads at the beginning of the text alone."""
        self.ends: list[list[int]] = []
        """Where it leads at the end of the text alone."""
        self.arcs: list[list[tuple[int, int]]] = []
        """Number of a set, and where a character of it leads."""
        self.asks: list[list[tuple[int, int]]] = []
        """Number of a lookahead, and where it leads if that is satisfied."""
        self.sets: dict[Intervals, int] = {}
        self.ahead: list[tuple[Nfa, bool]] = []
        """Lookaheads, and whether they are wanted or unwanted."""
        self.start = self.state()
        self.final = self.start

    def state(self) -> int:
        if len(self.free) >= LARGEST:
            raise DgemmaError(f"the pattern comes to more than {LARGEST:,} states; {SMALLER}")
        for lists in (self.free, self.begins, self.ends, self.arcs, self.asks):
            lists.append([])
        return len(self.free) - 1

    def characters(self, found: Intervals, start: int) -> int:
        end = self.state()
        self.arcs[start].append((self.sets.setdefault(found, len(self.sets)), end))
        return end

    def sequence(self, nodes: Any, flags: int, start: int) -> int:
        """Add what is one after the other from a state on → the state behind it."""
        for op, value in nodes:
            start = self.node(op, value, flags, start)
        return start

    def node(self, op: Any, value: Any, flags: int, start: int) -> int:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return self.characters(self.set_of(op, value, flags), start)
        if op is sre.BRANCH:
            end = self.state()
            for branch in value[1]:
                self.free[self.sequence(branch, flags, self.fork(start))].append(end)
            return end
        if op is sre.SUBPATTERN:
            _, added, dropped, inner = value
            return self.sequence(inner, (flags | added) & ~dropped, start)
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):  # the greedy and the lazy take part in the same whole matches
            least, most, inner = value
            return self.repeat(least, most, inner, flags, start)
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            direction, inner = value
            return self.lookahead(op is sre.ASSERT, direction, inner, flags, start)
        if op is sre.FAILURE:
            return self.state()
        if op is sre.AT:
            return self.anchor(value, flags, start)
        raise DgemmaError(
            f"the pattern has {_NAMES.get(op, str(op).lower())}, which no finite automaton can do; drop it"
        )

    def fork(self, start: int) -> int:
        made = self.state()
        self.free[start].append(made)
        return made

    def repeat(self, least: int, most: int, nodes: Any, flags: int, start: int) -> int:
        for _ in range(least):
            start = self.sequence(nodes, flags, start)
        end = self.state()
        if most is sre.MAXREPEAT:
            round_ = self.fork(start)
            self.free[self.sequence(nodes, flags, self.fork(round_))].append(round_)
            self.free[round_].append(end)
            return end
        for _ in range(least, most):
            self.free[start].append(end)
            start = self.sequence(nodes, flags, self.fork(start))
        self.free[start].append(end)
        return end

    def lookahead(self, wanted: bool, direction: int, nodes: Any, flags: int, start: int) -> int:
        if direction < 0:
            raise DgemmaError("the pattern has a lookbehind (?<...), which is not known here; say it from the left")
        inner = Nfa(self.read)
        inner.final = inner.sequence(nodes, flags, inner.start)
        end = self.state()
        self.asks[start].append((len(self.ahead), end))
        self.ahead.append((inner, wanted))
        return end

    def anchor(self, value: Any, flags: int, start: int) -> int:
        if value in _NAMES:
            raise DgemmaError(
                f"the pattern has {_NAMES[value]}, which is not known here; write out what may stand there"
            )
        if flags & re.MULTILINE and value in (sre.AT_BEGINNING, sre.AT_END):
            raise DgemmaError("the pattern has ^ or $ of lines, by the flag m; write \\n where a line ends")
        if value is sre.AT_END:  # which is before a last line end too
            return self.lookahead(True, 1, tree(r"\n?\Z"), 0, start)
        end = self.state()
        lists = self.begins if value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING) else self.ends
        lists[start].append(end)
        return end

    def set_of(self, op: Any, value: Any, flags: int) -> Intervals:
        """Return the characters that a node of one character matches."""
        if op is sre.ANY:
            if self.read is not None:
                return self.read(sre.ANY, False)
            return complement(() if flags & re.DOTALL else ((10, 10),))
        parts = value if op is sre.IN else [(sre.LITERAL, value)]
        negated = op is sre.NOT_LITERAL or (bool(parts) and parts[0][0] is sre.NEGATE)
        found: list[Intervals] = []
        for kind, one in parts:
            if kind is sre.CATEGORY:
                found.append(self.read(one, negated) if self.read else category(one, bool(flags & re.ASCII)))
            elif kind is not sre.NEGATE:
                span = one if kind is sre.RANGE else (one, one)
                found.append(folded(span, flags & re.ASCII) if flags & re.IGNORECASE else (span,))
        whole = union(found)
        return complement(whole) if negated else union([whole])


def tree(pattern: str, flags: int = 0, what: str = "the pattern") -> Any:
    """Parse a pattern → the tree of `re`, with its flags at `.state.flags`.

    Raises:
        DgemmaError: no text, or no regular expression: why and where.
    """
    if not isinstance(pattern, str):
        raise DgemmaError(f"{what} is a {type(pattern).__name__}, expected the text of a regular expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that another release of Python may read otherwise
            return _parser.parse(pattern, flags)
    except (re.error, OverflowError, ValueError) as error:
        said = str(error).partition("\n")[0]
        hint = next((hint for start, hint in HINTS.items() if said.startswith(start)), "")
        raise DgemmaError(f"{what} {quoted(pattern, 60)} is no regular expression: {said}{hint}") from None
    except RecursionError:
        raise DgemmaError(f"{what} {quoted(pattern, 40)} is nested too deeply; make it flatter") from None


def nfa_of(pattern: str) -> Nfa:
    """Return the automaton of a pattern.

    Raises:
        DgemmaError: no regular expression, or one with what a finite automaton cannot do, by name.
    """
    parsed = tree(pattern)
    found = Nfa()
    try:
        found.final = found.sequence(parsed, parsed.state.flags, found.start)
    except RecursionError:
        raise DgemmaError(f"the pattern {quoted(pattern, 40)} is nested too deeply; make it flatter") from None
    return found
