"""How far a conversion is, said a few times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a conversion is."""

    stage: str
    """comparing (tied copies), checking what an earlier run has done, converting, hashing or verifying."""
    done: int
    total: int
    """Bytes of the source; of the target, when it is hashed."""
    rate: float
    """Bytes a second, since this run began."""
    seconds_left: float | None


class Meter:
    """Turns bytes done into progress, a few times a second; safe from several threads."""

    def __init__(self, report: Callable[[Progress], None] | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._stage = ""
        self._done = self._old = self._total = 0
        self._began = self._last = 0.0

    def start(self, stage: str, total: int) -> None:
        self._stage, self._done, self._old, self._total = stage, 0, 0, total
        self._began = self._last = time.monotonic()
        self._say(self._began)

    def advance(self, count: int, *, old: bool = False) -> None:
        """Count bytes; `old` ones were done by an earlier run, and say nothing of the rate."""
        with self._lock:
            self._done += count
            self._old += count if old else 0
            now = time.monotonic()
            if now - self._last >= 0.2 or self._done >= self._total:
                self._last = now
                self._say(now)

    def _say(self, now: float) -> None:
        if self._report is None:
            return
        rate = (self._done - self._old) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else None
        self._report(Progress(stage=self._stage, done=self._done, total=self._total, rate=rate, seconds_left=left))
