"""`dgemma generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .keep import record_options
from .options import (
    Command,
    live_option,
    model_options,
    option,
    prompt_options,
    read_prompt,
    sampling_options,
    shown_options,
)  # fmt: skip


@click.command(cls=Command, short_help="Answer one prompt.")
@prompt_options
@model_options
@sampling_options
@live_option
@record_options
@option(
    "--format", "form", type=click.Choice(["text", "result", "events"]), default="text", show_default=True,
    group="Output", help="text: the answer alone. result: one JSON object at the end. events: a line of JSON for each "
    "draft, text and figure, as it comes.",
)  # fmt: skip
@option("--json", "as_events", is_flag=True, group="Output", help="The same as --format events.")
@shown_options
def generate(
    prompt: str | None,
    file: Path | None,
    system: str | None,
    raw: bool,
    model: str,
    revision: str | None,
    backend: str,
    device: str,
    dtype: str,
    live: bool,
    form: str,
    as_events: bool,
    quiet: bool,
    stats: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPT, or the text of --file, or what comes in on stdin (PROMPT may then be left out, or be -).

    On a terminal the canvas is drawn while it is denoised. Into a pipe or a file goes the answer alone; figures,
    progress and what the model thinks go to stderr. An empty answer is no error: a note says what to look at.
    """
    if as_events and form == "result":
        raise click.UsageError("--json gives events: leave it out, or --format result")
    if raw and system is not None:
        raise click.UsageError("--system stands in the chat template, which --raw leaves out")
    text = read_prompt(prompt, file)
    from . import notes
    from .output import consoles, footer, load_model, note
    from .sinks import follow, open_sink

    form = "events" if as_events else form
    out, errors = consoles(quiet=quiet)
    loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)
    asked = text if system is None else messages(system, text)
    events = loaded.stream(asked, raw=raw, **sampling)
    if not raw and not loaded.tokenizer.has_template:
        note(errors, notes.without_template(model))
    sink = open_sink(out, errors, loaded, live=live, form=form, budget=sampling["max_new_tokens"])
    done = follow(events, sink)
    if said := notes.about(model, text, text=sink.answer, thinking=sink.thinking, done=done):
        note(errors, said)
    if form == "text" or stats:
        footer(errors, done, full=stats)


def messages(system: str | None, text: str) -> list[dict[str, str]]:
    """One turn of a conversation, behind a system prompt."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": text}]
