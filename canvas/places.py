"""A template with places to be read, as tokens: what is held, and what may stand in each place.

A text is tokenized with each choice in its place, since what stands beside a choice may share a token with it (a space
before a word, where words have their spaces in front). What all of these have in common with the text around the place
is held; what differs is the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import DgemmaError, quoted

MARKER = "<read>"

Encode = Callable[[str], list[int]]
Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place of a template, in tokens."""

    start: int
    choices: tuple[str, ...]
    strings: tuple[Tokens, ...]
    """What each choice puts there, from `start` on."""

    @property
    def even(self) -> bool:
        """Whether all choices take the same number of tokens."""
        return len(set(map(len, self.strings))) == 1

    @property
    def longest(self) -> int:
        return max(map(len, self.strings))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A template in tokens: its places, and what it is with the first choice in each."""

    tokens: Tokens
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        only = self.places[0]
        return len(self.tokens) if only.even else len(self.tokens) - len(only.strings[0]) + only.longest

    @property
    def behind(self) -> Tokens:
        """What stands behind the only place."""
        only = self.places[0]
        return self.tokens[only.start + len(only.strings[0]) :]


def lay_out(template: str, choices: Sequence[Sequence[str]], encode: Encode) -> Layout:
    """Tokenize a template with one or more places, each with choices of its own.

    Raises:
        DgemmaError: choices that are the same tokens, or, where there are several places, of different lengths.
    """
    parts = template.split(MARKER)
    if len(parts) - 1 != len(choices):
        raise DgemmaError(
            f"the template has {len(parts) - 1} places ({MARKER}) and choices are given for {len(choices)}; give one "
            "list for all, or one for each"
        )
    firsts = [some[0] for some in choices]
    tokens = encode(_filled(parts, firsts))
    places = []
    for i, some in enumerate(choices):
        name = "choices" if len(choices) == 1 else f"choices of place {i + 1}"
        place = _place(parts, firsts, i, some, encode, name)
        if len(choices) > 1 and not place.even:
            sizes = ", ".join(f"{quoted(one, 30)} {len(ids)}" for one, ids in zip(some, place.strings, strict=True))
            raise DgemmaError(
                f"{name} are of different lengths in tokens ({sizes[:200]}), which only one place alone may have; read "
                "the places one by one, or take choices of one length"
            )
        if places and place.start < places[-1].start + places[-1].longest:
            raise DgemmaError(f"{name}: the place shares a token with the one before; put text between them")
        places.append(place)
    return Layout(tokens=tuple(tokens), places=tuple(places))


def _place(
    parts: Sequence[str], firsts: Sequence[str], index: int, choices: Sequence[str], encode: Encode, name: str
) -> Place:
    """Return one place, the others with their first choice in them."""
    before = _filled(parts[: index + 1], firsts[:index])
    after = _filled(parts[index + 1 :], firsts[index + 1 :])
    head, tail = encode(before) if before else [], encode(after) if after else []
    full = [encode(before + one + after) for one in choices]
    start = min(in_common(head, ids) for ids in full)
    end = min(in_common(tail[::-1], ids[::-1]) for ids in full)
    end = min(end, min(map(len, full)) - start)
    strings = tuple(tuple(ids[start : len(ids) - end]) for ids in full)
    empty = next((one for one, ids in zip(choices, strings, strict=True) if not ids), None)
    if empty is not None:
        raise DgemmaError(f"{name}: {quoted(empty)} has no token of its own where it stands")
    seen: dict[Tokens, str] = {}
    for one, ids in zip(choices, strings, strict=True):
        if ids in seen:
            raise DgemmaError(f"{name}: {quoted(seen[ids])} and {quoted(one)} are the same tokens")
        seen[ids] = one
    return Place(start=start, choices=tuple(choices), strings=strings)


def _filled(parts: Sequence[str], fillings: Sequence[str]) -> str:
    return "".join(a + b for a, b in zip(parts, [*fillings, ""], strict=True))


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
