"""Many prompts in, as many answers out: files of JSON lines, one of which grows while the work goes on.

    in     "a prompt"   or   {"prompt": "…", "seed": 3, "id": 17}   or   {"messages": [{"role": …, "content": …}]}
    out    {"line": 1, "key": "…", "id": 17, "text": "…", "thinking": "", "token_ids": […], "finish_reason": …, …}

A result is appended when it is whole and is on the disk before the next is begun. A line that a kill cut short is taken
away when the work goes on. `key` tells what a result answers: prompt, settings and model; one that answers something
else than the line it belongs to is never passed over in silence.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import files
from ..core.errors import DgemmaError, quoted, shown
from ..core.reader import jsonable

ASKED = ("prompt", "messages", "system")
OWN = ("line", "key", "text", "thinking", "token_ids", "finish_reason", "stats")
"""What a result says itself; everything else in it is the input line's own."""
DEEPEST = 100
"""Lists and objects within each other in one line."""
_BEGINS = b'{"line": '
LATER = (
    "canvas_length",
    "thinking_budget",
    "regex",
    "schema",
    "choices",
    "dfa",
    "feedback",
    "init",
    "strength",
    "held",
)
"""Options that are younger than the key: where one is not given, results are those of before it."""
LARGEST = 1 << 32
"""Bytes of results that are read again."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of prompts."""

    line: int
    asked: str | list[dict[str, Any]]
    options: Mapping[str, Any]
    """Settings that hold for it alone."""
    carried: Mapping[str, Any]
    """What else it says, which its result repeats."""

    def key(self, settings: Mapping[str, Any]) -> str:
        """Return what tells that a result answers this line with these settings."""
        given = {**settings, **self.options}
        given = {name: value for name, value in given.items() if name not in LATER or value not in (None, (), [])}
        what = json.dumps([self.asked, given], sort_keys=True, default=list)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def read_items(text: str, where: str, *, options: Collection[str], system: str | None = None) -> list[Item]:
    """Read JSON lines; empty ones are passed over.

    Args:
        options: keys that are settings.
        system: the system prompt of lines that have none of their own.

    Raises:
        DgemmaError: no prompts, or a line that is none; names the line.
    """
    items = [
        _item(number, line, f"{where}: line {number}", options, system)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not items:
        raise DgemmaError(f"{where}: no prompts in it; expected JSON lines with a 'prompt' or 'messages' each")
    return items


def _item(number: int, line: str, where: str, options: Collection[str], system: str | None) -> Item:
    try:
        data = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{where} is not JSON: {quoted(str(error))}") from None
    if isinstance(data, str):
        data = {"prompt": data}
    if not isinstance(data, dict):
        raise DgemmaError(f"{where}: expected a string, or an object with a 'prompt' or 'messages'")
    if _deeper(data, DEEPEST):
        raise DgemmaError(f"{where}: lists and objects within each other more than {DEEPEST} deep")
    if "raw" in data and "raw" not in options:
        raise DgemmaError(f"{where}: raw holds for all lines or for none: leave the key out, and give --raw")
    if "dfa" in data:
        raise DgemmaError(f"{where}: dfa is an automaton in Python, which no line holds; give a regex")
    if clash := [name for name in OWN if name in data]:
        raise DgemmaError(f"{where}: the key {quoted(clash[0])} is one of the result's own; give it another name")
    if ("prompt" in data) == ("messages" in data):
        raise DgemmaError(f"{where}: expected either 'prompt' or 'messages'")
    return Item(
        line=number,
        asked=_asked(data, where, system),
        options={name: _placed(value) if name == "held" else value for name, value in data.items() if name in options},
        carried={name: value for name, value in data.items() if name not in options and name not in ASKED},
    )


def _placed(held: Any) -> Any:
    """Held tokens by position, where JSON has keys of text."""
    if isinstance(held, dict) and all(at.isascii() and at.isdecimal() and len(at) < 20 for at in held):
        return {int(at): token for at, token in held.items()}
    return held


def _asked(data: dict[str, Any], where: str, system: str | None) -> str | list[dict[str, Any]]:
    own = data.get("system", system)
    if not isinstance(own, str | None):
        raise DgemmaError(f"{where}: system is {quoted(own, 40)}, expected text")
    head = [] if own is None else [{"role": "system", "content": own}]
    if "messages" in data:
        messages = data["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise DgemmaError(f"{where}: messages is {quoted(messages, 40)}, expected a list of role and content")
        if "system" in data and messages[0].get("role") == "system":
            raise DgemmaError(f"{where}: two system prompts, 'system' and the first message")
        return messages if messages[0].get("role") == "system" else [*head, *messages]
    prompt = data["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise DgemmaError(f"{where}: prompt is {quoted(prompt, 40)}, expected text")
    return [*head, {"role": "user", "content": prompt}] if head else prompt


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


class Results(AbstractContextManager["Results"]):
    """The file of results, open for more, and nobody else's meanwhile.

    Args:
        path: where it is, or is made.
        keys: the key of each line of prompts.
        force: begin anew, in place of other results; nothing else is ever written over.

    Raises:
        DgemmaError: it cannot be written, holds anything but results, or results of other prompts or settings.
    """

    def __init__(self, path: Path, keys: Mapping[int, str], *, force: bool = False) -> None:
        self.path = path
        files.check_target(path)
        try:
            with files.Folder(path.parent) as folder:
                self._handle = folder.open(path.name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise DgemmaError(f"{shown(path)}: {files.why(error)}") from None
        try:
            self.done = self._take_up(keys, force)
        except BaseException:
            os.close(self._handle)
            raise

    def _take_up(self, keys: Mapping[int, str], force: bool) -> set[int]:
        """Read what is there → the lines that are answered."""
        where = shown(self.path)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DgemmaError(f"{where}: another process is writing results there") from None
        data = files.read_bytes(self.path, LARGEST)
        whole, end, rest = data.rpartition(b"\n")
        if rest and not (rest.startswith(_BEGINS) or _BEGINS.startswith(rest)):
            raise DgemmaError(f"{where}: holds something else than results; choose another name")
        found = [_result(line, f"{where}: line {i}") for i, line in enumerate(whole.split(b"\n"), 1)] if end else []
        if force:
            os.ftruncate(self._handle, 0)
            return set()
        for line, key in found:
            if keys.get(line) != key:
                raise DgemmaError(
                    f"{where}: holds an answer to line {line} of other prompts, settings or another model; take "
                    "another name for the results, or --force to begin anew"
                )
        os.ftruncate(self._handle, len(data) - len(rest))
        return {line for line, _ in found}

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one result, whole or not at all, and bring it to the disk."""
        data = (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        before = os.fstat(self._handle).st_size
        try:
            rest = memoryview(data)
            while rest:  # where a part was written, the next attempt says why not all of it
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, before)
            raise DgemmaError(f"{shown(self.path)}: {files.why(error)}; the same command goes on from here") from None
        self.done.add(record["line"])

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _result(line: bytes, where: str) -> tuple[int, str]:
    try:
        data = json.loads(line)
        number, key = data["line"], data["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        number, key = None, None
    if type(number) is not int or type(key) is not str:
        raise DgemmaError(f"{where} is no result; choose another name for the results")
    return number, key


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    return bool(level)
