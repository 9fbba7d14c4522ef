"""What a read costs, against a pass of a generation; and what short canvases do to what is read.

    python benchmarks/read.py cost --shape nano     # nano: a canvas of 16 against the checkpoint's 48
    python benchmarks/read.py cost --shape 110m     # random weights: 16 against 256
    python benchmarks/read.py quality               # nano: a cell's digit, by how much of the answer is on the canvas

Sides alternate, so that a busy machine slows both; figures are medians of ratios of neighbours, in processor time with
OMP_NUM_THREADS=1. Rows are appended to benchmarks/results/read.jsonl.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import click
import numpy as np
import rows as results
from engine import BOARDS, random_passes

import dgemma
from dgemma.canvas.places import Layout, Place
from dgemma.canvas.read import Canvas, read
from dgemma.canvas.reader import Look, Reader
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.passes import Passes
from dgemma.core.sampler import draws_of, first_canvas, stacked


@click.group(help=__doc__)
def main() -> None:
    pass


def timed(run: Callable[[], Any]) -> float:
    """Seconds of processor time, of all threads: other work on the machine counts for less in it than in a clock's."""
    began = time.process_time()
    run()
    return time.process_time() - began


class Generation:
    """Rows in the middle of a canvas, one behind a prompt each, that take a pass whenever they are told to."""

    def __init__(self, engine: Engine, prompt: tuple[int, ...], rows: int) -> None:
        self.engine, self.length = engine, engine.passes.config.canvas_length
        passes = engine.passes
        self.slots = engine.run("opening", lambda: [passes.open_behind(prompt, self.length) for _ in range(rows)])
        vocab = passes.config.vocab_size
        noise = first_canvas(0, 0, self.length, vocab)
        one = draws_of(SamplerConfig(), seed=0, canvas=0, step=0, length=self.length, vocab_size=vocab)
        self.draws = stacked([one] * rows)
        engine.run("beginning", lambda: passes.step(self.slots, self.draws, dict.fromkeys(self.slots, noise))())

    def step(self) -> None:
        self.engine.run("generating", lambda: self.engine.passes.step(self.slots, self.draws, {})())


@main.command()
@click.option("--shape", type=click.Choice(["nano", "110m"]), default="nano")
@click.option("--repeats", default=15)
@click.option("--rows", default=8, help="Questions that come at once.")
def cost(shape: str, repeats: int, rows: int) -> None:
    if shape == "nano":
        model = dgemma.load("nano", backend="torch", dtype="float32")
        engine, prompt = model.engine, tuple(model.prompt_ids(BOARDS[0]))
    else:
        passes: Passes = random_passes("110m")
        engine, prompt = Engine(passes, None), tuple(np.random.default_rng(0).integers(3, 1000, 64).tolist())
    reader, config = Reader(engine), engine.passes.config
    layout = Layout(tokens=(5,), places=(Place(start=0, choices=("yes", "no"), strings=((5,), (6,))),))
    canvas = Canvas(vocab_size=config.vocab_size, end=1, fillers=(1,))

    def ask(samples: int) -> None:
        read(reader, [(prompt, layout)], replace(canvas, samples=samples))

    one, many = Generation(engine, prompt, 1), Generation(engine, prompt, rows)
    found: dict[str, list[float]] = {
        name: [] for name in ("one", "together", "together_of_one_pass", "pass_ms", "read_ms")
    }
    for _ in range(repeats + 2):
        step = timed(one.step)
        alone = timed(lambda: ask(1))
        steps = timed(many.step)
        together = timed(lambda: ask(rows))  # as many canvases as questions would be
        found["one"].append(alone / step)
        found["together"].append(together / steps)  # of a pass of as many rows
        found["together_of_one_pass"].append(together / rows / step)
        found["pass_ms"].append(1e3 * step)
        found["read_ms"].append(1e3 * alone)
    name = f"{shape}_16_of_{config.canvas_length}"
    show("cost", {"rows": rows, **{f"{name}_{key}": statistics.median(some[2:]) for key, some in found.items()}})


