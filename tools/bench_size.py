"""How long a benchmark is going to take: its passes counted, and one of them timed."""

from __future__ import annotations

from dataclasses import replace

from ..core.engine import Engine
from ..core.passes import Passes
from .bench import COMMITS, Batch, Plan, Shape, timed

MINUTE = 60.0
"""Seconds that a benchmark without a shape may take."""

CARD_SHAPES: tuple[Shape, ...] = ("26b", "110m", "nano-like")
HOST_SHAPES: tuple[Shape, ...] = ("110m", "nano-like")
"""Largest first. To make the 26B's weights alone takes a processor minutes, and a card seconds."""


def passes(plan: Plan, canvas_length: int) -> int:
    """Return how many passes `bench.measure` runs, a prompt counted as canvases of rows."""
    canvas = plan.steps + 1
    runs = 2 * plan.canvases * canvas * (2 if plan.batch > 1 else 1)  # through the engine
    prompts = (5 + (2 * plan.batch if plan.batch > 1 else 0)) * -(-plan.context // canvas_length)
    return (plan.canvases + 1) * canvas + 3 * plan.steps + COMMITS + runs + prompts


def time_a_pass(passes: Passes, plan: Plan) -> float:
    """Return the seconds of one denoising pass behind the plan's prompt; one before it may compile."""
    engine = Engine(passes, None, prefix_bytes=0)
    room = passes.config.canvas_length
    batch = engine.run("timing a pass", lambda: Batch(passes, plan, room=room))
    seconds = [timed(engine, lambda i=index: batch.step(i, 0)()) for index in range(2)]
    engine.run("timing a pass", batch.close)
    return seconds[1]


def within(plan: Plan, canvas_length: int, seconds: float, limit: float = MINUTE) -> Plan | None:
    """Return the plan with as many of its canvases as a pass of so many seconds allows; None where none do."""
    for canvases in range(plan.canvases, 0, -1):
        shorter = replace(plan, canvases=canvases)
        if passes(shorter, canvas_length) * seconds <= limit:
            return shorter
    return None
