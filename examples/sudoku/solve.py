"""Solve one board with a DiffusionGemma checkpoint and check the answer.

    python examples/sudoku/solve.py 3..2..2..5..5.216...1.5....63..6.425
    python examples/sudoku/solve.py < board.txt

A board stands in one line or in rows; '.', '0', '_' or '*' is a blank.
"""

from __future__ import annotations

import sys

import click
import numpy as np

import boards
import dgemma


def answer(text: str, board: np.ndarray) -> np.ndarray | None:
    """The board in a model's answer, or None where it wrote something else."""
    try:
        found = boards.parse(text)
    except ValueError:
        return None
    return found if len(found) == len(board) else None


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("board", nargs=-1)
@click.option("--model", default="nano", show_default=True, help="Shipped name, folder or hub id.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Print the solved board alone.")
def main(board: tuple[str, ...], model: str, backend: str, seed: int, quiet: bool) -> None:
    """Solve a 4x4 or 6x6 BOARD; exit code 1 if the answer is wrong."""
    text = "\n".join(board) if board else sys.stdin.read()
    try:
        puzzle = boards.parse(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    size = boards.SIZES[int(np.sqrt(len(puzzle)))]
    solutions = boards.solve(puzzle, size)
    if not quiet and len(solutions) != 1:
        click.echo(f"note: this board has {'no solution' if not solutions else 'more than one solution'}", err=True)
    try:
        result = dgemma.load(model, backend=backend).generate(boards.render(puzzle), seed=seed)
    except dgemma.DgemmaError as error:
        raise click.ClickException(str(error)) from None
    click.echo(result.text)
    found = answer(result.text, puzzle)
    right = found is not None and boards.check(puzzle, found)
    if not quiet:
        click.echo(f"{'correct' if right else 'WRONG'}, {result.stats.steps} denoising steps", err=True)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
