"""`dgemma bench`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import ways_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.graph_passes import GraphPasses
    from ..tools.bench import Plan, Result, Shape
    from .output import Wait

SHOWN, LISTED = 20, 60
"""Kernels that the card and the JSON line list."""


@click.command(short_help="Measure speed with random weights.")
@click.option(
    "--random", "shape", type=click.Choice(["26b", "110m", "nano-like"]),
    help="Random weights of this model's shapes; nothing is read or downloaded.  [default: the largest that this "
    "device measures within a minute]",
)  # fmt: skip
@click.option("--recipe", "-r", default="4bit", show_default=True, metavar="NAME", help="What the weights are held in.")
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Passes over each canvas.")
@click.option("--context", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of the prompt.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True,
    help="Canvases side by side, in a plain batch; and so many requests that arrive at once.",
)  # fmt: skip
@click.option(
    "--canvases", type=click.IntRange(min=1), metavar="N",
    help="Canvases that are timed.  [default: 4, or, without --random, what a minute allows of them]",
)  # fmt: skip
@click.option("--profile", is_flag=True, help="Also list where a pass spends its time (torch).")
@click.option("--check", is_flag=True, help="Also compare the captured passes' tokens with the plain loop's (CUDA).")
@click.option("--plain", is_flag=True, help="Start every kernel from the host, instead of captured passes (CUDA).")
@click.option(
    "--json", "as_json", is_flag=True, help="Write one JSON line instead of the table, as always off a terminal.",
)  # fmt: skip
@ways_options
@click.pass_context
def bench(
    ctx: click.Context, shape: Shape | None, canvases: int | None, profile: bool, check: bool, plain: bool,
    as_json: bool, backend: str, device: str, dtype: str, **options: Any,
) -> None:  # fmt: skip
    """Measure how fast this machine denoises, with random weights of a real model's shapes.

    Every canvas takes exactly --steps passes and one that reads it; tokens per second are its 256 tokens over that
    time. The prompt comes before and does not count. Weights that are not quantized are stored in bfloat16; auto
    computes in the width that `load` would take for them.

    \b
    dgemma bench
    dgemma bench --random 26b --recipe 4bit --steps 16
    dgemma bench --random 110m --recipe bf16 --device cpu
    """
    from ..backends import choose, device_of
    from ..tools.bench import Plan, measure
    from ..tools.bench_size import CARD_SHAPES, HOST_SHAPES, passes
    from .output import Wait, consoles

    chosen = choose(backend)
    if chosen == "onnx":
        raise click.UsageError("--backend onnx runs graphs written out of a checkpoint, and here there is none")
    if check and plain:
        raise click.UsageError("--check compares captured passes with plain ones: leave --plain out")
    if profile and chosen != "torch":
        raise click.UsageError("--profile reads torch's profiler; choose --backend torch")
    where = device_of(chosen, device)
    plan = Plan(shape=shape or HOST_SHAPES[-1], canvases=canvases or Plan.canvases, **options)
    out, errors = consoles()
    if shape is None:
        shapes = CARD_SHAPES if where.startswith("cuda") else HOST_SHAPES
        made, plan = _picked(errors, shapes, chosen, where, dtype, plan, fixed=canvases is not None)
    else:
        made = _made(errors, chosen, where, dtype, plan)
    for option, asked in {"--check compares captured passes": check, "--plain leaves captures out": plain}.items():
        if asked and not made.lookahead:
            raise click.UsageError(f"{option}, and this backend and device capture none")
    made = _uncaptured(made) if plain else made
    total = passes(plan, made.config.canvas_length)
    with Wait(errors, "measuring") as wait:
        result = measure(made, plan, _progress(wait, total))
    with Wait(errors, "measuring a copy"), made.guarded("measuring a copy"):
        row = report(made, plan, result)
    same = True
    try:
        if check:
            with Wait(errors, "comparing with the plain loop"), made.guarded("comparing with the plain loop"):
                same = row["captured_equals_plain"] = _captured_equals_plain(made, plan)
        if profile:
            with Wait(errors, "profiling"):
                row["profile"] = _profile(made, plan)[:LISTED]
    finally:  # what has been measured is said, whatever comes after it
        if as_json or not out.is_terminal:
            click.echo(json.dumps(row))
        else:
            _show(out, row)
    if not same:
        ctx.exit(1)


def report(made: GraphPasses, plan: Plan, result: Result) -> dict[str, Any]:
    """Return the JSON row: milliseconds, gigabytes of 10^9 bytes, and where it was measured."""
    bandwidth, where = _machine(made)
    rate, arriving = result.forward_bytes / result.denoise, result.arriving_tokens_per_second
    return {
        "benchmark": "bench", **asdict(plan), "backend": made.name, "dtype": made.dtype,
        "captured": made.lookahead > 0,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "engine_tokens_per_second": round(result.engine_tokens_per_second, 1),
        "arriving_tokens_per_second": None if arriving is None else round(arriving, 1),
        **{
            f"{name}_ms": round(1e3 * getattr(result, name), 3)
            for name in ("forward", "denoise", "commit", "canvas", "prefill", "first_draft")
        },
        "forward_gb": round(result.forward_bytes / 1e9, 3), "gb_per_second": round(rate / 1e9, 1),
        "copy_gb_per_second": None if bandwidth is None else round(bandwidth / 1e9, 1),
        "share_of_copy": None if bandwidth is None else round(rate / bandwidth, 3),
        "weights_gb": round(result.weights / 1e9, 3),
        "peak_gb": None if result.peak is None else round(result.peak / 1e9, 3),
        "commit": commit(), **where,
    }  # fmt: skip


def commit() -> str:
    """The sources' commit, with a + where they have been changed since; `unknown` outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        status = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return f"{head.stdout.strip()}{'+' if changed.stdout.strip() else ''}" if head.stdout.strip() else "unknown"


