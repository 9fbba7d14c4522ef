"""How long a benchmark is going to take: its passes counted, and one of them timed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.model import Cache
from .bench import Loop, Plan, Shape

if TYPE_CHECKING:
    from ..core.model import Model
    from ..core.ops import Ops

MINUTE = 60.0
"""Seconds that a benchmark without a shape may take."""

CARD_SHAPES: tuple[Shape, ...] = ("26b", "110m", "nano-like")
HOST_SHAPES: tuple[Shape, ...] = ("110m", "nano-like")
"""Largest first. To make the 26B's weights alone takes a processor minutes, and a card seconds."""


def passes(plan: Plan, canvas_length: int) -> int:
    """Return how many passes `bench.measure` runs, a prompt counted as canvases of rows."""
    canvas = plan.steps + 1
    prompts = 5 * -(-plan.context // canvas_length)
    return (plan.canvases + 1) * canvas + 3 * plan.steps + 5 + 2 * plan.canvases * canvas + prompts


def time_a_pass(ops: Ops, model: Model, plan: Plan) -> float:
    """Return the seconds of one denoising pass behind the plan's prompt; one before it may compile."""
    loop = Loop(ops, model, plan)
    cache = loop.prompt(room=model.config.canvas_length)
    inside = Cache(cache.layers, ops.extent(int(cache.length)))
    state = loop.step(inside, loop.state(0), 0, 0)
    ops.fetch(state.stop)()
    began = time.perf_counter()
    ops.fetch(loop.step(inside, state, 1, 0).stop)()
    return time.perf_counter() - began


def within(plan: Plan, canvas_length: int, seconds: float, limit: float = MINUTE) -> Plan | None:
    """Return the plan with as many of its canvases as a pass of so many seconds allows; None where none do."""
    for canvases in range(plan.canvases, 0, -1):
        shorter = replace(plan, canvases=canvases)
        if passes(shorter, canvas_length) * seconds <= limit:
            return shorter
    return None
