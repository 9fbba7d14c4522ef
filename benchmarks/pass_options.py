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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from dgemma.backends.cuda.passes import CardPasses
from dgemma.checkpoints import weights
from dgemma.core.parts import Model
from dgemma.core.sampler import draws_of, first_canvas, stacked
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


def card_ops(where: torch.device, *, beside: bool = False) -> CardOps:
    if where.type != "cuda":
        return CardOps("bfloat16", str(where))
    from dgemma.backends.cuda.ops import CudaOps

    return CudaOps("bfloat16", str(where), beside=beside)


def passes_of(ops: CardOps, model: Model, *, joined: bool = False) -> CardPasses:
    capture = CudaCapture(ops.device) if ops.device.type == "cuda" else rerun
    return CardPasses(ops, model, capture=capture, joined=joined)


def captured(passes: CardPasses, plan: bench.Plan) -> tuple[Callable[[], None], list[np.ndarray]]:
    """Capture a pass; return what replays `plan.steps` of them, and the drafts of one canvas."""
    batch = bench.Batch(passes, plan, room=3 * passes.config.canvas_length)
    drafts: list[np.ndarray] = []
    batch.read(batch.steps(0, drafts.append))

    def run() -> None:
        for i in range(plan.steps):
            batch.step(i, 1)

    return run, drafts


def canvas(passes: CardPasses, plan: bench.Plan) -> tuple[Callable[[], Any], list[np.ndarray]]:
    """Return what reads a canvas and denoises the next, and that one's drafts; the cache is as long each time."""
    length, vocab = passes.config.canvas_length, passes.config.vocab_size
    batch = bench.Batch(passes, plan, room=2 * length)
    kept = [passes.save(slot) for slot in batch.slots]
    tokens = [first_canvas(2, row, length, vocab) for row in range(plan.batch)]
    sampler = bench._sampler(plan)

    def results() -> list[Callable[[], Any]]:
        for slot, snapshot in zip(batch.slots, kept, strict=True):
            passes._load(slot, snapshot)
        draws = [
            draws_of(sampler, seed=1, canvas=row, step=0, length=length, vocab_size=vocab) for row in range(plan.batch)
        ]
        starts = {slot: first_canvas(1, row, length, vocab) for row, slot in enumerate(batch.slots)}
        first = passes.read_and_step(list(zip(batch.slots, tokens, strict=True)), stacked(draws), starts)
        return [first, *(batch.step(i, 1) for i in range(1, plan.steps))]

    return results, [result().argmax for result in results()]


def compared(ops: CardOps, model: Model, plan: bench.Plan, repeats: int) -> dict[str, Any]:
    """Time canvases joined and apart, in turn; both begin by putting the cache back, which is in both figures."""
    (apart, want), (joined, got) = (canvas(passes_of(ops, model, joined=on), plan) for on in (False, True))
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
    ops = card_ops(where)
    weight = bench.weights_of(bench.config_of(shape), recipe, maker(where))
    model = weights.build(bench.config_of(shape), lambda name: ops.pack(weight(name)), ops.stack)
    plan = bench.Plan(shape=shape, recipe=recipe, context=context, steps=8)
    ready: dict[str, Callable[[], None]] = {}
    same: dict[str, bool] = {}
    want: list[np.ndarray] = []
    for name, options in OPTIONS.items():
        try:
            with switched("early" in options):
                passes = passes_of(card_ops(where, beside="beside" in options), model)
                ready[name], drafts = captured(passes, plan)
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