def _made(errors: Console, backend: str, where: str, dtype: str, plan: Plan) -> GraphPasses:
    """Make the weights.

    Raises:
        DgemmaError: there is no room for them.
    """
    from ..backends import native, passes_of
    from ..convert import recipes
    from ..core.errors import DgemmaError
    from ..runtime import auto_dtype
    from ..tools.bench import config_of, weights_of
    from ..tools.inspect import inspect_config
    from . import machine
    from .output import Wait

    config, maker = config_of(plan.shape), None
    if dtype == "auto":
        dtype = auto_dtype(config, "bfloat16", backend, partial(native, backend, where))
    on_card = where.startswith("cuda")
    recipe = recipes.find(plan.recipe)
    held = int(inspect_config(config, recipe).held(backend, dtype, gpu=on_card))  # type: ignore[arg-type]
    if on_card:
        import torch

        from ..tools.bench_card import maker as on

        maker = on(torch.device(where))
    elif held > (free := machine.system()["free_memory_bytes"]):
        raise DgemmaError(
            f"{plan.shape} in {plan.recipe} takes {held / 1e9:.2f} GB of weights, and {free / 1e9:.2f} GB of memory "
            "are free; take a smaller recipe, or --random 110m"
        )
    weight = weights_of(config, plan.recipe, maker)
    with Wait(errors, f"making {plan.shape} in {plan.recipe}"):
        return passes_of(backend, config, weight, device=where, dtype=dtype, nbytes=held)  # type: ignore[arg-type]


def _picked(
    errors: Console, shapes: Sequence[Shape], backend: str, where: str, dtype: str, plan: Plan, *, fixed: bool
) -> tuple[GraphPasses, Plan]:
    """Take the first shape that one timed pass says can be measured in a minute, else the last; say how long.

    Of canvases as many as that allows, unless their number is `fixed`.
    """
    from dataclasses import replace

    from ..core.errors import DgemmaError
    from ..tools.bench_size import passes, time_a_pass, within
    from .output import Wait

    for shape in shapes:
        plan, last = replace(plan, shape=shape), shape == shapes[-1]
        try:
            made = _made(errors, backend, where, dtype, plan)
            with Wait(errors, f"timing a pass of {shape}"):
                seconds = time_a_pass(made, plan)
        except DgemmaError:  # there is no room for it
            if last:
                raise
            continue
        length = made.config.canvas_length
        fewest = plan if fixed else replace(plan, canvases=1)
        taken = within(plan, length, seconds)
        taken = None if fixed and taken != plan else taken
        if taken is not None or last:
            plan = taken or fewest
            total = passes(plan, length)
            click.echo(f"{shape}: {total} passes of about {seconds:.3g} s, {total * seconds:.0f} s in all", err=True)
            return made, plan
        click.echo(f"{shape}: a pass takes about {seconds:.3g} s, too long for a minute", err=True)
    raise AssertionError("the last shape is always taken")


