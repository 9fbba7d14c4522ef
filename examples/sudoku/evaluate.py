"""Solve rates on held-out boards, by number of givens.

    python examples/sudoku/evaluate.py --model models/nano

Boards share the engine's passes; the first few are solved one at a time as well, by `generate`, and the two must agree.
The boards are of the held-out part, and come from a pool of their own besides.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import click
import numpy as np
import torch

import boards
import dgemma
import sampling


@click.command()
@click.option("--model", "name", default="nano", show_default=True)
@click.option("--count", default=1000, show_default=True, help="Held-out boards of each size.")
@click.option("--alone", default=8, show_default=True, help="Boards of each size solved one at a time besides.")
@click.option("--seed", default=0, show_default=True, help="Sampling seed of the first board; the others count up.")
@click.option("--steps", default=None, type=int)
@click.option("--t-min", default=None, type=float)
@click.option("--t-max", default=None, type=float)
@click.option("--entropy-bound", default=None, type=float)
@click.option("--confidence", default=None, type=float)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    name: str, count: int, alone: int, seed: int, steps: int | None, t_min: float | None, t_max: float | None,
    entropy_bound: float | None, confidence: float | None, dtype: str, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Print the share of held-out boards that are solved exactly."""
    torch.set_num_threads(threads)
    model = dgemma.load(name, backend="torch", device="cpu", dtype=dtype)
    model.engine.most_rows = sampling.ROWS
    given = {"steps": steps, "t_min": t_min, "t_max": t_max, "entropy_bound": entropy_bound, "confidence": confidence}
    options = {key: value for key, value in given.items() if value is not None}
    sampler = replace(model.generation.sampler, **options)
    for side in (4, 6):
        tests, solutions = sampling.held_out_set(boards.source(side, seed=1), count)
        right, took = sampling.solve_rate(model.engine, sampler, tests, solutions, seed)
        same = 0
        for i in range(min(alone, count)):
            made = model.generate(boards.render(tests[i]), seed=seed + i, **options)
            solved = made.text == boards.render(solutions[i])
            assert solved == bool(right[i]), f"board {i}: alone it has another answer"
            same += made.stats.steps == took[i]
        table = sampling.by_givens(tests, right)
        row = {"side": side, "boards": count, "solved": float(right.mean()), "steps": float(np.mean(took))}
        if as_json:
            print(json.dumps(row | {"by_givens": table, "sampler": asdict(sampler)}))
            continue
        print(f"{side}x{side}: {right.sum()} of {count} solved ({right.mean():.2%}), {took.mean():.1f} steps a board")
        print("  givens  solved  boards")
        for givens, (solved, total) in table.items():
            print(f"  {givens:6d}  {solved / total:6.1%}  {total:6d}")
        print(f"  {same} of {min(alone, count)} boards took the same number of steps alone")


if __name__ == "__main__":
    main()
