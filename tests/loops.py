"""Whole generations of the engine as a reader sees them: what two ways of running the same passes are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma.core import sampler as sampling
from dgemma.core.canvas import Chosen, Classes
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine, Handle
from dgemma.core.events import Commit, Done, Draft
from dgemma.core.parts import Draws, Masses
from dgemma.core.passes import Passes
from dgemma.core.row import Request

FIXED = SamplerConfig(steps=3, schedule_steps=3, confidence=0.0)
SAMPLERS = {
    "fixed": FIXED,
    "one pass": SamplerConfig(steps=1, schedule_steps=1, confidence=0.0),
    "stops after the first": SamplerConfig(steps=3, schedule_steps=3, confidence=1e9, stability=0),
}


def written(engine: Engine, prompt: int, sampler: SamplerConfig, *, max_new_tokens: int, **options: Any) -> list[Any]:
    """Return everything a reader sees behind so many prompt tokens, but for times; `options` are a request's."""
    return seen(engine.add(request(prompt, sampler, max_new_tokens=max_new_tokens, **options)))


def request(prompt: int, sampler: SamplerConfig, **options: Any) -> Request:
    given: dict[str, Any] = dict(seed=3, eos_token_ids=()) | options
    return Request(prompt=tuple(20 + i % 200 for i in range(prompt)), sampler=sampler, **given)


def draws_for(sampler: SamplerConfig, seeds: list[int], length: int) -> Draws:
    """What the second pass of several rows' first canvases is given."""
    return sampling.stacked([
        sampling.draws_of(sampler, seed=seed, canvas=0, step=1, length=length, vocab_size=200) for seed in seeds
    ])  # fmt: skip


def masses(passes: Passes, prompt: Sequence[int], canvas: np.ndarray, classes: Classes) -> Masses:
    """What the first pass over a canvas behind a prompt says of classes of tokens: arrays [L, C]."""
    found: list[Masses] = []

    def choose(given: Masses) -> Chosen:
        found.append(given)
        tokens, nothing = np.zeros((1, len(canvas)), np.int32), np.zeros((1, len(canvas)), np.float32)
        return Chosen(tokens, tokens, nothing, tokens, nothing)

    slot = passes.open_behind(prompt, len(canvas))
    passes.step_within([slot], draws_for(FIXED, [0], len(canvas)), {slot: canvas}, classes, choose)
    passes.close(slot)
    return Masses(*(np.array(one[0]) for one in found[0]))


def seen(handle: Handle) -> list[Any]:
    """Return everything that a request's reader sees, but for times."""
    found: list[Any] = []
    for event in handle.events():
        match event:
            case Draft():
                row = event.tokens.tolist(), event.accepted.tolist()
                found.append((event.canvas, event.step, event.steps, *row))
            case Commit():
                found.append((event.canvas, event.tokens, event.text))
            case Done(finish_reason=reason, stats=stats):
                found.append((reason, stats.steps, stats.encode_passes, stats.canvases, stats.emitted_tokens))
    return found
