"""Strings of JSON as regular expressions over how they are written: quotes, escapes, patterns and formats."""

from __future__ import annotations

import re
from re import _constants as sre  # type: ignore[attr-defined]
from typing import Any

from ..core.errors import DgemmaError, quoted
from .chars import from_pattern
from .minimal import lengths
from .patterns import Nfa, tree
from .sets import Intervals, category, complement, intersection, union

CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\bfnrt])'
"""One character: everything but quote, backslash and control characters as it is, those that have one by their letter.
`\\u0041` is not written, which would be a dozen states in each place of a string, nor `\\/`, which nothing needs."""

ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}

_RAW = complement(((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))
_LINES = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_POSITIVE = {
    sre.CATEGORY_DIGIT: (sre.CATEGORY_DIGIT, False),
    sre.CATEGORY_SPACE: (sre.CATEGORY_SPACE, False),
    sre.CATEGORY_WORD: (sre.CATEGORY_WORD, False),
    sre.CATEGORY_NOT_DIGIT: (sre.CATEGORY_DIGIT, True),
    sre.CATEGORY_NOT_SPACE: (sre.CATEGORY_SPACE, True),
    sre.CATEGORY_NOT_WORD: (sre.CATEGORY_WORD, True),
}


def string(least: int, most: int | None, patterns: tuple[str, ...], form: str | None, where: str) -> str | None:
    """Return strings in quotes; None where there are none.

    Args:
        least, most: characters.
        patterns: a schema's; found anywhere in the string, unless they hold `^` and `$`.
        form: a schema's format.
        where: in the schema, for messages.

    Raises:
        DgemmaError: a pattern or a format that is not known.
    """
    if most is not None and least > most:
        return None
    contents = [spelled(one, where) for one in patterns]
    if form is not None:
        contents.append(formatted(form, where))
    if not contents or not _within(contents[-1], least, most):
        contents.append(CHARACTER + counted(least, most))
    *asked, last = contents
    return '"' + "".join(f'(?={one}")' for one in asked) + last + '"'


def counted(least: int, most: int | None) -> str:
    """Return a quantifier."""
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return "?" if (least, most) == (0, 1) else f"{{{least},{most}}}" if least != most else f"{{{least}}}"


def _within(content: str, least: int, most: int | None) -> bool:
    """Whether what a pattern allows has the right length already."""
    if least == 0 and most is None:
        return True
    found = from_pattern(content)
    if any(found.atoms[ord(c)] >= 0 for c in '"\\'):  # escapes are longer than what they say, and lookaheads see quotes
        return False
    shortest, longest = lengths(found.table, found.start, found.accepting)
    return least <= shortest and (most is None or (longest is not None and longest <= most))


def spelled(pattern: str, where: str) -> str:
    """Return a schema's pattern over how strings are written in JSON.

    Dialects differ in `.`, `\\d`, `\\w` and `\\s`, ECMAScript's from Python's: what all have in common is taken.

    Raises:
        DgemmaError: no regular expression, or one with what cannot be done.
    """
    what = f"the schema's pattern at {where}"
    parsed = tree(pattern, what=what)
    return _Spelled(what, parsed.state.flags).searched(parsed)


class _Spelled:
    """Writes a pattern's tree again, character by character in JSON's spelling."""

    def __init__(self, what: str, flags: int) -> None:
        self.what, self.flags = what, flags
        self.begins = False
        self.nfa = Nfa(_common)

    def searched(self, nodes: Any) -> str:
        """The pattern anywhere in a string: behind its beginning only where it does not ask for that."""
        free = f"{CHARACTER}*"
        anchored = self.sequence(nodes, self.flags, "")
        if not self.begins:
            return f"{free}{anchored}{free}" if anchored else free
        if nodes[0] == (sre.AT, sre.AT_BEGINNING) and nodes[len(nodes) - 1] == (sre.AT, sre.AT_END):
            return self.sequence(nodes[1 : len(nodes) - 1], self.flags, None)
        later = self.sequence(nodes, self.flags, "(?!)")
        return f"(?:{anchored}{free}|{CHARACTER}+{later}{free})"

    def sequence(self, nodes: Any, flags: int, begin: str | None) -> str:
        """Args: begin: what `^` is written as, None where it must not stand."""
        parts = []
        for op, value in nodes:
            parts.append(self.node(op, value, flags, begin))
            if op is not sre.AT:
                begin = None
        return "".join(parts)

    def node(self, op: Any, value: Any, flags: int, begin: str | None) -> str:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return one_of(self.nfa.set_of(op, value, flags))
        if op is sre.BRANCH:
            return f"(?:{'|'.join(self.sequence(one, flags, begin) for one in value[1])})"
        if op is sre.SUBPATTERN:
            _, added, dropped, inner = value
            return f"(?:{self.sequence(inner, (flags | added) & ~dropped, begin)})"
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, inner = value
            times = counted(least, None if most is sre.MAXREPEAT else most)
            return f"(?:{self.sequence(inner, flags, None)}){times}"
        if op in (sre.ASSERT, sre.ASSERT_NOT) and value[0] > 0:
            return f"(?{'=' if op is sre.ASSERT else '!'}{self.sequence(value[1], flags, None)})"
        if op is sre.FAILURE:
            return "(?!)"
        if op is sre.AT and value in (sre.AT_END, sre.AT_END_STRING):
            return '(?=")'
        if op is sre.AT and value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING) and begin is not None:
            self.begins = True
            return begin
        name = {sre.AT: "an anchor inside", sre.GROUPREF: "a backreference"}.get(op, str(op).lower())
        raise DgemmaError(f"{self.what} has {name}, which cannot be done; say it without")


