"""What a user might wonder about an answer, said in one line."""

from __future__ import annotations

import re

from ..core.events import Done

PLAYS_SUDOKU = "nano"
"""The packaged model that knows nothing else."""
TEXT_MODEL = "google/diffusiongemma-26B-A4B-it"


def about(model: str, prompt: str, *, text: str, thinking: str, done: Done) -> str | None:
    """Return a note about an answer, if it calls for one.

    Args:
        model: the name that it was loaded by.
        prompt: the user's newest message.
        text: the answer, and `thinking` what came before it.
        done: how it ended.
    """
    if model == PLAYS_SUDOKU and not is_board(prompt):
        return (
            f"nano only plays Sudoku: give it a board of 4x4 or 6x6 cells, a dot for each blank, such as "
            f"'.3.1 .2.. .... ...4'; text is answered by a larger model (--model {TEXT_MODEL})"
        )
    if text.strip():
        return None
    if thinking.strip() and done.finish_reason == "length":
        return "the answer is empty: thinking took the whole budget; raise --max-new-tokens, or leave --thinking out"
    if thinking.strip():
        return "the answer is empty: the model ended after thinking; try another --seed"
    if done.stats.emitted_tokens:
        return "the answer is empty: all that was written is white space, or was cut by --stop"
    return (
        "the answer is empty: the model wrote its end token at once; look at the prompt (is it in the form that this "
        "model was trained on? --raw leaves the chat template out), at --stop, or try another --seed"
    )


def without_template(model: str) -> str:
    """Return what to say where text goes in as it stands though nobody asked for that."""
    return f"{model} has no chat template: prompts go in as they stand, as with --raw"


def is_board(prompt: str) -> bool:
    cells = "".join(prompt.split())
    return len(cells) in (16, 36) and re.fullmatch("[1-6.]+", cells) is not None
