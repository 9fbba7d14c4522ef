"""Events as lines of a record, and back.

    {"t": 0.0312, "draft": {"canvas": 0, "step": 2, "steps": 48, "tokens": [21, 7, …], "accepted": "0110…", …}}

One JSON object a line: `t`, in seconds since the record began, and the event under its name. A draft keeps its tokens,
which of them are accepted and which are held (a digit for each position), entropies to a thousandth of a nat, and what
the next pass reads. `pieces` beside it spells the tokens that had not come up before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args

import numpy as np

from ..core.errors import DgemmaError
from ..core.events import Commit, Done, Draft, Event, FinishReason, Prefill, Stats
from ..core.reader import Reader, jsonable, show

LONGEST = 1 << 20
"""Positions of a canvas; no model has so many."""
_COUNT = (1 << 31) - 1
KINDS = ("prefill", "draft", "commit", "done")


def encode(event: Event) -> dict[str, Any]:
    match event:
        case Prefill():
            return {"prefill": {"done": event.done, "total": event.total}}
        case Draft():
            return {"draft": _encode_draft(event)}
        case Commit():
            return {"commit": asdict(event) | {"tokens": list(event.tokens)}}
        case Done():
            return {"done": jsonable({"finish_reason": event.finish_reason, "stats": asdict(event.stats)})}


def _encode_draft(draft: Draft) -> dict[str, Any]:
    data: dict[str, Any] = {
        "canvas": draft.canvas, "step": draft.step, "steps": draft.steps, "tokens": draft.tokens.tolist(),
        "accepted": _digits(draft.accepted), "entropy": [thousandths(x) for x in draft.entropy.tolist()],
    }  # fmt: skip
    if draft.following is not None:
        data["following"] = draft.following.tolist()
    if draft.held is not None:
        data["held"] = _digits(draft.held)
    if draft.log_accept is not None:
        data["log_accept"] = thousandths(draft.log_accept)
    return data


def thousandths(value: float) -> float | None:
    """Round to what a drawing shows; None for NaN and infinity, 0 instead of 0.0, which most entropies come to."""
    return jsonable(round(float(value), 3)) or (0 if np.isfinite(value) else None)


def _digits(marks: np.ndarray) -> str:
    return "".join("1" if one else "0" for one in marks.tolist())


def decode(kind: str, data: Any, where: str) -> Event:
    """Return the event of a line.

    Raises:
        DgemmaError: not one; names the key.
    """
    reader = Reader(data, f"{where}: {kind}")
    match kind:
        case "prefill":
            total = reader.integer("total", low=0)
            event: Event = Prefill(done=reader.integer("done", low=0, high=total), total=total)
        case "draft":
            event = _decode_draft(reader)
        case "commit":
            event = Commit(
                canvas=reader.integer("canvas", low=0), tokens=tuple(ids(reader, "tokens")),
                text=text(reader, "text"), thinking=text(reader, "thinking"),
            )  # fmt: skip
        case _:
            reason = reader.take("finish_reason")
            if reason not in get_args(FinishReason):
                raise DgemmaError(f"{reader.where}: finish_reason is {show(reason)}, expected stop or length")
            event = Done(finish_reason=reason, stats=_stats(reader))
    reader.finish()
    return event


def _decode_draft(reader: Reader) -> Draft:
    tokens = np.asarray(ids(reader, "tokens"), np.int32)
    length = len(tokens)
    if not 0 < length <= LONGEST:
        raise DgemmaError(f"{reader.where}: {length} tokens, expected 1 to {LONGEST:,}")
    following = np.asarray(ids(reader, "following", length), np.int32) if "following" in reader.data else None
    return Draft(
        canvas=reader.integer("canvas", low=0),
        step=reader.integer("step", low=0),
        steps=reader.integer("steps"),
        tokens=tokens,
        accepted=_marks(reader, "accepted", length),
        entropy=_entropies(reader, length),
        following=following,
        held=_marks(reader, "held", length) if "held" in reader.data else None,
        log_accept=reader.number("log_accept") if "log_accept" in reader.data else None,
    )


def _stats(reader: Reader) -> Stats:
    """Figures; one that this version has and the record's had not is left at its default, or at nothing."""
    given = Reader(reader.take("stats"), f"{reader.where}: stats").data
    found: dict[str, Any] = {}
    for one in fields(Stats):
        value = given.get(one.name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise DgemmaError(f"{reader.where}: stats: {one.name} is {show(value)}, expected a number")
        if value is None and one.default is MISSING and "None" not in str(one.type):
            value = 0
        if value is not None:
            found[one.name] = value
        elif one.default is MISSING:
            found[one.name] = None
    return Stats(**found)


def ids(reader: Reader, key: str, length: int | None = None) -> list[int]:
    """Take a list of token ids, of so many where that is said."""
    value = reader.take(key)
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= _COUNT for one in value):
        raise DgemmaError(f"{reader.where}: {key} is {show(value)}, expected a list of token ids")
    if length is not None and len(value) != length:
        raise DgemmaError(f"{reader.where}: {key} has {len(value)} entries, expected {length}, one a position")
    return value


def text(reader: Reader, key: str) -> str:
    value = reader.take(key)
    if not isinstance(value, str):
        raise DgemmaError(f"{reader.where}: {key} is {show(value)}, expected text")
    return value


def _marks(reader: Reader, key: str, length: int) -> np.ndarray:
    value = reader.take(key)
    if not isinstance(value, str) or len(value) != length or value.strip("01"):
        raise DgemmaError(f"{reader.where}: {key} is {show(value)}, expected a 0 or 1 for each of {length} positions")
    return np.asarray([one == "1" for one in value])


def _entropies(reader: Reader, length: int) -> np.ndarray:
    value = reader.take("entropy")
    good = isinstance(value, list) and len(value) == length
    if not good or not all(one is None or (type(one) in (int, float) and abs(one) < 1e9) for one in value):
        raise DgemmaError(f"{reader.where}: entropy is {show(value)}, expected a number for each of {length} positions")
    return np.asarray([np.nan if one is None else one for one in value], np.float32)


def pieces(data: Any, where: str) -> tuple[dict[int, str], dict[tuple[int, ...], str]]:
    """Return how tokens are spelled: single ones, and several that spell a character together.

    Raises:
        DgemmaError: not a list of pairs.
    """
    single: dict[int, str] = {}
    joined: dict[tuple[int, ...], str] = {}
    for pair in data if isinstance(data, list) else [None]:
        match pair:
            case [int(token), str(spelled)]:
                single[token] = spelled
            case [list(tokens), str(spelled)] if all(type(one) is int for one in tokens):
                joined[tuple(tokens)] = spelled
            case _:
                raise DgemmaError(f"{where}: pieces: found {show(pair)}, expected pairs of a token id and its text")
    return single, joined


def options(data: Any) -> Mapping[str, Any]:
    return {str(name): value for name, value in data.items()} if isinstance(data, Mapping) else {}
