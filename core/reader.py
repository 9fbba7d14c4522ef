"""Reading a JSON object key by key, so that nothing in it is dropped in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import DgemmaError, quoted
from .hf_keys import Table, ineffective

MAX_SIZE = 1 << 31  # any dimension beyond this is a corrupt file, not a model


class Reader:
    """A JSON object whose keys are taken one by one, so that what is left over can be refused.

    Args:
        data: the object.
        where: the file, and the path within it, that messages begin with.
        nulls: the keys of which a null is a value; else it is as if the key were not there.
    """

    def __init__(self, data: Any, where: str, *, nulls: tuple[str, ...] = ()) -> None:
        if not isinstance(data, Mapping):
            raise DgemmaError(f"{where}: expected an object, found {show(data)}")
        self.data = {key: value for key, value in data.items() if value is not None or key in nulls}
        self.where = where
        self.path = ""
        self.ignored = [str(key) for key, value in data.items() if value is None and key not in nulls]
        """Keys that were left out because they change nothing, those of children with their path."""

    def child(self, key: str, data: Any, *, nulls: tuple[str, ...] = ()) -> Reader:
        where = f"{self.where}: {key if key.isidentifier() and len(key) < 40 else quoted(key, 40)}"
        result = Reader(data, where, nulls=nulls)
        result.path = f"{self.path}{key}."
        self.ignored += [f"{result.path}{one}" for one in result.ignored]
        result.ignored = self.ignored
        return result

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.data and not default:
            raise DgemmaError(f"{self.where}: the key {key!r} is missing")
        return self.data.pop(key, *default)

    def ignore(self, table: Table) -> None:
        """Leave out what is still there and, by a table of `hf_keys.py`, changes nothing."""
        for key in [key for key, value in self.data.items() if ineffective(str(key), value, table)]:
            del self.data[key]
            self.ignored.append(f"{self.path}{key}")

    def integer(self, key: str, *default: int, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.take(key, *default)
        if isinstance(value, float) and value.is_integer():  # 48.0, which some writers make of 48
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise DgemmaError(f"{self.where}: {key} is {show(value)}, expected an integer from {low} to {high}")
        return value

    def number(self, key: str, *default: float, low: float = -math.inf, above: bool = False) -> float:
        value = self.take(key, *default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared, not converted: an integer may be too large for a float, and NaN fails every comparison.
        if not good or not low <= value <= 1e300 or (above and value == low):
            bound = "" if low == -math.inf else f" {'above' if above else 'from'} {low}"
            raise DgemmaError(f"{self.where}: {key} is {show(value)}, expected a finite number{bound}")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Take one id, a list of them, or null, without repetitions; -1, and null in a list, are no id."""
        value = self.take(key, None)
        ids: list[Any] = value if isinstance(value, list) else [value]
        ids = [int(i) if isinstance(i, float) and i.is_integer() else i for i in ids if i is not None]
        ids = [i for i in ids if isinstance(i, bool) or i != -1]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_SIZE for i in ids):
            raise DgemmaError(f"{self.where}: {key} is {show(value)}, expected a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def only(self, key: str, *supported: Any, advice: str = "") -> None:
        """Accept a key only with a value that the graph implements; a missing key has the first."""
        value = self.take(key, supported[0])
        if not any(type(value) is type(one) and value == one for one in supported):
            expected = " or ".join(json.dumps(one) for one in supported)
            raise DgemmaError(f"{self.where}: {key} is {show(value)}; this runtime supports {expected}{advice}")

    def finish(self) -> None:
        if self.data:
            keys = sorted(self.data, key=str)
            named = ", ".join(quoted(key, 40) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise DgemmaError(f"{self.where}: unknown key {named}; a newer format needs a newer dgemma")


def show(value: Any) -> str:
    """Return a value from a file as it stands there, on one line and short."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest ones
    try:
        text = json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def jsonable(value: Any) -> Any:
    """Return a tree of values with None for NaN and infinity, such as a broken model's, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: jsonable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
