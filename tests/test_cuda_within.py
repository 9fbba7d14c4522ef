"""Held tokens and constraints in captured passes: what the plain loop on the CPU writes, alone and next to other rows.

As `test_cuda_graph.py`: without a card, replaying runs the captured function on the same buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import loops
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.constraints.walk import Constraint
from dgemma.core.canvas import Classes
from dgemma.core.config import SamplerConfig
from dgemma.core.events import Draft, Event
from dgemma.core.handle import Handle
from dgemma.core.passes import Passes
from dgemma.core.row import Request
from lattices import random_automaton
from test_cuda_graph import CANVAS, Counting, card_passes, engine, plain_engine
from tiny import VOCAB, tiny_checkpoint

SAMPLER = SamplerConfig(steps=4, schedule_steps=4, confidence=0.3, stability=1, entropy_bound=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("within"), max_position_embeddings=4096))


def held(seed: int, share: float = 0.4, length: int = 40) -> tuple[int, ...]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 200, length)
    return tuple(np.where(draw.random(length) < share, tokens, -1).tolist())


def constraint(seed: int, feedback: float = 0.0) -> Constraint:
    return Constraint(automaton=random_automaton(np.random.default_rng(seed), tokens=VOCAB), feedback=feedback)


def requests() -> list[Request]:
    """Rows with nothing, with held tokens, in two languages, and with both; of one to three canvases."""
    more: list[dict[str, Any]] = [
        {}, {"held": held(1)}, {"constraint": constraint(1)}, {"held": held(2, 0.9)}, {"constraint": constraint(1)}, {},
        {"constraint": constraint(2, 0.5)}, {"held": held(3, 1.0, 20)}, {"held": held(4), "init": held(5, 0.8)},
    ]  # fmt: skip
    return [
        loops.request(3 + 13 * i % 50, SAMPLER, seed=i, max_new_tokens=7 + 11 * i % 36, **one)
        for i, one in enumerate(more)
    ]


@dataclass
class Seen:
    """Stands for a handle whose events have been read."""

    all: list[Event]

    def events(self) -> Iterator[Event]:
        return iter(self.all)


def seen(handle: Handle) -> tuple[list[Any], list[float]]:
    """`loops.seen` and which positions are marked as held; and what each pass gave to the language."""
    events = list(handle.events())
    drafts = [event for event in events if isinstance(event, Draft)]
    marked = [None if one.held is None else one.held.tolist() for one in drafts]
    logs = [one.log_accept for one in drafts if one.log_accept is not None]
    return [*marked, *loops.seen(Seen(events))[:-1]], logs  # type: ignore[arg-type]


def check(got: Any, want: Any) -> None:
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", range(9))
def test_each_alone_is_the_plain_loop(checkpoint: Checkpoint, which: int) -> None:
    one = requests()[which]
    want, got = (seen(of.add(one)) for of in (plain_engine(checkpoint), engine(card_passes(checkpoint))))
    check(got, want)


def test_next_to_each_other(checkpoint: Checkpoint) -> None:
    """Batches that hold rows with and without held tokens, and passes in a language between passes that look ahead."""
    given = requests()
    want = [seen(plain_engine(checkpoint).add(one)) for one in given]
    for most in (4, 9):
        of = engine(card_passes(checkpoint), most_rows=most)
        handles = [of.add(one) for one in given]
        for handle, one in zip(handles, want, strict=True):
            check(seen(handle), one)


def test_held_tokens_are_data(checkpoint: Checkpoint) -> None:
    capture = Counting()
    of = engine(card_passes(checkpoint, capture))
    for one in ({}, {"held": held(1)}, {"held": held(2, 0.9)}):
        for _ in of.add(loops.request(20, loops.FIXED, max_new_tokens=40, **one)).events():
            pass
    assert capture.captured == 1 + 2, "the pass; reading 16 and 40"


def test_passes_in_a_language_are_captured_for_few_numbers_of_classes(checkpoint: Checkpoint) -> None:
    capture = Counting()
    passes = card_passes(checkpoint, capture)
    of, counts = engine(passes), set()
    for seed in range(4):
        language = constraint(seed)
        counts.add(len(f"{language.classes.count - 1:b}"))
        for _ in of.add(loops.request(20, loops.FIXED, max_new_tokens=30, constraint=language)).events():
            pass
    assert len(counts) == 2 and passes.captured() == capture.captured == 2 + 2, "two sizes; reading 16 and 40"


@pytest.mark.parametrize("count", [3, 40])
def test_masses_are_the_plain_loops(checkpoint: Checkpoint, count: int) -> None:
    of = (np.arange(VOCAB) % (count + 1) - 1).astype(np.int32)
    classes, canvas = Classes(of=of, count=count, key="some"), np.arange(20, 20 + CANVAS, dtype=np.int32)
    found = []
    for one in (plain_engine(checkpoint).passes, card_passes(checkpoint)):
        found.append(loops.masses(one, range(20, 31), canvas, classes))
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_reads_of_captured_passes(checkpoint: Checkpoint) -> None:
    """Filled up to a captured size, next to rows that are open, and replayed with other canvases."""
    capture = Counting()
    passes, plain = card_passes(checkpoint, capture), plain_engine(checkpoint).passes
    prompts = [list(range(20, 23 + 9 * i)) for i in range(5)]
    tokens, at = np.array([20, 30, 271], np.int32), [(0, 3), (2, 15), (1, 0), (2, 3)]
    slots, theirs = ([one.open_behind(prompt, CANVAS) for prompt in prompts] for one in (passes, plain))
    for seed in range(3):
        canvases = np.random.default_rng(seed).integers(0, VOCAB, (3, 16)).astype(np.int32)
        for some in (slice(0, 3), slice(2, 5)):  # with a fourth slot that nobody has asked for, and that is another's
            got = passes.scores(slots[some], canvases, at, tokens)
            want = Passes.scores(plain, theirs[some], canvases, at, tokens)
            np.testing.assert_allclose(got.log_p, want.log_p, atol=1e-3)
            np.testing.assert_allclose(got.entropy, want.entropy, atol=1e-3)
            assert got.token.tolist() == want.token.tolist()
    assert len(passes._look) == 1
