"""Random requests with held tokens, and what has to be true of every answer to one.

    python tests/held_cases.py torch 10000     # what CI runs a few hundred of, on one backend

The sampler's rules are worked out again from the events alone: which free positions the entropy bound accepts, whether
the canvas is finished, and where the text ends.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.canvas import FREE, part
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Commit, Done, Draft, Event
from dgemma.core.row import SHORT, Request
from tiny import tiny_checkpoint
from under_test import build, make_ops, passes_of

EOS = (1, 5)
CLOSE = 1e-4
"""Nats: sums so near to a threshold may be rounded to either side of it."""


def small_checkpoint(folder: Path) -> Checkpoint:
    """A random model whose float32 rounding does not grow from pass to pass."""
    return Checkpoint.open(tiny_checkpoint(folder, gain=0.3))


def engine_on(backend: str, checkpoint: Checkpoint, **how: Any) -> Engine:
    ops = make_ops(backend, "float32")
    config = replace(checkpoint.config, image_token_ids=())
    return Engine(passes_of(ops, build(ops, config, checkpoint.tensor)), None, **how)


def tokens(draw: np.random.Generator, length: int, share: float, vocab: int) -> tuple[int, ...]:
    """Tokens, `FREE` where there is none; seldom one that ends a text."""
    found = draw.integers(6, vocab, length)
    found[draw.random(length) < 0.02] = draw.choice(EOS)
    return tuple(np.where(draw.random(length) < share, found, FREE).tolist())


def random_request(draw: np.random.Generator, vocab: int) -> Request:
    budget, steps = int(draw.integers(1, 41)), int(draw.integers(1, 6))
    share = draw.choice([0.0, 0.1, 0.5, 0.95, 1.0])
    drafted = bool(draw.random() < 0.4)
    return Request(
        prompt=tuple(draw.integers(6, vocab, draw.integers(1, 30)).tolist()), max_new_tokens=budget,
        seed=int(draw.integers(1 << 31)), eos_token_ids=EOS if draw.random() < 0.7 else (),
        canvas_length=int(draw.choice([4, 8, 16])), fit=bool(draw.random() < 0.3),
        sampler=SamplerConfig(
            steps=steps, schedule_steps=steps, entropy_bound=float(draw.choice([0.0, 0.1, 2.0, 20.0])),
            confidence=float(draw.choice([0.0, 0.5, 3.0])), stability=int(draw.integers(0, 3)),
            greedy=bool(draw.random() < 0.3),
        ),
        held=tokens(draw, int(draw.integers(0, budget + 1)), share, vocab),
        init=tokens(draw, int(draw.integers(1, budget + 1)), draw.choice([0.5, 1.0]), vocab) if drafted else (),
        strength=float(draw.choice([0.0, 0.3, 0.7, 1.0])) if drafted else 1.0,
    )  # fmt: skip


def kept(request: Request) -> np.ndarray:
    """What an answer keeps, int32 [max_new_tokens]: the held tokens, and at strength 0 the draft's."""
    held = part(request.held, 0, request.max_new_tokens)
    init = part(request.init, 0, request.max_new_tokens)
    return np.where((held == FREE) & (request.strength == 0), init, held)


def check(request: Request, events: list[Event]) -> tuple[int, ...]:
    """Hold an answer to the rules; return its tokens."""
    held, done = kept(request), events[-1]
    assert isinstance(done, Done)
    drafts = [event for event in events if isinstance(event, Draft)]
    commits = [event for event in events if isinstance(event, Commit)]
    assert done.stats.steps == len(drafts)
    at, answer = 0, []
    for commit in commits:
        length, left = _length(request, len(held) - at), len(held) - at
        mine = [draft for draft in drafts if draft.canvas == commit.canvas]
        wanted = part(held, at, length)
        final = _passes(request, wanted, mine) if mine else wanted
        assert bool(mine) == bool((wanted[:left] == FREE).any()), "no pass where every position is held, and only there"
        ends = [i for i, token in enumerate(final[:left].tolist()) if token in request.eos_token_ids]
        assert commit.tokens == tuple(final[: min([left, *ends])].tolist())
        answer += commit.tokens
        at += length
        assert (commit is commits[-1]) == (bool(ends) or left <= length)
    kept_here = held[: len(answer)]
    np.testing.assert_array_equal(np.asarray(answer)[kept_here != FREE], kept_here[kept_here != FREE])
    return tuple(answer)


def _length(request: Request, left: int) -> int:
    usual = request.canvas_length or 16
    return next((size for size in SHORT if left <= size < usual), usual) if request.fit else usual


def _passes(request: Request, wanted: np.ndarray, drafts: list[Draft]) -> np.ndarray:
    """Hold a canvas's passes to the rules; return what is committed."""
    sampler, free = request.sampler, wanted == FREE
    stable, before = 0, np.full(len(wanted), -1)
    for step, draft in enumerate(drafts):
        assert draft.step == step and draft.following is not None and len(draft.tokens) == len(wanted)
        if free.all():
            assert draft.held is None
        else:
            np.testing.assert_array_equal(draft.held, ~free)
        for shown in (draft.tokens, draft.following):
            np.testing.assert_array_equal(shown[~free], wanted[~free])
        assert not draft.entropy[~free].any()
        _accepted(draft, free, sampler.entropy_bound)
        stable = stable + 1 if (draft.tokens == before).all() else 0
        before = draft.tokens
        mean = draft.entropy[free].astype(np.float64).mean() if free.any() else 0.0
        last = step + 1 == len(drafts)
        if abs(mean - sampler.confidence) > CLOSE:
            stop = mean < sampler.confidence and stable >= sampler.stability
            assert last == (stop or step + 1 == sampler.steps), "the stop test, over free positions"
    return drafts[-1].tokens


def _accepted(draft: Draft, free: np.ndarray, bound: float) -> None:
    """The entropy bound over the free positions alone accepts them as they were accepted."""
    entropy = draft.entropy[free].astype(np.float64)
    order = np.argsort(draft.entropy[free], kind="stable")
    before = np.empty(len(entropy))
    before[order] = np.cumsum(entropy[order]) - entropy[order]
    clear = abs(before - bound) > CLOSE
    clear[order[:1]] = True  # the surest always is
    np.testing.assert_array_equal(draft.accepted[free][clear], (before <= bound + (before == 0))[clear])


@dataclass
class Tally:
    cases: int = 0
    held: int = 0
    drafts: int = 0


def sweep(engine: Engine, cases: int, *, seed: int = 0, together: int = 8, alone: int = 0) -> Tally:
    """Run random requests, some at a time, and check each; of every batch `alone` are run again by themselves."""
    draw, tally = np.random.default_rng(seed), Tally()
    while tally.cases < cases:
        requests = [random_request(draw, engine.passes.config.vocab_size) for _ in range(together)]
        answers = []
        for request, handle in zip(requests, [engine.add(one) for one in requests], strict=True):
            events = list(handle.events())
            answers.append(check(request, events))
            tally.held += int((kept(request)[: len(answers[-1])] != FREE).sum())
            tally.drafts += sum(isinstance(event, Draft) for event in events)
        for request, answer in list(zip(requests, answers, strict=True))[:alone]:
            assert check(request, list(engine.add(request).events())) == answer
        tally.cases += together
    return tally


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        backend = {"torch": "inference"}.get(sys.argv[1], sys.argv[1])
        print(sweep(engine_on(backend, small_checkpoint(Path(folder))), int(sys.argv[2]), together=32, alone=1))
