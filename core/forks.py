"""Engines across a fork: it waits for the pass that is running, so that the child has caches that are whole."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    def pause(self) -> None:
        """Wait for the work that is running, and begin no other until `go_on`."""

    def go_on(self) -> None: ...

    def in_child(self) -> None:
        """Begin with a thread of its own, where the parent's are gone."""


_living: weakref.WeakSet[Forked] = weakref.WeakSet()


def survive(one: Forked) -> None:
    """Let a fork take something along, for as long as it lives."""
    _living.add(one)


def _before() -> None:
    for one in list(_living):
        one.pause()


def _in_parent() -> None:
    for one in list(_living):
        one.go_on()


def _in_child() -> None:
    for one in list(_living):
        one.in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
