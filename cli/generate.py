"""`dgemma generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import live_option, model_options, read_prompt, sampling_options


@click.command(short_help="Answer one prompt.")
@click.argument("prompt", required=False)
@click.option(
    "--file", "-f", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PATH",
    help="Read the prompt from a UTF-8 file.",
)  # fmt: skip
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it stands, without the chat template.")
@model_options
@sampling_options
@live_option
@click.option("--json", "as_json", is_flag=True, help="Write every event as one line of JSON: drafts, text, figures.")
def generate(
    prompt: str | None,
    file: Path | None,
    raw: bool,
    model: str,
    backend: str,
    device: str,
    dtype: str,
    live: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPT, or the text of --file, or what comes in on stdin (PROMPT may then be left out, or be -).

    On a terminal the canvas is drawn while it is denoised. Into a pipe or a file goes the answer alone; figures,
    progress and what the model thinks go to stderr.
    """
    text = read_prompt(prompt, file)
    from .output import consoles, follow, footer, load_model, open_sink

    out, errors = consoles()
    loaded = load_model(errors, model, backend=backend, device=device, dtype=dtype)
    events = loaded.stream(text, raw=raw, **sampling)
    done = follow(events, open_sink(out, errors, loaded, live=live, as_json=as_json, budget=sampling["max_new_tokens"]))
    if not as_json:
        footer(errors, done)
