"""What a stream of events was asked for, as far as drawing and keeping them needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from ..canvas.candidate import Candidate
from ..canvas.edit import Editor
from ..core.errors import DgemmaError
from ..core.events import Event
from ..core.handle import Events
from ..core.row import Request
from .frame import Decodes, Frames, Numbers, Pieces

_BESIDE = ("prompt", "eos_token_ids", "drafts")
"""Of a request: what has a field of its own here, or says nothing of the answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, as its reader sees it."""

    tokenizer: Decodes = field(default_factory=Numbers, repr=False)
    ends: tuple[int, ...] = ()
    """End-of-sequence token ids."""
    budget: int = 1 << 31
    """Tokens that may be written."""
    prompt: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings, by the names that `stream` gives them."""
    model: str = ""
    title: str = ""
    """What to write above a drawing: the command, or the message, as a user typed it."""

    def frames(self) -> Frames:
        return Frames(Pieces(self.tokenizer), self.ends, self.budget)


class Stream(Iterable[Event]):
    """Events that know what they answer."""

    asked: Asked


def asked_of(events: Iterable[Event], *, model: str = "", title: str = "") -> Asked | None:
    """Return what events answer; None where they do not say."""
    if isinstance(events, Stream):
        return events.asked
    if isinstance(events, Candidate | Editor):
        job = events.job
        if job is None:  # an edit with nothing to do, which has no events
            return Asked(model=model, title=title)
        request, tokenizer = replace(job.base, prompt=job.prompt), job.engine.tokenizer
        budget = 1 << 31  # each canvas has its own
    elif isinstance(events, Events):
        request, tokenizer = events.request, events.tokenizer
        budget = request.max_new_tokens
    else:
        return None
    return Asked(
        tokenizer=Numbers() if tokenizer is None else cast("Decodes", tokenizer),
        ends=request.eos_token_ids,
        budget=budget,
        prompt=request.prompt,
        options=_options(request),
        model=model,
        title=title,
    )


def known(events: Iterable[Event], what: str) -> Asked:
    """As `asked_of`.

    Raises:
        DgemmaError: they do not say.
    """
    if (asked := asked_of(events)) is None:
        raise DgemmaError(
            f"{what} got a {type(events).__name__}: give it what model.stream(...), stream_fill or stream_edit "
            "returns, or a recording; "
            "other iterators do not say by which tokenizer their tokens are read"
        )
    return asked


def _options(request: Request) -> dict[str, Any]:
    """Settings that JSON can hold and that were given; arrays of tokens show in the events themselves."""
    found: dict[str, Any] = {}
    for one in fields(request):
        value = getattr(request, one.name)
        if one.name == "sampler":
            found |= asdict(value)
        elif one.name not in _BESIDE and isinstance(value, int | float | str):
            found[one.name] = value
        elif one.name == "stop" and value:
            found[one.name] = list(value)
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str | list)}
