"""A Sudoku filled in: the givens are held, each blank is a hole of one token.

    python examples/canvas/sudoku.py                                          # a 6x6 board, on nano, for real
    python examples/canvas/sudoku.py '.3.1 .2.. .... ...4' --candidates 4

The board stands twice: in the prompt, in the form that nano was trained to answer, and as the shape of the answer. So
no given can change, and what is committed differs from the board in its blanks alone.
"""

from __future__ import annotations

import click

import dgemma

BOARD = "3..2.. 2..5.. 5.216. ..1.5. ...63. .6.425"


@click.command()
@click.argument("board", default=BOARD)
@click.option("--model", default="nano", show_default=True)
@click.option("--candidates", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
def main(board: str, model: str, candidates: int, seed: int) -> None:
    """Fill BOARD in: rows apart, a dot for each blank."""
    rows = board.split()
    shape = "\n".join(rows)
    loaded = dgemma.load(model)
    for found in loaded.fill(shape.replace(".", "<fill:1>"), shape, n=candidates, seed=seed):
        assert all(given in (".", cell) for given, cell in zip(shape, found.text, strict=True))
        click.echo(found.text)
        click.echo(f"score {found.score:.3f}, {found.stats.steps} passes\n", err=True)


if __name__ == "__main__":
    main()
