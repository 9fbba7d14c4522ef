"""What a canvas that is told more makes of a puzzle: nano's held-out 6×6 boards, solved and passes, by what is known.

    python benchmarks/canvas_sudoku.py --boards 1000

    prompt      the board in the prompt, as nano was trained
    held        and the givens held in the answer, where they belong
    fill        by `model.fill`: the board with a hole of one token for each blank, behind the prompt
    rows        and every row a permutation of 1 to 6, by a regular expression
    held rows   both
    shape       digits in rows and nothing else is asked for, by a regular expression

`--feedback` gives the two with `rows` again, with so much of what the constraint makes of a pass fed back to
self-conditioning. Boards and seeds are the same in every line; lines share nothing else. Rows go to
results/canvas_sudoku.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import rows as results

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))

SIDE = 6


@click.command()
@click.option("--boards", "count", default=1000, show_default=True)
@click.option("--feedback", "mixes", multiple=True, type=float, default=[0.5, 1.0], show_default=True)
@click.option("--steps", default=None, type=int, help="Cap on passes; none is the checkpoint's.")
def main(count: int, mixes: tuple[float, ...], steps: int | None) -> None:
    """Print and append one JSON line for each way of asking."""

    import boards
    import dgemma
    import sampling

    model = dgemma.load("nano", backend="torch", device="cpu", dtype="float32", rows=128)
    tests, solutions = sampling.held_out_set(boards.source(SIDE, seed=1), count)
    prompts, answers = [boards.render(one) for one in tests], [boards.render(one) for one in solutions]
    digit = {str(i): model.tokenizer.encode(str(i))[0] for i in range(1, SIDE + 1)}
    held = [{at: digit[c] for at, c in enumerate(text) if c in digit} for text in prompts]
    every = "".join(f"(?=[1-{SIDE}]{{0,{SIDE - 1}}}{i})" for i in range(1, SIDE + 1))
    rows, shape = (
        rf"(?:{row}\n){{{SIDE - 1}}}{row}" for row in (f"{every}[1-{SIDE}]{{{SIDE}}}", f"[1-{SIDE}]{{{SIDE}}}")
    )
    ways: dict[str, dict[str, Any]] = {
        "prompt": {}, "held": {"held": held}, "fill": {}, "shape": {"regex": shape}, "rows": {"regex": rows},
        "held rows": {"held": held, "regex": rows},
    }  # fmt: skip
    for mix in mixes:
        ways |= {f"{name}, feedback {mix}": ways[name] | {"feedback": mix} for name in ("rows", "held rows")}
    for name, given in ways.items():
        if name == "fill":
            made: list[Any] = [
                model.fill(text.replace(".", "<fill:1>"), prompt=text, seed=seed, steps=steps)
                for seed, text in enumerate(prompts)
            ]
        else:
            made = model.generate(prompts, seed=list(range(count)), steps=steps, **given)
        right = [one.text == answer for one, answer in zip(made, answers, strict=True)]
        kept = [
            all(made_ == given_ for made_, given_ in zip(one.text, text, strict=True) if given_ in digit)
            for one, text in zip(made, prompts, strict=True)
            if len(one.text) == len(text)
        ]
        row = {
            "what": "canvas_sudoku", "way": name, "boards": count, "cap": steps, "solved": sum(right),
            "passes": sum(one.stats.steps for one in made) / count, "givens_kept": sum(kept) / count,
        }  # fmt: skip
        print(json.dumps(results.append("canvas_sudoku", row, "torch")), flush=True)


if __name__ == "__main__":
    main()
