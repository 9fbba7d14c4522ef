"""A JSON record out of free text, by schema: the answer is an object of the class, whatever the model knows.

    python examples/canvas/record.py                            # on nano: the form is right, and the content is not
    python examples/canvas/record.py --model google/diffusiongemma-26B-A4B-it

nano has learnt Sudoku and nothing else, so what it writes here is noise in the right form. `log P` says so: it is the
logarithm of the probability that the model itself gave to the form in the last pass, near 0 where it knows what is
asked, and far below where the constraint alone holds the answer together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import click

import dgemma

ADVERT = """For sale: a blue Peugeot bicycle of 1987, 56 cm frame, ridden every day until last week.
New brake cables. 140 euros, collection in Lyon only. Ask for Margaux."""


@dataclass
class Advert:
    """What is looked for. Names, order and limits are the schema's."""

    item: Annotated[str, {"maxLength": 24}]
    colour: Literal["black", "blue", "green", "red", "white", "other"]
    year: Annotated[int, {"minimum": 1900, "maximum": 2100}]
    price: Annotated[int, {"minimum": 0, "maximum": 100000}]
    collection_only: bool


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--steps", default=12, show_default=True, help="Cap on the passes of a canvas.")
@click.option("--seed", default=0, show_default=True)
def main(model: str, steps: int, seed: int) -> None:
    """Print the record that is read out of an advertisement."""
    loaded = dgemma.load(model)
    prompt = f"{ADVERT}\n\nAnswer with a JSON object: item, colour, year, price, collection_only."
    made = loaded.generate(prompt, max_new_tokens=160, steps=steps, seed=seed, schema=Advert)
    print(made.text)
    print(made.parsed)
    print(f"{made.stats.steps} passes, log P {made.stats.log_accept:.1f}")


if __name__ == "__main__":
    main()
