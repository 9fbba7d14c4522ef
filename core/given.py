"""What callers give, checked: token ids, integers, paths; and figures as messages show them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import DgemmaError, quoted
from .reader import show


def check_path(path: Any, what: str) -> None:
    """Refuse what is no path.

    Raises:
        DgemmaError: neither text nor a path of text.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise DgemmaError(f"{what} is {quoted(path)}, expected a path")


def check_flags(**flags: Any) -> None:
    """Refuse what is neither True nor False; by their truth, `"no"` and `"false"` would be yes.

    Raises:
        DgemmaError: the first that is not.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise DgemmaError(f"{name} is {quoted(value, 40)}, expected True or False")


def check_call(progress: Any) -> None:
    """Refuse a `progress` that cannot be called.

    Raises:
        DgemmaError: so it is.
    """
    if progress is not None and not callable(progress):
        raise DgemmaError(f"progress is {quoted(progress, 40)}, expected a function")


def figure(count: int) -> str:
    """Return a count in the largest unit of three digits: 1.23 M."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def ids_of(values: Any, what: str) -> list[int]:
    """Accept any sequence or array of integers."""
    try:
        array = np.asarray(values)
    except Exception:  # whatever the conversions of other libraries' arrays raise
        array = np.asarray("ragged")
    if array.size == 0:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu":
        more = {"the prompt": "text, chat messages or ", "init": "text or "}.get(what, "")
        raise DgemmaError(f"{what}: expected {more}a flat sequence of token ids")
    return [int(i) for i in array]


def integer(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no integer from `low` to `high`.

    Raises:
        DgemmaError: so it is.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise DgemmaError(f"{name} is {show(value)}, expected an integer from {low} to {high}")


def number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number from `low` to `high`.

    Raises:
        DgemmaError: so it is.
    """
    known = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not known or not low <= value <= high:
        raise DgemmaError(f"{name} is {show(value)}, expected a number from {low} to {high}")


def held_of(value: Any, vocab_size: int, budget: int) -> tuple[int, ...]:
    """Return held tokens by position of an answer, −1 where one is free, of a mapping or of a sequence.

    Raises:
        DgemmaError: neither, a position that an answer of `budget` tokens does not have, or an id that does not exist.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        for at in value:
            integer("a position of held", at, 0, 1 << 31)
        given = {int(at): token for at, token in value.items()}
    else:
        given = dict(enumerate(ids_of(value, "held")))
    for token in given.values():
        integer("a token of held", token, -1, vocab_size - 1)
    fixed = {at: int(token) for at, token in given.items() if token >= 0}
    if (last := max(fixed, default=-1)) >= budget:
        raise DgemmaError(f"held has a token at position {last}, and there is room for {budget}: raise max_new_tokens")
    return tuple(fixed.get(at, -1) for at in range(last + 1))
