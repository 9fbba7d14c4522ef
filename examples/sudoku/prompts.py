"""Held-out boards with their solutions, as prompts for `dgemma compare`: JSON lines of prompt, answer and group.

    python examples/sudoku/prompts.py --count 100 > boards.jsonl
    dgemma compare nano nano-4bit --prompts boards.jsonl -n 48

Boards are of the held-out part, from the pool that `evaluate.py` tests with. Digging it takes a minute; `--pool` says
how many to dig, and the boards are shuffled from those.
"""

from __future__ import annotations

import json

import click

import boards
import sampling


@click.command()
@click.option("--count", default=100, show_default=True, help="Boards of each size.")
@click.option("--side", "sides", type=click.Choice(["4", "6"]), multiple=True, default=["4", "6"], show_default=True)
@click.option("--pool", default=None, type=int, help="Boards to dig.  [default: as many as evaluate.py does]")
def main(count: int, sides: tuple[str, ...], pool: int | None) -> None:
    """Write boards to stdout."""
    for side in sides:
        tests, solutions = sampling.held_out_set(boards.source(int(side), seed=1, pool=pool), count)
        for board, solution in zip(tests, solutions, strict=True):
            one = {"prompt": boards.render(board), "answer": boards.render(solution), "group": f"{side}x{side}"}
            click.echo(json.dumps(one))


if __name__ == "__main__":
    main()
