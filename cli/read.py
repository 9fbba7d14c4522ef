"""`dgemma read`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import DgemmaError
from .options import (
    Command,
    generate_option,
    model_options,
    option,
    prompt_options,
    read_file,
    read_prompt,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..canvas.questions import Answer
    from ..canvas.read import Reading
    from ..runtime import DiffusionGemma

LITTLE = 0.5
"""A share of all that the model could say, below which the choices' probabilities say little."""


@click.command(cls=Command, short_help="Say how likely answers are, in one pass.")
@prompt_options
@option(
    "--choice", "-c", "choices", multiple=True, metavar="TEXT", group="What is read",
    help="An answer to be weighed; given twice or more.",
)  # fmt: skip
@option(
    "--template", "-t", metavar="TEXT", group="What is read",
    help="The whole answer, with <read> wherever a choice stands.",
)  # fmt: skip
@option(
    "--questions", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE.json", group="What is read",
    help='Questions about the prompt: {"id": {"type": "yes_no", "choice" or "score", "instructions": TEXT, "criteria": '
    '...}}, or a list of them with names; or {"state": ..., "questions": ...}, and no PROMPT. - is stdin.',
)  # fmt: skip
@option("--joint", is_flag=True, group="What is read", help="Ask all questions on one canvas, in one pass.")
@option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", group="Canvas",
    help="Average over the noise of N canvases.",
)  # fmt: skip
@option(
    "--canvas-length", type=click.IntRange(min=1), metavar="N", group="Canvas", show_default="16, or what is needed",
    help="Positions of the canvas.",
)  # fmt: skip
@generate_option("seed")
@model_options
@option("--json", "as_json", is_flag=True, group="Output", help="One JSON object, with every figure.")
@option("--quiet", "-q", is_flag=True, group="Output", help="Say nothing on stderr but errors.")
def read(
    prompt: str | None, file: Path | None, system: str | None, raw: bool, specials: bool, choices: tuple[str, ...],
    template: str | None, questions: Path | None, joint: bool, samples: int, canvas_length: int | None, seed: int,
    model: str, revision: str | None, backend: str, device: str, dtype: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Say how likely each --choice is as the answer to PROMPT, or what is answered to --questions about it.

    Nothing is written: it takes one pass over a short canvas. PROMPT may come from --file or stdin, as in generate. The
    probabilities are the model's own and sum to 1 over the choices; the label mass is what these are of all that it
    could say, and where that is small they say little.
    """
    if questions is not None and (choices or template is not None):
        raise click.UsageError("give --questions, or --choice and --template")
    if questions is None and (len(choices) < 2 or joint):
        raise click.UsageError("--joint is for --questions" if joint else "give --choice twice or more, or --questions")
    if raw and system is not None:
        raise click.UsageError("--system stands in the chat template, which --raw leaves out")
    state, asked = _questions(questions)
    if state is None:
        if questions is not None and str(questions) == "-" and (prompt in (None, "-") and file in (None, Path("-"))):
            raise click.UsageError("--questions - reads stdin: give PROMPT or --file, or put the state into it")
        state = read_prompt(prompt, file)
    elif prompt is not None or file is not None:
        raise click.UsageError("--questions holds a state already: leave PROMPT out")
    from .output import consoles, load_model

    out, errors = consoles(quiet=quiet)
    loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)
    given: dict[str, Any] = {"samples": samples, "seed": seed, "canvas_length": canvas_length}
    given |= {"raw": raw, "specials": specials}
    if asked is not None:
        answers = loaded.read(_behind(system, state), questions=asked, joint=joint, **given)
        _tell_answers(out, errors, answers, as_json=as_json)
    else:
        found = loaded.read(_behind(system, state), list(choices), template, **given)
        _tell_readings(out, errors, loaded, found if isinstance(found, list) else [found], as_json=as_json)


def _questions(file: Path | None) -> tuple[Any, Any]:
    """Return the state that a file of questions holds, or None, and the questions."""
    if file is None:
        return None, None
    text = read_file(file)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).partition("\n")[0]
        raise click.ClickException(f"{'stdin' if str(file) == '-' else file}: not readable as JSON: {why}") from None
    if isinstance(data, dict) and isinstance(data.get("questions"), dict | list) and "type" not in data["questions"]:
        return data.get("state"), data["questions"]
    return None, data


def _behind(system: str | None, state: Any) -> Any:
    if system is None:
        return state
    if not isinstance(state, str):
        raise DgemmaError("--system stands before a prompt of text; put it into the state")
    return [{"role": "system", "content": system}, {"role": "user", "content": state}]


# ---- Telling ----------------------------------------------------------------------------------------------------


def _tell_readings(
    out: Console, errors: Console, model: DiffusionGemma, found: list[Reading], *, as_json: bool
) -> None:  # fmt: skip
    if as_json:
        places = [_record(model, one) for one in found]
        click.echo(json.dumps(places[0] if len(places) == 1 else {"places": places}, ensure_ascii=False))
        return
    for i, one in enumerate(found, 1):
        head = "" if len(found) == 1 else f"place {i}: "
        said = f"likeliest of all: {_text(model, one)!r}"
        _table(out, head, one.probabilities, one.label_mass, one.entropy, said)
        _warn(errors, head, one.label_mass)


def _record(model: DiffusionGemma, one: Reading) -> dict[str, Any]:
    return {
        "choice": one.choice, "probabilities": dict(one.probabilities), "label_mass": one.label_mass,
        "entropy": one.entropy, "full_entropy": one.full_entropy, "token": one.token, "text": _text(model, one),
        "argmax_is_label": one.argmax_is_label,
    }  # fmt: skip


def _text(model: DiffusionGemma, one: Reading) -> str:
    return model.tokenizer.decode([one.token], special=True)


def _tell_answers(out: Console, errors: Console, answers: Mapping[str, Answer], *, as_json: bool) -> None:
    if as_json:
        made = {name: one.as_dict() for name, one in answers.items()}
        click.echo(json.dumps({"answers": made}, ensure_ascii=False))
        return
    for name, one in answers.items():
        shares = dict(one.probabilities)
        if one.question.kind == "predicate":
            shares = {"yes": shares["true"], "no": shares["false"]}
        elif one.question.kind == "score":
            shares = {f"{i} {level}": shares[str(i)] for i, (level, _) in enumerate(one.question.options)}
        mean = f"; score {one.score:.2f}" if one.question.kind == "score" else ""
        _table(out, f"{name}: ", shares, one.label_mass, one.entropy, f"confidence {one.confidence:.2f}{mean}")
        _warn(errors, f"{name}: ", one.label_mass)


def _table(
    out: Console, head: str, shares: Mapping[str, float], mass: float, entropy: float, said: str
) -> None:  # fmt: skip
    """Write what was read: the likeliest first; on a terminal with bars."""
    from rich.table import Table
    from rich.text import Text

    from ..show.frame import printable
    from .output import put_lines

    rows = sorted(shares.items(), key=lambda row: -row[1])
    put_lines(out, [f"{head}label mass {mass:.3g}, entropy {entropy:.3g} nats; {said}"])
    if not out.is_terminal:
        put_lines(out, [f"  {p:.4f}  {_shown(name)}" for name, p in rows])
        return
    table = Table.grid(padding=(0, 1))
    for name, p in rows:
        table.add_row(f"  {p:.4f}", "█" * round(20 * p), Text(printable(_shown(name))))
    out.print(table)


def _shown(name: str) -> str:
    """A choice on a line of its own; quoted where its ends or line breaks would not be seen."""
    return json.dumps(name, ensure_ascii=False) if name != name.strip() or len(name.splitlines()) > 1 else name


def _warn(errors: Console, head: str, mass: float) -> None:
    from .output import note

    if mass < LITTLE:
        note(
            errors,
            f"{head}the choices are {mass:.2g} of all that the model could say there: their probabilities say little",
        )
