"""Code filled into a file: the body of a function, from its signature and docstring above and what follows it below.

    python examples/canvas/infill.py --length 24                              # on nano: well placed, and no code
    python examples/canvas/infill.py --model google/diffusiongemma-26B-A4B-it
    python examples/canvas/infill.py --file program.py --start 12 --end 20    # lines that are cut out and written anew

What is left of the hole is prompt, what follows it is held on the canvas with it, and the file comes back byte for byte
outside. Each length that the hole may have is looked at once, and the file below tells which.
"""

from __future__ import annotations

from pathlib import Path

import click

import dgemma

FILE = '''\
def median(values):
    """Return the middle one of some numbers, or the mean of the two in the middle."""
    ordered = sorted(values)
@
    return (ordered[middle - 1] + ordered[middle]) / 2


assert median([3, 1, 2]) == 2
assert median([4, 1, 2, 3]) == 2.5
'''


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another file.")
@click.option("--start", type=click.IntRange(min=1), help="First line that is cut out of it.")
@click.option("--end", type=click.IntRange(min=1), help="Last line of them.")
@click.option("--length", type=click.IntRange(min=1), help="Tokens of the hole.  [default: what fits]")
@click.option("--candidates", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--steps", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
def main(
    model: str, file: Path | None, start: int | None, end: int | None, length: int | None, candidates: int, steps: int,
    seed: int,
) -> None:  # fmt: skip
    """Print the file with its hole filled, the likeliest candidate first."""
    if file is None:
        left, _, right = FILE.partition("@")
    elif start is None or end is None or end < start:
        raise click.UsageError("--file needs --start and --end: the lines that are cut out")
    else:
        lines = file.read_bytes().decode().split("\n")
        left, right = "\n".join([*lines[: start - 1], ""]), "\n".join(["", *lines[end:]])
    loaded = dgemma.load(model)
    for found in loaded.fill([left, dgemma.Hole(length), right], n=candidates, steps=steps, seed=seed):
        assert found.text.startswith(left) and found.text.endswith(right)
        click.echo(found.text)
        click.echo(f"score {found.score:.3f}, {len(found.holes[0].token_ids)} tokens in the hole\n", err=True)


if __name__ == "__main__":
    main()
