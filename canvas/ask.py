"""`DiffusionGemma.read`: arguments to layouts and prompts, readings to answers."""

from __future__ import annotations

from typing import Any

from ..core.errors import DgemmaError
from ..core.given import check_flags
from ..core.row import SHORT
from . import questions as asking
from .model import Model, end_of
from .places import Encode, Tokens, lay_out
from .read import Canvas, canvas_of, layout_of, read
from .reader import Reader


def ask(
    model: Model, prompt: Any, choices: Any, template: str | None, *, questions: Any, joint: bool, samples: int,
    seed: int, canvas_length: int | None, raw: bool, specials: bool,
) -> Any:  # fmt: skip
    """Read what `DiffusionGemma.read` is asked for; see there."""
    check_flags(joint=joint, raw=raw, specials=specials)
    tokenizer = model.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, specials=raw or specials)

    def prompted(text: Any) -> Tokens:
        return tuple(model.prompt_ids(text, raw=raw, specials=specials, closed=True))

    def canvas() -> Canvas:
        ends = model.generation.eos_token_ids or model.config.eos_token_ids
        end = end_of(tokenizer, ends)
        return canvas_of(model.config, ends, end, length=canvas_length, samples=samples, seed=seed)

    if questions is None:
        layout = layout_of(choices, template, encode)
        ids = prompted(prompt)
        found = read(model.reader, [(ids, layout)], canvas())[0]
        return found[0] if len(found) == 1 else found
    if choices is not None or template is not None:
        raise DgemmaError("questions have choices and a template of their own; leave yours out")
    some = asking.questions_of(questions)
    labels = [_labels(model.reader, len(one.options), encode) for one in some]
    if joint:
        asked = [(*asking.joined(some, labels), labels)]
    else:
        asked = [(*asking.single(one, mine), [mine]) for one, mine in zip(some, labels, strict=True)]
    prompts = [prompted(asking.behind(prompt, text)) for text, _, _ in asked]
    layouts = [lay_out(shape, lists, encode) for _, shape, lists in asked]
    if joint and canvas_length is None and (size := layouts[0].size + 1) > SHORT[-1]:
        raise DgemmaError(
            f"joint: the answers to {len(some)} questions take {size:,} tokens, and a canvas of {SHORT[-1]} is the "
            "longest that is taken unasked; ask fewer at once, or leave joint out"
        )
    stem = asking.common([*prompts, prompted(asking.behind(prompt, "."))])
    found = read(model.reader, list(zip(prompts, layouts, strict=True)), canvas(), stem)
    readings = [one for several in found for one in several]
    return {
        one.name: asking.answer_of(one, mine, reading)
        for one, mine, reading in zip(some, labels, readings, strict=True)
    }


def _labels(reader: Reader, count: int, encode: Encode) -> list[str]:
    if count not in reader.labels:
        reader.labels[count] = asking.labels_of(count, encode)
    return reader.labels[count]
