"""Reading a record: what `record` has kept, as the same events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints import files
from ..core.errors import DgemmaError, shown
from ..core.events import Done, Event
from ..core.reader import Reader
from .asked import Asked, Stream
from .lines import KINDS, decode, ids, options, pieces, text
from .record import FORMAT

LARGEST = 1 << 30
"""Bytes of a record that is read; a thousand tokens of a large model take half a million."""


class Spelled:
    """Stands for the tokenizer: knows how the tokens of a record are spelled, and no others."""

    def __init__(self) -> None:
        self.single: dict[int, str] = {}
        self.joined: dict[tuple[int, ...], str] = {}

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        if len(ids) > 1 and (joined := self.joined.get(tuple(ids))) is not None:
            return joined
        return "".join(self.single.get(i, "\ufffd") for i in ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn(Stream):
    """What was asked once, and the events that answered it."""

    asked: Asked
    text: str
    """The prompt, special tokens included."""
    events: list[Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds since the record began, of each event."""

    @property
    def whole(self) -> bool:
        """Whether the answer came to its end."""
        return bool(self.events) and isinstance(self.events[-1], Done)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A record that was read; iterating over it gives its events, one turn's behind the other's."""

    path: Path
    turns: tuple[Turn, ...]
    cut: str | None
    """What a reader should know of its end, in one line; None where it is whole."""

    def __iter__(self) -> Iterator[Event]:
        for turn in self.turns:
            yield from turn.events


def replay(path: str | Path) -> Recording:
    """Read a record.

        for event in dgemma.replay("run.jsonl"): ...        # Prefill, Draft, Commit, Done, as they came

    Entropies are rounded to a thousandth of a nat. A record whose last line was cut short, as by a kill, is read up to
    there, and `cut` says so.

    Raises:
        DgemmaError: not readable, not a record, or damaged; names the line.
    """
    where = shown(path)
    whole, end, rest = files.read_bytes(Path(path), LARGEST).rpartition(b"\n")
    lines = whole.split(b"\n") if end else []
    _check_first(lines[0] if lines else rest, where)
    spelled = Spelled()
    turns: list[Turn] = []
    for number, line in enumerate(lines[1:], 2):
        _take(_parsed(line, f"{where}: line {number}"), turns, spelled, f"{where}: line {number}")
    if not turns or not any(turn.events for turn in turns):
        raise DgemmaError(f"{where}: nothing was recorded in it; what ran ended before the first event")
    cut = None
    if rest:
        cut = f"{where}: line {len(lines) + 1} is cut short; shown up to there"
    elif not turns[-1].whole:
        cut = f"{where}: ends before the answer does; shown up to there"
    return Recording(path=Path(path), turns=tuple(turns), cut=cut)


def _check_first(line: bytes, where: str) -> None:
    try:
        found = json.loads(line)["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str) or not found.startswith("dgemma record "):
        raise DgemmaError(f"{where}: not a record; one is made by --record FILE, or dgemma.record(…)")
    if found != FORMAT:
        raise DgemmaError(f"{where}: a record of another version ({found[:40]!a}); this dgemma reads {FORMAT!a}")


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise DgemmaError(f"{where} is not JSON: the record is damaged") from None
    return Reader(data, where).data


def _take(data: dict[str, Any], turns: list[Turn], spelled: Spelled, where: str) -> None:
    """Add what a line says."""
    reader = Reader(data, where)
    time = reader.number("t", low=0)
    single, joined = pieces(reader.take("pieces", []), where)
    spelled.single |= single
    spelled.joined |= joined
    kinds = [*reader.data]
    if len(kinds) != 1 or kinds[0] not in ("asked", *KINDS):
        raise DgemmaError(f"{where}: expected one of asked, {', '.join(KINDS)}, found {', '.join(kinds)[:60]!a}")
    value = reader.take(kinds[0])
    if kinds[0] == "asked":
        turns.append(_asked(Reader(value, f"{where}: asked"), spelled))
    elif not turns:
        raise DgemmaError(f"{where}: an event before anything was asked: the record is damaged")
    elif turns[-1].whole:
        raise DgemmaError(f"{where}: an event behind the end of the answer: the record is damaged")
    else:
        turns[-1].events.append(decode(kinds[0], value, where))
        turns[-1].times.append(time)


def _asked(reader: Reader, spelled: Spelled) -> Turn:
    asked = Asked(
        tokenizer=spelled,
        ends=tuple(ids(reader, "ends")),
        budget=reader.integer("budget"),
        prompt=tuple(ids(reader, "prompt")),
        options=options(reader.take("options", {})),
        model=text(reader, "model"),
        title=text(reader, "title"),
    )
    turn = Turn(asked=asked, text=text(reader, "text"))
    reader.finish()
    return turn


def retitled(recording: Recording, title: str) -> Recording:
    """The same under another title."""
    turns = tuple(replace(turn, asked=replace(turn.asked, title=title)) for turn in recording.turns)
    return replace(recording, turns=turns)
