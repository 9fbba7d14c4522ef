"""`dgemma compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from .convert import amount
from .options import Command, budget_options, read_file, ways_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..tools.agreement import Agreement, Change
    from ..tools.compare import Case, Comparison


@click.command(cls=Command, short_help="Measure what distinguishes two checkpoints.")
@click.argument("a")
@click.argument("b")
@click.option(
    "--prompts", "file", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
    help="Prompts, one a line; or JSON lines of prompt, answer (the right text) and group. - is stdin.",
)  # fmt: skip
@click.option(
    "--prompt", "-p", "one_by_one", multiple=True, metavar="TEXT", help="A prompt. May be given several times."
)
@click.option("--revision-a", metavar="NAME", help="Branch, tag or commit of A, a model on the Hugging Face hub.")
@click.option("--revision-b", metavar="NAME", help="The same of B.")
@ways_options
@budget_options
@click.option("--json", "as_json", is_flag=True, help="Write the figures as one JSON object.")
def compare(
    a: str, b: str, file: Path | None, one_by_one: tuple[str, ...], revision_a: str | None,
    revision_b: str | None, backend: str, device: str, dtype: str, max_new_tokens: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Hold model B against model A: say, a quantized checkpoint against what it was made from.

    Both answer every prompt with the same seeds, which gives passes per canvas and, where answers are known, how many
    are right. Then B reads the very canvases that A has denoised, and their logits are compared. A and B are folders,
    Hugging Face ids or `nano`, with one vocabulary; they are loaded one after the other.

    \b
    dgemma convert nano --out nano-4bit
    python examples/sudoku/prompts.py --count 100 > boards.jsonl
    dgemma compare nano nano-4bit --prompts boards.jsonl
    """
    cases = _cases(file, one_by_one)
    from ..checkpoints.checkpoint import resolve
    from ..core.reader import jsonable
    from ..tools.compare import compare as run
    from .output import Wait, consoles

    out, errors = consoles()
    a, b = (
        name if revision is None else str(resolve(name, revision=revision))
        for name, revision in ((a, revision_a), (b, revision_b))
    )
    with Wait(errors, "comparing") as wait:

        def progress(what: str, done: int, total: int) -> None:
            figure = f"{amount(done)} of {amount(total)}" if "loading" in what else f"prompt {done + 1} of {total}"
            wait.update(done, total, f"{what}: {figure}")

        found = run(
            a, b, cases, max_new_tokens=max_new_tokens, seed=seed, backend=backend, device=device, dtype=dtype,
            progress=progress,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(jsonable(found.to_dict()), allow_nan=False))
    else:
        show(out, found)


def _cases(file: Path | None, one_by_one: tuple[str, ...]) -> list[Case]:
    if file is None and not one_by_one:
        raise click.UsageError("no prompts: give --prompts FILE, or --prompt TEXT")
    from ..tools.compare import Case, read_prompts

    cases = [Case(prompt=text) for text in one_by_one]
    if any(not text.strip() for text in one_by_one):
        raise click.UsageError("a prompt is empty")
    if file is not None:
        where = "stdin" if str(file) == "-" else str(file)
        cases += read_prompts(read_file(file), where)
    return cases


class Row(NamedTuple):
    label: str
    a: str
    b: str
    change: str


def show(console: Console, found: Comparison) -> None:
    """Write the figures: as tables on a terminal, and as the same lines elsewhere."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .output import put_lines

    def say(line: str = "") -> None:
        put_lines(console, [line])

    for letter, side in (("A", found.a), ("B", found.b)):
        say(
            f"{letter}  {side.name}: {amount(side.bytes)} of text weights, {side.bits_per_weight:.2f} bits each; "
            f"{side.backend} on {side.device}, {side.dtype}"
        )
    many, same = found.total.prompts, found.total.same
    prompts = f"{many:,} prompts" if many > 1 else "1 prompt"
    say(f"{prompts}, the same seeds for both; answered with the same tokens: {same:,} ({same / many:.1%})")
    head, rows = Row("", "A", "B", "change"), written(found)
    if not console.is_terminal:
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(3)]
        say()
        for row in (head, *rows):
            cells = [f"{row.label:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in (1, 2)), row.change]
            say("  ".join(cells).rstrip())
        say()
    else:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name, side in zip(head, ("left", "right", "right", "left"), strict=True):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in agreed(found.agreement):
        say(line)


def written(found: Comparison) -> list[Row]:
    """What both wrote freely."""
    tallies = [("", found.total), *((one.group or "no group", one) for one in found.groups)]
    rows = [
        Row(f"  {name}" if name else "steps per canvas", f"{one.steps_a:.2f}", f"{one.steps_b:.2f}",
            _change(one.steps_change, ".2f"))
        for name, one in tallies
    ]  # fmt: skip
    for name, one in tallies:
        if one.rate_change is not None:
            a, b = (f"{solved:,} ({solved / one.answers:.1%})" for solved in (one.solved_a, one.solved_b))
            rows.append(
                Row(f"  {name}" if name else f"right, of {one.answers:,}", a, b, _change(one.rate_change, ".1f", 100))
            )
    if found.total.answers:
        rows.append(Row("right alone", f"{found.total.only_a:,}", f"{found.total.only_b:,}", ""))
    return rows


def _change(one: Change, form: str, factor: float = 1) -> str:
    within = "" if one.within is None else f" ± {factor * one.within:{form}}"
    return f"{factor * one.value:+{form}}{within}{'' if factor == 1 else ' points'}"


def agreed(one: Agreement) -> list[str]:
    """What the logits of both say on the same inputs."""
    return [
        f"on the same inputs, those of A's own {one.passes:,} passes over {one.canvases:,} "
        f"canvas{'' if one.canvases == 1 else 'es'}:",
        f"  logits     NMSE {_short(one.nmse)}, largest difference {_short(one.max_error)}",
        f"  top-1      {one.top1:.2%} of the tokens agree",
        f"  KL(A||B)   {_short(one.kl)} nats a token",
        f"  entropy    {_short(one.entropy_a)} nats a token in A, {_short(one.entropy_b)} in B, "
        f"shift {'+' if one.entropy_shift > 0 else ''}{_short(one.entropy_shift)}",
        "(a change is followed by half of its 95 % interval)",
    ]


def _short(value: float) -> str:
    return f"{value:.3g}"
