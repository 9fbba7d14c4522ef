"""`dgemma batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.errors import DgemmaError
from .options import (
    Command,
    model_options,
    option,
    raw_option,
    read_file,
    sampling_options,
    specials_option,
    system_option,
)


@click.command(cls=Command, short_help="Answer a file of prompts.")
@click.argument("prompts", type=click.Path(path_type=Path, allow_dash=True), metavar="IN.jsonl")
@option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE", group="Output",
    help="The file of results. One that is there is gone on with.",
)  # fmt: skip
@option("--force", is_flag=True, group="Output", help="Begin anew, in place of the results in FILE.")
@option("--quiet", "-q", is_flag=True, group="Output", help="Say nothing on stderr but errors.")
@system_option
@raw_option
@specials_option
@model_options
@sampling_options
def batch(
    prompts: Path, out: Path, force: bool, quiet: bool, system: str | None, raw: bool, model: str, revision: str | None,
    backend: str, device: str, dtype: str, **sampling: Any,
) -> None:  # fmt: skip
    """Answer every line of IN.jsonl (- is stdin) and write the results, a line of JSON each, to FILE.

    A line is a prompt as a JSON string, or an object with a "prompt" or "messages". The object may have a "system"
    prompt and settings of its own, spelled as the options below ("seed", "max_new_tokens", ...); whatever else is in
    it is repeated in its result. All lines are checked before the first is answered. Stopped or killed, the same
    command goes on with the lines that have no result yet.

    \b
    dgemma batch boards.jsonl --out answers.jsonl
    {"prompt": ".3.1 .2.. .... ...4", "id": 1}
    """
    if raw and system is not None:
        raise click.UsageError("--system stands in the chat template, which --raw leaves out")
    from ..tools.batch import Item, Results, read_items
    from . import notes
    from .output import Wait, consoles, load_model, note, put_words
    from .sinks import ResultSink, follow

    where = "stdin" if str(prompts) == "-" else str(prompts)
    items = read_items(read_file(prompts), where, options=sampling.keys(), system=system)
    if raw and (chat := next((item.line for item in items if not isinstance(item.asked, str)), None)):
        raise DgemmaError(
            f"{where}: line {chat}: messages and system stand in the chat template, which --raw leaves out"
        )
    settings = sampling | {"raw": raw, "model": model, "revision": revision}
    keys = {item.line: item.key(settings) for item in items}
    _, errors = consoles(quiet=quiet)
    with Results(out, keys, force=force) as results:
        left = [item for item in items if item.line not in results.done]
        empty: list[int] = []
        if left:
            loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)

            def ask(item: Item) -> Any:
                try:
                    return loaded.stream(item.asked, raw=raw, **sampling | dict(item.options))
                except (DgemmaError, TypeError) as error:
                    raise DgemmaError(f"{where}: line {item.line}: {error}") from None

            with Wait(errors, "checking") as wait:
                for i, item in enumerate(left, 1):
                    ask(item)  # checks it
                    wait.update(i, len(left), f"line {item.line} of {items[-1].line}")
            if not raw and not loaded.tokenizer.has_template:
                note(errors, notes.without_template(model))
            try:
                for item in left:
                    head = {"line": item.line, "key": keys[item.line], **item.carried}
                    what = f"line {item.line} of {items[-1].line}"
                    sink = ResultSink(errors, lambda record, head=head: results.append(head | record), what=what)
                    follow(ask(item), sink)
                    if not sink.answer.strip():
                        empty.append(item.line)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on from here") from None
        there = len(items) - len(left)
        if empty:
            many = "1 answer is" if len(empty) == 1 else f"{len(empty)} answers are"
            note(errors, f"{many} empty: line {', '.join(map(str, empty[:8]))}{', ...' if len(empty) > 8 else ''}")
        put_words(errors, f"{len(left)} answered{f', {there} were there already' if there else ''}: {out}")
