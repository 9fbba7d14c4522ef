"""What the engine gains by rows, short canvases and kept prefixes, and what it holds on to.

    python benchmarks/engine.py rows      # nano, 8 at a time against 1; 110 M, 8 that arrive against a plain batch
    python benchmarks/engine.py short     # 110 M, a pass over 16 positions against one over 256
    python benchmarks/engine.py memory    # resident memory over 300 settings, and 1,000 requests 8 at a time
    python benchmarks/engine.py chat      # nano, ten turns: tokens read and not read again

Sides alternate, so that a busy machine slows both; figures are medians of ratios of neighbours. A row of `rows` and
`short` is appended to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from dataclasses import replace
from typing import Any

import click
import numpy as np
import psutil
import rows as results

import dgemma
from dgemma import DiffusionGemma, backends
from dgemma.checkpoints import weights
from dgemma.core.engine import Engine
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.row import Request
from dgemma.tools import bench

BOARDS = ("3..2.. 2..5.. 5.216. ..1.5. ...63. .6.425", ".3.1 .2.. .... ...4", "12.. ..1. .1.. ..2.")


@click.group(help=__doc__)
def main() -> None:
    pass


def requests(model: DiffusionGemma, count: int, **settings: Any) -> list[Request]:
    """Return requests for a canvas each, of different prompts and seeds, that take every pass."""
    sampler = replace(model.generation.sampler, steps=8, confidence=0.0, **settings)
    return [
        Request(
            prompt=tuple(model.prompt_ids(BOARDS[i % len(BOARDS)])), max_new_tokens=48, seed=i, sampler=sampler,
            eos_token_ids=(), drafts=False,
        )
        for i in range(count)
    ]  # fmt: skip


def seconds(engine: Engine, asked: list[Request], at_once: int) -> float:
    engine.most_rows = at_once
    began = time.perf_counter()
    handles = [engine.add(request) for request in asked]
    for handle in handles:
        for _ in handle.events():
            pass
    return time.perf_counter() - began


def random_passes(shape: str) -> GraphPasses:
    """Return torch's passes over random float32 weights of a benchmark's shape, stored as wide as they act."""
    config = bench.config_of(shape)
    tensors = weights.random_weights(config)
    return backends.passes_of("torch", config, tensors.__getitem__, device="cpu", dtype="float32")


@main.command()
@click.option("--repeats", default=7)
@click.option("--backend", default="torch", help="For nano.")
def rows(repeats: int, backend: str) -> None:
    model = dgemma.load("nano", backend=backend, dtype="float32", prefix_bytes=0)
    asked, ratios = requests(model, 24), []
    for _ in range(repeats + 1):
        alone, together = (seconds(model.engine, asked, n) for n in (1, 8))
        ratios.append(alone / together)
    found: dict[str, Any] = {f"nano_{backend}_8_at_a_time": statistics.median(ratios[1:])}
    if backend == "torch":
        engine, ratios = Engine(random_passes("110m"), None, prefix_bytes=0), []
        plan = bench.Plan(shape="110m", recipe="bf16", steps=8, context=64, batch=8, canvases=1)
        for _ in range(max(2, repeats // 2) + 1):
            arriving, _ = bench.arriving(engine, plan, 8)
            ratios.append(plain(engine, plan) / arriving)
        found["110m_8_arriving_of_plain"] = statistics.median(ratios[1:])
    show("rows", found)


def plain(engine: Engine, plan: bench.Plan) -> float:
    """Seconds of a plain batch from its prompts to its last canvas, which nobody reads."""

    def run() -> None:
        batch = bench.Batch(engine.passes, plan, room=plan.canvases * engine.passes.config.canvas_length)
        for seed in range(plan.canvases):
            last = batch.steps(seed)
            if seed < plan.canvases - 1:
                batch.read(last)
        batch.close()

    return bench.timed(engine, run)


@main.command()
@click.option("--repeats", default=7)
def short(repeats: int) -> None:
    engine, ratios = Engine(random_passes("110m"), None, prefix_bytes=0), []
    sampler = bench.Plan(steps=6)
    prompt = tuple(np.random.default_rng(0).integers(3, 1000, 64).tolist())
    given = dict(prompt=prompt, seed=1, eos_token_ids=(), sampler=bench._sampler(sampler), max_new_tokens=16)
    for _ in range(repeats + 1):
        times = []
        for length in (16, 256):
            done = list(engine.add(Request(canvas_length=length, **given)).events())[-1]  # type: ignore[arg-type]
            assert isinstance(done, dgemma.Done)
            times.append((done.stats.seconds - done.stats.prefill_seconds) / done.stats.steps)
        ratios.append(times[0] / times[1])
    show("short", {"110m_16_positions_of_256": statistics.median(ratios[1:])})


@main.command()
@click.option("--backend", default="torch")
def memory(backend: str) -> None:
    process = psutil.Process()

    def state() -> tuple[float, int, int]:
        gc.collect()
        return process.memory_info().rss / 1e6, threading.active_count(), process.num_fds()

    for what, count, at_once in (("300 settings", 300, 1), ("1,000 at 8 at a time", 1000, 8)):
        model = dgemma.load("nano", backend=backend, dtype="float32")
        draw, before = np.random.default_rng(0), (0.0, 0, 0)
        for start in range(0, count, 50):
            batch = [
                replace(one, seed=start + i, **different(draw, model)) for i, one in enumerate(requests(model, 50))
            ]
            seconds(model.engine, batch, at_once)
            if not start:
                before = state()
        after = state()
        click.echo(
            f"{backend}, {what}: resident {before[0]:.1f} MB after 50, {after[0]:.1f} MB at the end "
            f"({100 * (after[0] / before[0] - 1):+.1f} %); threads {before[1]} → {after[1]}, handles {before[2]} → "
            f"{after[2]}; {model.engine.busy} rows left, {len(model.engine.prefixes)} prefixes kept"
        )


def different(draw: np.random.Generator, model: DiffusionGemma) -> dict[str, Any]:
    """Return a prompt and settings that no other request has."""
    sampler = replace(
        model.generation.sampler, steps=8, entropy_bound=float(draw.uniform(0.01, 1)),
        confidence=float(draw.uniform(0, 0.1)), t_max=float(draw.uniform(0.5, 1)), t_min=0.4,
    )  # fmt: skip
    prompt = draw.integers(6, model.config.vocab_size, int(draw.integers(1, 100)))
    return {"sampler": sampler, "prompt": tuple(prompt.tolist())}


@main.command()
@click.option("--backend", default="torch")
def chat(backend: str) -> None:
    reused, fresh = (dgemma.load("nano", backend=backend, dtype="float32", prefix_bytes=n) for n in (1 << 28, 0))
    messages: list[dict[str, Any]] = []
    for turn in range(1, 11):
        messages.append({"role": "user", "content": BOARDS[turn % len(BOARDS)]})
        one, other = (model.generate(messages, 60, seed=turn) for model in (reused, fresh))
        assert one.token_ids == other.token_ids
        stats = one.stats
        click.echo(f"turn {turn}: prompt {stats.prompt_tokens}, read {stats.prompt_tokens - stats.cached_tokens}")
        messages.append({"role": "assistant", "content": one.text})


def show(name: str, found: dict[str, Any]) -> None:
    row = results.append("engine", {"measured": name, **found, "threads": os.environ.get("OMP_NUM_THREADS")}, "torch")
    for what, figure in found.items():
        click.echo(f"{what}: {figure:.3f}   ({row['machine']})")


if __name__ == "__main__":
    main()
