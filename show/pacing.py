"""How long each event of a recording is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from ..core.events import Commit, Draft, Event
from .recording import Turn

LONGEST = 5.0
"""Seconds that are waited for an event, at most: a machine may have slept."""
LAST = 4
"""How many paces the last pass and the whole text are shown, where there is one pace."""


def delays(turn: Turn, *, speed: float = 1.0, pace: float | None = None) -> Iterator[tuple[Event, float]]:
    """Yield a turn's events, each with the seconds to wait before it is shown.

    Args:
        speed: how many times as fast as it was recorded.
        pace: show every pass for so many seconds instead.
    """
    if pace is None:
        begins = turn.times[:1]
        for event, (before, now) in zip(turn.events, pairwise([*begins, *turn.times]), strict=True):
            yield event, min(max(now - before, 0.0), LONGEST) / speed
        return
    drawn = False
    for event in turn.events:
        wait = pace if drawn and isinstance(event, Draft | Commit) else 0.0
        drawn = isinstance(event, Draft)
        yield event, wait