def _common(name: Any, negated: bool) -> Intervals:
    """Return what a class of characters is in every dialect; what it is in any of them where it stands negated."""
    if name is sre.ANY:
        return complement(_LINES)
    positive, other = _POSITIVE[name]
    found = [category(positive, True)]
    if negated != other:
        found += [category(positive, False), ((0xFEFF, 0xFEFF),) if positive is sre.CATEGORY_SPACE else ()]
    return complement(union(found)) if other else union(found)


def one_of(found: Intervals) -> str:
    """Return a pattern of one character of a set, as JSON writes it."""
    raw = intersection(found, _RAW)
    parts = [written(raw)] if raw else []
    inside = [code for first, last in found for code in range(first, min(last, 0x5C) + 1)]
    parts += [re.escape("\\" + ESCAPES[code]) for code in inside if code in ESCAPES]
    if not parts:  # control characters without a letter, where nothing else will do
        parts = [rf"\\u{code:04x}" for code in inside if code < 0x20]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts) or '(?!)'})"


def written(found: Intervals) -> str:
    """Return a set as Python's patterns write it."""

    def character(code: int) -> str:
        return chr(code) if code < 0x80 and chr(code).isalnum() else f"\\U{code:08x}"

    if len(found) == 1 and found[0][0] == found[0][1]:
        return character(found[0][0])
    spans = (character(first) + (f"-{character(last)}" if last > first else "") for first, last in found)
    return f"[{''.join(spans)}]"


def formatted(form: str, where: str) -> str:
    """Return what a format allows, narrower than its standard where that is wide: no escapes, no comments.

    Raises:
        DgemmaError: a format that is not known.
    """
    if form in ANYTHING:
        return f"{CHARACTER}*"
    if form not in FORMATS:
        raise DgemmaError(
            f"the schema at {where} has the format {quoted(form, 40)}, which is not known; expected one of "
            f"{', '.join(sorted(FORMATS))}, or a pattern instead"
        )
    return FORMATS[form]


ANYTHING = frozenset({"password", "path", "file-path", "directory-path", "binary", "byte", "json-string"})
"""Formats that say what a string is for and not how it looks."""

_YEAR = "(?!0000)[0-9]{4}"
_LEAP = "(?!0000)(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"


def _run(units: str) -> str:
    """Parts of a duration: from some unit on, none left out before the last one that is named."""
    later = [_run(units[1:])] if units[1:] else []
    first = f"[0-9]{{1,3}}{units[0]}"
    nested = first + "".join(f"(?:[0-9]{{1,3}}{unit}" for unit in units[1:]) + ")?" * len(units[1:])
    return f"(?:{'|'.join([nested, *later])})"


_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,18}[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}\.){{1,3}}[A-Za-z]{{2,12}}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_HEX = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [f"(?:{_HEX}:){{7}}{_HEX}", f"(?:{_HEX}:){{1,7}}:"]
    + [f"(?:{_HEX}:){{1,{7 - n}}}(?::{_HEX}){{1,{n}}}" for n in range(1, 7)]
    + [f":(?:(?::{_HEX}){{1,7}}|:)"]
)
_WORD = "[A-Za-z0-9_+-]{1,24}"

FORMATS = {
    "date": _DATE,
    "time": _CLOCK + _ZONE,
    "date-time": f"{_DATE}T{_CLOCK}{_ZONE}",
    "duration": f"P(?:{_run('YMD')}(?:T{_run('HMS')})?|T{_run('HMS')}|[0-9]{{1,3}}W)",
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "email": rf"{_WORD}(?:\.{_WORD})?@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": f"(?:{_IPV6})",
    "uri": rf"https?://{_HOST}(?::[1-9][0-9]{{0,3}})?(?:/[A-Za-z0-9._~/?&=+,;:@-]{{0,120}})?",
}
"""Of strings: calendar dates that exist, times with their zone, addresses of moderate length."""
