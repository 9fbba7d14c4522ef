"""Time one denoising pass of the 26B's shapes with what is written and off (docs/cuda.md), in one process.

    python benchmarks/pass_options.py                                      # on the first card: a minute
    python benchmarks/pass_options.py --device cpu --shape nano-like       # on the CPU, where options change nothing

Each option's passes are captured, and their drafts compared with those of the passes as shipped. Then all are replayed
in turn, so that whatever else the machine does slows all of them; figures are medians and medians of ratios. The last
row is of whole canvases, read in the next one's first pass ("joined") against a pass of their own; there the same share
of a first draft is given too, because in bfloat16 attention over twice the rows rounds otherwise. Rows are appended to
results/gpu.jsonl.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import click
import numpy as np
import rows
import torch

from dgemma.backends.cuda.card import CardOps
from dgemma.backends.cuda.graph import CudaCapture, rerun
from dgemma.backends.cuda.kernels import configs
from dgemma.core.model import Cache, Model
from dgemma.core.sampler import StepState
from dgemma.tools import bench
from dgemma.tools.bench_card import describe, maker, timed

OPTIONS = {"shipped": (), "beside": ("beside",), "early": ("early",), "early, beside": ("early", "beside")}


@contextmanager
def switched(early: bool) -> Iterator[None]:
    """Within, what is captured launches early or not; `configs.card` remembers, and is made to forget."""
    with mock.patch.object(configs, "EARLY", early):
        configs.card.cache_clear()
        try:
            yield
        finally:
            configs.card.cache_clear()


def variant(ops: CardOps, options: tuple[str, ...]) -> CardOps:
    """Return the same ops over the same weights with an option on."""
    twin = copy(ops)
    if "beside" in options and ops.device.type == "cuda":
        from dgemma.backends.cuda.ops import CudaOps

        assert isinstance(twin, CudaOps)
        twin._side = torch.cuda.Stream(ops.device)
    return twin


def captured(ops: CardOps, model: Model, plan: bench.Plan) -> tuple[Callable[[], None], list[np.ndarray]]:
    """Capture a pass; return what replays `plan.steps` of them, and the drafts of one canvas."""
    passes = bench.Loop(ops, model, plan)
    drafts: list[np.ndarray] = []
    cache = passes.canvas(passes.prompt(room=3 * model.config.canvas_length), 0, drafts.append)
    inside = Cache(cache.layers, ops.extent(int(cache.length)))
    state = passes.state(1)

    def run() -> None:
        nonlocal state
        for i in range(plan.steps):
            state = passes.step(inside, state, i, 1)

    return run, drafts


def canvas(passes: bench.Loop, *, joined: bool) -> tuple[Callable[[], object], list[np.ndarray]]:
    """Return what reads a canvas and denoises the next, and that one's drafts."""
    ops = passes.ops
    cache = passes.prompt(room=2 * passes.model.config.canvas_length)
    tokens = passes.state(2).canvas

    def states() -> Iterator[StepState]:
        if joined:
            after, state = passes.join(cache, tokens, 1)
            yield state
        else:
            after, state = passes.encode(cache, tokens), passes.state(1)
        inside = Cache(after.layers, ops.extent(int(after.length)))
        for i in range(joined, passes.plan.steps):
            state = passes.step(inside, state, i, 1)
            yield state

    return lambda: deque(states(), 0), [ops.fetch(state.argmax)()[0] for state in states()]


def compared(ops: CardOps, model: Model, plan: bench.Plan, repeats: int) -> dict[str, Any]:
    """Time canvases joined and apart, in turn."""
    passes = bench.Loop(ops, model, plan)
    (apart, want), (joined, got) = (canvas(passes, joined=on) for on in (False, True))
    times = [(timed(apart, ops.device), timed(joined, ops.device)) for _ in range(repeats + 1)][1:]
    own, of_joined = (statistics.median(column) for column in zip(*times, strict=True))
    tokens = plan.batch * model.config.canvas_length
    return {
        "option": "joined", "steps": plan.steps, "canvas_ms": round(1e3 * of_joined, 3),
        "shipped_canvas_ms": round(1e3 * own, 3), "tokens_per_second": round(tokens / of_joined, 1),
        "shipped_tokens_per_second": round(tokens / own, 1),
        "of_shipped": round(statistics.median(b / a for a, b in times), 4),
        "same_tokens": all((a == b).all() for a, b in zip(got, want, strict=True)),
        "same_first": round(float((got[0] == want[0]).mean()), 3),
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--shape", type=click.Choice(list(bench.SIZES)), default="26b", show_default=True)
@click.option("--recipe", default="4bit", show_default=True)
@click.option("--context", default=1024, show_default=True)
@click.option("--steps", default=16, show_default=True, help="Passes of a canvas, for the last row.")
@click.option("--repeats", default=7, show_default=True)
def main(device: str, shape: bench.Shape, recipe: str, context: int, steps: int, repeats: int) -> None:
    where = torch.device(device)
    if where.type == "cuda":
        from dgemma.backends.cuda.ops import CudaOps

        ops: CardOps = CudaOps("bfloat16", device, capture=CudaCapture(where))
    else:
        ops = CardOps("bfloat16", device, capture=rerun)
    model = bench.random_model(ops, bench.config_of(shape), recipe, maker(where))
    plan = bench.Plan(shape=shape, recipe=recipe, context=context, steps=8)
    ready: dict[str, Callable[[], None]] = {}
    same: dict[str, bool] = {}
    want: list[np.ndarray] = []
    for name, options in OPTIONS.items():
        try:
            with switched("early" in options):
                ready[name], drafts = captured(variant(ops, options), model, plan)
        except Exception as error:  # whatever is said of an option that this card or this Triton does not take
            click.echo(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", err=True)
            continue
        want = want or drafts
        same[name] = all((a == b).all() for a, b in zip(drafts, want, strict=True))
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, run in ready.items():
            times[name].append(timed(run, where) / plan.steps)
    found: list[dict[str, Any]] = []
    for name, one in times.items():
        ratios = [seconds / base for seconds, base in zip(one, times["shipped"], strict=True)]
        found.append({
            "option": name, "denoise_ms": round(1e3 * statistics.median(one), 3),
            "of_shipped": round(statistics.median(ratios), 4), "same_tokens": same[name],
        })  # fmt: skip
    found.append(compared(ops, model, replace(plan, steps=steps), repeats))
    for figures in found:
        row = {"benchmark": "pass_options", "shape": shape, "recipe": recipe, "context": context} | figures
        click.echo(json.dumps(rows.append("gpu", row | describe(where)) if where.type == "cuda" else row))


if __name__ == "__main__":
    main()