def _progress(wait: Wait, total: int) -> Callable[[], None]:
    began, done = time.perf_counter(), 0

    def passed() -> None:
        nonlocal done
        done = min(done + 1, total)
        left = (time.perf_counter() - began) / done * (total - done)
        wait.update(done, total, f"about {left:.0f} s left")

    return passed


def _machine(made: GraphPasses) -> tuple[float | None, dict[str, Any]]:
    """Bytes per second of a copy in the device's memory, and what the device is; torch's alone is measured."""
    if made.name != "torch":
        from . import machine

        return None, {"device": machine.system()["cpu"]}
    import torch

    from ..tools.bench_card import copy_bandwidth, describe

    device = torch.device(made.device)
    return copy_bandwidth(device, size=1 << 26 if made.device == "cpu" else 1 << 30), describe(device)


def _uncaptured(made: GraphPasses) -> GraphPasses:
    from ..backends import cuda
    from ..backends.cuda.passes import CardPasses

    assert isinstance(made, CardPasses)  # which alone captures
    return cuda.plain(made)


def _captured_equals_plain(made: GraphPasses, plan: Plan) -> bool:
    """Whether two canvases' drafts are the same, token for token, through graphs and launched one by one."""
    from dataclasses import replace

    from ..tools.bench import drafts

    short = replace(plan, canvases=2)
    captured, plain = (drafts(one, short) for one in (made, _uncaptured(made)))
    return all((a == b).all() for a, b in zip(captured, plain, strict=True))


def _profile(made: GraphPasses, plan: Plan) -> list[dict[str, Any]]:
    import torch

    from ..core.engine import Engine
    from ..tools.bench import Batch
    from ..tools.bench_card import profile

    def work() -> list[dict[str, Any]]:
        batch = Batch(made, plan, room=made.config.canvas_length)
        batch.step(0, 0)()

        def run() -> None:
            for i in range(1, 5):
                batch.step(i, 0)()

        found = profile(run, torch.device(made.device), passes=4)
        batch.close()
        return found

    return Engine(made, None, prefix_bytes=0).run("profiling", work)


def _show(out: Console, row: dict[str, Any]) -> None:
    """The card."""
    from rich.table import Table

    table = Table(title=f"{row['shape']}, {row['recipe']}, {row['device']}", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    share, arriving = row["share_of_copy"], row["arriving_tokens_per_second"]
    lines = [
        ("tokens per second", f"{row['tokens_per_second']:,.0f}"),
        ("through the engine, one request", f"{row['engine_tokens_per_second']:,.0f}"),
        *([("through the engine, all at once", f"{arriving:,.0f}")] if arriving is not None else []),
        ("a forward, of " + f"{row['steps']} + 1", f"{row['forward_ms']:.2f} ms"),
        ("denoising pass, commit", f"{row['denoise_ms']:.2f} ms, {row['commit_ms']:.2f} ms"),
        (f"prompt of {row['context']:,} read", f"{row['prefill_ms']:.1f} ms"),
        ("first draft after", f"{row['first_draft_ms']:.1f} ms"),
        ("a pass reads", f"{row['forward_gb']:.3g} GB, {row['gb_per_second']:,.4g} GB/s"),
        ("of a copy's bandwidth", "not measured" if share is None else f"{100 * share:.3g} %"),
        ("weights", f"{row['weights_gb']:.3g} GB"),
        ("peak memory", "not counted" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB"),
        ("batch, passes captured", f"{row['batch']}, {'yes' if row['captured'] else 'no'}"),
    ]
    for name, value in lines:
        table.add_row(name, value)
    out.print(table)
    if "profile" in row:
        ops = Table(title="one denoising pass", title_justify="left")
        for name, how in (("kernel", "left"), ("ms", "right"), ("launches", "right")):
            ops.add_column(name, justify=how)  # type: ignore[arg-type]
        for one in row["profile"][:SHOWN]:
            ops.add_row(one["kernel"], f"{one['ms']:.3f}", f"{one['launches']:g}")
        out.print(ops)
