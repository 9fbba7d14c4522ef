"""How far a prompt goes: few calls in few files from `generate` to the first product of matrices."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
from torch.nn import functional

import dgemma

ROOT = Path(dgemma.__file__).parent


def frames(innermost: FrameType | None) -> list[Path]:
    """Return the project's files on a stack, innermost first."""
    found = []
    while innermost is not None:
        path = Path(innermost.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != "tests":
            found.append(path.relative_to(ROOT))
        innermost = innermost.f_back
    return found


def test_the_way_of_a_prompt_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engine's thread; the one that called `generate` is in `generate`, and waits for events."""
    model = dgemma.load("nano", backend="torch", dtype="float32")
    seen: list[list[Path]] = []
    linear = functional.linear

    def watched(*arguments: object, **options: object) -> object:
        if not seen:
            seen.append(frames(sys._getframe(1)))
        return linear(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "linear", watched)
    model.generate("hello", 8, steps=1)
    way = seen[0]
    assert len(way) + 1 <= 12, way  # with `generate`
    assert len(set(way)) <= 6, set(way)
