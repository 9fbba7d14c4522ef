"""Strategies for the fuzzers: JSON that nobody would write, and files that something has damaged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from dgemma.core.errors import DgemmaError
from said import check_line

# A hang must fail, a slow machine must not: an example takes milliseconds.
many = settings(max_examples=120, deadline=timedelta(seconds=10))
some = settings(max_examples=40, deadline=timedelta(seconds=10))

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates and line separators included
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 10**400, -(2**63)]),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JSON = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)


def attempt(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or None where it raised the one error in the one form that is allowed."""
    try:
        return call()
    except DgemmaError as error:
        check_line(error)
        return None


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


@st.composite
def mutated(draw: st.DrawFn, originals: list[Any], junk: st.SearchStrategy[Any] = JSON) -> Any:
    """A JSON value with some places changed, removed, doubled or added."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(value))):
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "delete", "add", "swap"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(junk))
            case "delete":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(TEXT)] = copy.deepcopy(draw(junk))
            case "add":
                holder.insert(0, copy.deepcopy(draw(junk)))
            case "swap":
                other, name = draw(st.sampled_from(found))
                if name in other if isinstance(other, dict) else name < len(other):
                    holder[key] = copy.deepcopy(other[name])
    return value


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes with some flipped, cut, doubled or overwritten."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "write", "length"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 8, 1 << 20]))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=9))
            case "write":
                new = draw(st.binary(min_size=1, max_size=8))
                data[at : at + len(new)] = new
            case "length":
                lengths = [0, 1, 2**31, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(data), len(data) - 8]
                data[:8] = (draw(st.sampled_from(lengths)) % 2**64).to_bytes(8, "little")
    return bytes(data)
