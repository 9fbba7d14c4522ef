"""A text with holes and what is asked of it, checked and laid out for the engine before any pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import DgemmaError
from ..core.given import ids_of, integer
from ..core.options import GenerateOptions
from .borders import Speller
from .candidate import Candidate, Filled, Job, ranked
from .holes import LONGEST, MARKER, Hole, Template, marked, template_of
from .language import Text, text_of
from .model import Model, Prompt, end_of, has_messages
from .windows import Laid, fits_whole, next_start, window_at

QUARTER = 4
"""An open hole has room for a quarter of a canvas, where nothing else is said."""

FURTHER = """\
Write a text from its beginning. Further down it goes on as shown between the lines of dashes{holes}; write it so that \
it leads there.
-----
{text}
-----"""
"""What the model is told of text that its canvas has no room for."""

GAPS = " ({marker} stands for what is still missing there)"


def fill(
    model: Model, text: str | Sequence[str | Hole], prompt: Prompt | None, options: GenerateOptions, *,
    n: int | None = None, marker: str = MARKER, lengths: Sequence[int] | None = None,
) -> Filled | list[Filled]:  # fmt: skip
    """See `DiffusionGemma.fill`."""
    if n is not None:
        integer("n", n, 1, 1 << 20)
    job = job_of(model, text, prompt, options, marker=marker, lengths=lengths)
    seeds = [(int(options.seed) + i) % (1 << 64) for i in range(n or 1)]
    found = ranked([Candidate(job, seed=seed, drafts=False) for seed in seeds])
    return found[0] if n is None else found


def stream_fill(
    model: Model, text: str | Sequence[str | Hole], prompt: Prompt | None, options: GenerateOptions, *,
    marker: str = MARKER, lengths: Sequence[int] | None = None,
) -> Candidate:  # fmt: skip
    """See `DiffusionGemma.stream_fill`."""
    candidate = Candidate(job_of(model, text, prompt, options, marker=marker, lengths=lengths), seed=int(options.seed))
    candidate.begin()
    return candidate


def job_of(
    model: Model, text: str | Sequence[str | Hole], prompt: Prompt | None, options: GenerateOptions, *,
    marker: str = MARKER, lengths: Sequence[int] | None = None,
) -> Job:  # fmt: skip
    """Check what is asked, and lay it out.

    Raises:
        DgemmaError: as `DiffusionGemma.fill`.
    """
    template = template_of(text, marker)
    tokenizer = model.tokenizer
    base = model.request([0], options)
    size = base.canvas_length or model.config.canvas_length
    speller = Speller(tokenizer, specials=options.specials and prompt is None)
    ends = base.eos_token_ids
    end = end_of(tokenizer, ends) if prompt is not None and not options.raw else None
    first = prompt is None
    pieces = tuple(
        tuple(speller.ids(piece, first=first and i == 0)) for i, piece in enumerate(template.pieces)
    )  # fmt: skip
    closed = end if template.pieces[-1] or template.holes[-1].length is not None else None
    laid = _laid(template, pieces, size, prompted=prompt is not None, end=closed, room=_most(lengths, options))
    told = _told(_hidden(template, laid, speller, marker), marker)
    ids = _prompt(model, prompt, told, options, laid)
    written, filler = tokens_of(model, ends)
    job = Job(
        engine=model.engine, reader=model.reader, speller=speller, template=template,
        laid=laid, prompt=tuple(ids), end=closed, base=base,
        text=written, filler=filler, stop=options.stops, lengths=_lengths(lengths),
    )  # fmt: skip
    check_room(job)
    return job


def _most(lengths: Sequence[int] | None, options: GenerateOptions) -> int | None:
    """Return the room that is asked for an open hole: the longest of its lengths, where these are given."""
    if lengths is None or not (given := ids_of(lengths, "lengths")):
        return options.max_new_tokens
    for length in given:
        integer("lengths", length, 1, LONGEST)
    if options.max_new_tokens is not None and max(given) > options.max_new_tokens:
        raise DgemmaError(
            f"lengths go up to {max(given):,}, and max_new_tokens, the most that a hole may take, is "
            f"{options.max_new_tokens:,}: leave one of them out"
        )
    return max(given)


def _lengths(lengths: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if lengths is None else tuple(sorted(set(ids_of(lengths, "lengths"))))


def tokens_of(model: Model, ends: Sequence[int]) -> tuple[Text, np.ndarray]:
    """Return what holes are made of: text, and filler, which stands for nothing, int32 ids."""
    size = model.config.vocab_size
    known = (token for token in (model.config.pad_token_id, *ends) if token < size)
    filler = np.unique(np.fromiter(known, np.int32))
    key = tuple(filler.tolist())
    if key not in model.reader.texts:
        ids = np.setdiff1d(model.tokenizer.text_ids, filler, assume_unique=True)
        model.reader.texts[key] = text_of(model.tokenizer, ids, size, key[0])
    return model.reader.texts[key], filler


def _laid(
    template: Template, pieces: tuple[tuple[int, ...], ...], size: int, *, prompted: bool, end: int | None,
    room: int | None,
) -> Laid:  # fmt: skip
    """Lay pieces and holes out; a hole at the very end, of any length, has the rest of its canvas."""
    usual = room or max(size // QUARTER, 1)
    rooms = [usual if hole.length is None else hole.length for hole in template.holes]
    trails = template.holes[-1].length is None and not template.pieces[-1] and room is None
    extra = 0 if end is None else 1
    whole = prompted and fits_whole(pieces, rooms, size - extra)
    if trails and whole:
        rooms[-1] += size - sum(map(len, pieces)) - sum(rooms)
    elif trails and len(rooms) == 1:
        rooms[-1] = size
    return Laid(
        pieces=pieces, rooms=tuple(rooms), open=tuple(hole.length is None for hole in template.holes), whole=whole,
        length=size,
    )  # fmt: skip


def _hidden(template: Template, laid: Laid, speller: Speller, marker: str) -> str:
    """Return the text that the first canvas has no room for, with markers for the holes in it."""
    window = window_at(laid, 0)
    last = window.holes[-1]
    piece, shown = template.pieces[last + 1], speller.text(laid.pieces[last + 1][: window.shown])
    rest = piece[len(shown) :] if piece.startswith(shown) else piece
    if not rest and last + 1 == len(template.holes):
        return ""
    return marked(Template(pieces=(rest, *template.pieces[last + 2 :]), holes=template.holes[last + 1 :]), marker)


def _prompt(model: Model, prompt: Prompt | None, told: str, options: GenerateOptions, laid: Laid) -> list[int]:
    """Return what comes before the text.

    Raises:
        DgemmaError: part of the text belongs there and has no place in such a prompt, with the numbers.
    """
    tokenizer = model.tokenizer
    plain = prompt is not None and (not isinstance(prompt, str) and not has_messages(prompt))
    if told and (plain or options.raw or not tokenizer.has_template):
        window = window_at(laid, 0)
        left = laid.tokens - (0 if laid.whole else len(laid.pieces[0])) - len(window.held)
        raise DgemmaError(
            f"the text goes on for {left:,} tokens that are right of a hole and beyond its canvas of {laid.length:,}, "
            f"and {_no_place(plain, options.raw)}: shorten what is right of the holes, or raise canvas_length"
        )
    if prompt is None:
        if not told:
            ids = tokenizer.encode("", bos=True)
            if not ids and not laid.pieces[0]:
                raise DgemmaError(
                    "the text begins with a hole, and this checkpoint has no token that a text begins with: put text "
                    "before the hole, or give a prompt"
                )
            return ids
        prompt = told
    elif told:
        prompt = _with(prompt, told)
    return model.prompt_ids(prompt, raw=options.raw, specials=options.specials, closed=True)


def _no_place(plain: bool, raw: bool) -> str:
    if plain:
        return "a prompt of token ids has no place for them"
    return "raw leaves out the chat template that could say so" if raw else "the checkpoint has no chat template"


def _told(hidden: str, marker: str) -> str:
    if not hidden:
        return ""
    gaps = GAPS.format(marker=marker) if marker in hidden else ""
    return FURTHER.format(text=hidden, holes=gaps)


def _with(prompt: Any, told: str) -> Prompt:
    """Add to what the user says last."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{told}"
    messages = [dict(one) for one in prompt]
    last = next((one for one in reversed(messages) if one.get("role") == "user"), None)
    if last is None or not isinstance(last.get("content"), str):
        return [*messages, {"role": "user", "content": told}]
    last["content"] = f"{last['content']}\n\n{told}"
    return messages


def check_room(job: Job) -> None:
    """Refuse a text that does not fit the model's context, however long its open holes come out.

    Raises:
        DgemmaError: with the numbers.
    """
    laid, most = job.laid, job.engine.passes.config.max_positions
    at: tuple[int, int] | None = (0, 0)
    needed = 0
    while at is not None:
        hole, done = at
        window = job.window(laid, hole, done)
        before = 0 if laid.whole else sum(map(len, laid.pieces[: hole + 1])) + sum(laid.rooms[:hole]) + done
        needed = max(needed, len(job.prompt) + before + len(window.held) + (job.end is not None))
        at = next_start(laid, window, done, ended=False)
    if needed > most:
        raise DgemmaError(
            f"the text and its prompt come to {needed:,} tokens, and the model's context is {most:,}: shorten what is "
            "left of the holes"
        )
