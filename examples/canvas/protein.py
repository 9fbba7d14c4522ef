"""A protein of a given length with motifs at given places: an alphabet of twenty letters, and what must stand where.

    python examples/canvas/protein.py                           # on nano: valid, and biologically meaningless
    python examples/canvas/protein.py --length 60 --motif 20:HEXXH --motif 40:N[^P][ST]

The motifs are patterns in the alphabet, X for any residue: HExxH is the zinc-binding motif of metallopeptidases, and
N-{P}-[ST] where a glycan is attached. Positions count residues, not tokens, so a vocabulary whose tokens are several
letters keeps them too: the automaton runs on characters.
"""

from __future__ import annotations

import re

import click

import dgemma

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
PART = re.compile(r"\[\^?[A-Z]+\]|[A-Z]")


def pattern(length: int, motifs: dict[int, str]) -> str:
    """Return what matches a sequence of `length` residues, methionine first, with motifs from some positions on."""
    places = ["M"] + [f"[{RESIDUES}]"] * (length - 1)
    for start, motif in motifs.items():
        parts = [part.strip("[]") for part in PART.findall(motif)]
        if start < 1 or start + len(parts) - 1 > length:
            raise click.UsageError(f"motif {motif} at {start} does not fit into {length} residues")
        for at, part in enumerate(parts, start - 1):
            excluded = part.startswith("^")
            allowed = RESIDUES if part == "X" else [one for one in RESIDUES if (one in part) != excluded]
            places[at] = f"[{''.join(allowed)}]"
    return "".join(places)


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--length", default=40, show_default=True, type=click.IntRange(min=1), help="Residues.")
@click.option("--motif", "motifs", multiple=True, default=["12:HEXXH", "27:N[^P][ST]"], metavar="POSITION:MOTIF")
@click.option("--seed", default=0, show_default=True)
def main(model: str, length: int, motifs: tuple[str, ...], seed: int) -> None:
    """Print a sequence, and below it what was asked for."""
    wanted = {int(start): motif for start, _, motif in (one.partition(":") for one in motifs)}
    asked = pattern(length, wanted)
    loaded = dgemma.load(model)
    made = loaded.generate("Write a protein sequence.", max_new_tokens=length + 1, seed=seed, steps=16, regex=asked)
    assert re.fullmatch(asked, made.text)
    print(made.text)
    marked = {start + i for start, motif in wanted.items() for i in range(len(PART.findall(motif)))}
    print("".join("^" if at in marked else " " for at in range(1, length + 1)))
    print(f"{made.stats.steps} passes, log P {made.stats.log_accept:.1f}")


if __name__ == "__main__":
    main()