@main.command()
@click.option("--count", default=100, help="Boards of 6x6.")
def quality(count: int) -> None:
    """The digits of the first two rows' blank cells, by how long the canvas is and by what of the answer is on it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
    import boards as sudoku
    from sampling import held_out_set

    model = dgemma.load("nano", backend="torch", dtype="float32")
    reader, vocab = model.reader, model.config.vocab_size
    digits, end = [model.tokenizer.encode(str(i))[0] for i in range(1, 7)], model.tokenizer.encode("<turn|>")[0]
    tests, solutions = held_out_set(sudoku.source(6), count)
    kinds = [(length, shown) for length in (16, 32, 48) for shown in ("nothing", "givens")]
    kinds += [(16, f"end, {behind}") for behind in ("eos", "pad", "noise")] + [(48, "all")]
    for length, shown in kinds:
        looks, right = [], []
        for i, (board, solution) in enumerate(zip(tests, solutions, strict=True)):
            answer = [*model.tokenizer.encode(sudoku.render(np.asarray(solution))), end, *[1] * 6]
            cells = model.tokenizer.encode(sudoku.render(np.asarray(board)))
            blanks = [at for at in range(13) if cells[at] not in digits and answer[at] in digits]
            if shown.startswith("end"):
                blanks = [at for at in blanks if at == 0]
            if not blanks:
                continue
            canvas = first_canvas(i, 0, length, vocab)
            for at in range(length):
                given = at < len(cells) and (cells[at] in digits or answer[at] not in digits)
                if (shown == "givens" and given) or (shown == "all" and at not in blanks[:1]):
                    canvas[at] = answer[at]
                if shown.startswith("end") and (at == 1 or (at > 1 and shown[5:] != "noise")):
                    canvas[at] = end if at == 1 else int(shown[5:] == "eos")
            at = blanks[:1] if shown == "all" else blanks
            looks.append(
                Look(prompt=tuple(model.prompt_ids(sudoku.render(np.asarray(board)))), canvas=canvas, at=tuple(at))
            )
            right.append([digits.index(answer[one]) for one in at])
        found = reader.scores(looks, digits)
        logs = np.concatenate([one.log_p for one in found])
        mass = np.exp(np.logaddexp.reduce(logs, 1))
        shares = np.exp(logs) / mass[:, None]
        truth = np.concatenate(right)
        sure, hit = shares.max(1), shares.argmax(1) == truth
        bins = np.minimum((sure * 10).astype(int), 9)
        gap = sum(abs(sure[bins == i].mean() - hit[bins == i].mean()) * (bins == i).mean() for i in set(bins.tolist()))
        show(
            "quality",
            {
                "canvas": length, "shown": shown, "cells": len(truth), "right": float(hit.mean()),
                "said": float(sure.mean()), "calibration_error": float(gap), "label_mass": float(mass.mean()),
                "nats": float(-np.log(shares[np.arange(len(truth)), truth]).mean()),
            },
        )  # fmt: skip


@main.command()
@click.option("--count", default=40, help="Boards of 6x6.")
@click.option("--most", default=24, help="Rows to choose from.")
def chains(count: int, most: int) -> None:
    """The first row of six digits among those that its givens allow, by three ways of weighing several tokens."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
    import boards as sudoku
    from sampling import held_out_set

    model = dgemma.load("nano", backend="torch", dtype="float32")
    reader, vocab = model.reader, model.config.vocab_size
    digits = [model.tokenizer.encode(str(i))[0] for i in range(1, 7)]
    nats: dict[str, list[float]] = {"chain": [], "product": [], "each_given_the_rest": []}
    right: dict[str, list[bool]] = {way: [] for way in nats}
    for i, (board, solution) in enumerate(zip(*held_out_set(sudoku.source(6), count), strict=True)):
        row, truth = np.asarray(board).reshape(-1)[:6], tuple((np.asarray(solution).reshape(-1)[:6] - 1).tolist())
        rows_ = [
            one for one in permutations(range(6)) if all(not g or g - 1 == d for g, d in zip(row, one, strict=True))
        ]
        np.random.default_rng(i).shuffle(rows_)
        some = [tuple(one) for one in rows_ if tuple(one) != truth][: most - 1]
        some = [truth, *(tuple(map(int, one)) for one in some)]
        if len(some) < 2:
            continue
        prompt, noise = tuple(model.prompt_ids(sudoku.render(np.asarray(board)))), first_canvas(i, 0, 16, vocab)

        def look(known: dict[int, int], at: tuple[int, ...], prompt: Any = prompt, noise: Any = noise) -> Look:
            canvas = noise.copy()
            for position, digit in known.items():
                canvas[position] = digits[digit]
            return Look(prompt=prompt, canvas=canvas, at=at)

        nodes = list(dict.fromkeys(one[:n] for one in some for n in range(6)))
        rest = [(one, n) for one in some for n in range(6)]
        looks = [look(dict(enumerate(node)), (len(node),)) for node in nodes] + [look({}, tuple(range(6)))]
        looks += [look({p: d for p, d in enumerate(one) if p != n}, (n,)) for one, n in rest]
        found = reader.scores(looks, digits)
        step = {node: scores.log_p[0] for node, scores in zip(nodes, found, strict=False)}
        alone = found[len(nodes)].log_p
        each = {key: scores.log_p[0] for key, scores in zip(rest, found[len(nodes) + 1 :], strict=True)}
        logs = {
            "chain": [sum(step[one[:n]][one[n]] for n in range(6)) for one in some],
            "product": [sum(alone[n][one[n]] for n in range(6)) for one in some],
            "each_given_the_rest": [sum(each[one, n][one[n]] for n in range(6)) for one in some],
        }
        for way, values in logs.items():
            nats[way].append(float(np.logaddexp.reduce(values) - values[0]))
            right[way].append(int(np.argmax(values)) == 0)
    for way in nats:
        figures = {"right": statistics.mean(right[way]), "nats": statistics.mean(nats[way])}
        show("chains", {"way": way, "boards": len(nats[way]), **figures})


def show(name: str, found: dict[str, Any]) -> None:
    row = results.append("read", {"measured": name, **found, "threads": os.environ.get("OMP_NUM_THREADS")}, "torch")
    told = (f"{what} {figure if isinstance(figure, str) else round(figure, 4)}" for what, figure in found.items())
    click.echo(f"{', '.join(told)}   ({row['machine']})")


if __name__ == "__main__":
    main()
