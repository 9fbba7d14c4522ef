"""A region of a text rewritten, all else held: from the old text, of which as much is lost to noise as is asked.

    prompt: the instruction, what stood in the region, what is left of it  |  canvas: the region, what follows it

A region is rewritten canvas by canvas, half a canvas of it at a time, cut at the ends of lines where there are some.
The canvas has room to spare, an open hole's filler to begin with, so that a part may grow or shrink; behind it stands
what follows: of a region that goes on, its old text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.canvas import FREE
from ..core.errors import DgemmaError, quoted
from ..core.events import Event, Stats
from ..core.given import integer, number
from ..core.options import GenerateOptions
from ..core.reader import show
from ..core.row import Request
from .borders import Speller
from .candidate import Candidate, Job
from .fill import check_room, tokens_of
from .holes import Hole, Template, lines_of
from .language import Room
from .model import Model
from .windows import Laid, Window

STRENGTH = 0.8

SPARE = 4
"""A part has room to grow by a quarter of it, and by so many tokens at least."""

TOLD = """\
Write a text from its beginning, with one passage of it changed{instruction}
The passage, between lines of dashes, was:
-----
{old}
-----"""

BEHIND = """

Further behind the passage the text goes on:
-----
{text}
-----"""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A text with one region rewritten."""

    text: str
    before: str
    start: int
    """Where the region begins, in both, characters."""
    end: int
    """Where it ends now."""
    stats: Stats | None
    """None where no pass was needed."""

    @property
    def changed(self) -> bool:
        return self.text != self.before

    def diff(self, name: str = "text", *, context: int = 3) -> str:
        """Return what changed as a unified diff, in the form that `patch` reads; empty where nothing did."""
        old, new = _kept_ends(self.before), _kept_ends(self.text)
        lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=context)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

    def __repr__(self) -> str:
        return f"<Edited {self.end - self.start:,} characters at {self.start:,}: {'' if self.changed else 'un'}changed>"


@dataclass(frozen=True, kw_only=True, eq=False)
class EditJob(Job):
    """An edit that is under way; each part of the region is a hole."""

    parts: tuple[tuple[int, ...], ...]
    """Their old tokens."""
    strength: float

    def window(self, laid: Laid, hole: int, done: int) -> Window:
        room = laid.rooms[hole]
        behind = [token for part in self.parts[hole + 1 :] for token in part] + [*laid.pieces[-1]]
        held = (FREE,) * room + tuple(behind[: laid.length - room])
        return Window(held=held, rooms=(Room(start=0, length=room, open=True),), holes=(hole,), shown=0)

    def request(self, window: Window, prompt: Sequence[int], *, seed: int, drafts: bool) -> Request:
        hole = window.holes[0]
        filler = (int(self.filler[0]),) * (self.laid.rooms[hole] - len(self.parts[hole]))
        asked = super().request(window, prompt, seed=seed, drafts=drafts)
        return replace(asked, init=self.parts[hole] + filler, strength=self.strength)


class Editor(Iterator[Event]):
    """An edit under way: the events of its canvases, none where nothing is to be done, and then its `result`."""

    def __init__(self, text: str, span: tuple[int, int], job: EditJob | None, *, seed: int, drafts: bool) -> None:
        self.job, self._text, self._span = job, text, span
        self._candidate = None if job is None else Candidate(job, seed=seed, drafts=drafts, scored=False)

    def __next__(self) -> Event:
        if self._candidate is None:
            raise StopIteration
        return next(self._candidate)

    def close(self) -> None:
        """End it; nothing follows."""
        if self._candidate is not None:
            self._candidate.close()

    def begin(self) -> None:
        """Add the first canvas to the engine."""
        if self._candidate is not None:
            self._candidate.begin()

    def finished(self) -> Edited:
        """Run it to its end, and return what it came to, with the line ends of the text."""
        (start, end), text = self._span, self._text
        if self._candidate is None:
            return Edited(text=text, before=text, start=start, end=end, stats=None)
        found = self._candidate.finished()
        new, old = "".join(one.text for one in found.holes), text[start:end]
        if new == _plain(old):
            new = old
        elif 2 * text.count("\r\n") > text.count("\n"):
            new = new.replace("\n", "\r\n")
        return Edited(
            text=text[:start] + new + text[end:], before=text, start=start, end=start + len(new), stats=found.stats
        )  # fmt: skip


def stream_edit(
    model: Model, text: str, *, lines: Sequence[int] | None, span: Sequence[int] | None, instruction: str | None,
    strength: float, options: GenerateOptions, drafts: bool = True,
) -> Editor:  # fmt: skip
    """See `DiffusionGemma.stream_edit`."""
    place = region(text, lines, span)
    job = job_of(model, text, place, instruction, strength, options)
    editor = Editor(text, place, job, seed=int(options.seed), drafts=drafts)
    editor.begin()
    return editor


def region(text: Any, lines: Sequence[int] | None, span: Sequence[int] | None) -> tuple[int, int]:
    """Return where a region begins and ends: of lines, counted from 1 and both of them in it, without the last's end.

    Raises:
        DgemmaError: neither or both, or what does not lie in the text.
    """
    if not isinstance(text, str):
        raise DgemmaError(f"the text is a {type(text).__name__}, expected text")
    if (lines is None) == (span is None):
        raise DgemmaError("give lines=(first, last), or span=(start, end) in characters: one of them")
    first, last = _pair("lines" if span is None else "span", lines if span is None else span)
    if span is not None:
        if not 0 <= first <= last <= len(text):
            raise DgemmaError(f"span is {show([first, last])}, and the text has {len(text):,} characters")
        return first, last
    found = lines_of(text)
    if len(found) > 1 and found[-1][0] == found[-1][1]:  # what follows the last line's end is no line
        found.pop()
    if not 1 <= first <= last <= len(found):
        raise DgemmaError(f"lines are {first} to {last}, and the text has lines 1 to {len(found):,}")
    return found[first - 1][0], found[last - 1][1]


def _pair(name: str, given: Any) -> tuple[int, int]:
    try:
        first, last = given
    except (TypeError, ValueError):
        raise DgemmaError(f"{name} is {quoted(given, 40)}, expected two integers") from None
    for one in (first, last):
        integer(name, one, 0, 1 << 40)
    return int(first), int(last)


def job_of(
    model: Model, text: str, span: tuple[int, int], instruction: str | None, strength: Any, options: GenerateOptions
) -> EditJob | None:  # fmt: skip
    """Check an edit and lay it out; None where there is nothing to do, with a strength of 0.

    Raises:
        DgemmaError: as `DiffusionGemma.edit`.
    """
    number("strength", strength, 0, 1)
    if instruction is not None and not isinstance(instruction, str):
        raise DgemmaError(f"instruction is {quoted(instruction, 40)}, expected text")
    if options.stops:
        raise DgemmaError("stop has no place in an edit: what ends the region is what follows it; leave it out")
    base, tokenizer = model.request([0], options), model.tokenizer
    told = not options.raw and tokenizer.has_template
    if instruction and not told:
        why = "raw leaves out the chat template" if options.raw else "this checkpoint has no chat template"
        raise DgemmaError(f"instruction: {why} that it would be said in; leave it out, or take another checkpoint")
    size, speller = base.canvas_length or model.config.canvas_length, Speller(tokenizer)
    left, old, right = (_plain(one) for one in (text[: span[0]], text[span[0] : span[1]], text[span[1] :]))
    head, tail = (tuple(speller.ids(one, first=first)) for one, first in ((left, not told), (right, False)))
    texts, parts = _parts(old, speller, max(size // 2, 1))
    if strength == 0:
        return None
    rooms = tuple(_room(len(part), size, options.max_new_tokens) for part in parts)
    shown = speller.text(tail[: max(size - rooms[-1], 0)])
    hidden = right[len(shown) :] if right.startswith(shown) else right
    prompt = model.prompt_ids(_told(instruction, old, hidden), closed=True) if told else tokenizer.encode("", bos=True)
    if not prompt and not head:
        raise DgemmaError("the region begins the text, and this checkpoint has no token that a text begins with")
    written, filler = tokens_of(model, base.eos_token_ids)
    pieces = (head, *((),) * (len(parts) - 1), tail)
    job = EditJob(
        engine=model.engine, reader=model.reader, speller=speller, prompt=tuple(prompt), end=None, base=base,
        template=Template(pieces=(left, *("",) * (len(texts) - 1), right), holes=(Hole(),) * len(texts)),
        laid=Laid(pieces=pieces, rooms=rooms, open=(True,) * len(parts), whole=False, length=size),
        text=written, filler=filler, stop=(), lengths=(), parts=parts, strength=float(strength),
    )  # fmt: skip
    check_room(job)
    return job


def _room(part: int, size: int, most: int | None) -> int:
    """Return the room that a part of so many tokens has: at most `most`, and no less than it takes."""
    spare = max(part // 4, SPARE) if part else max(size // 4, 1)
    return min(max(part + spare if most is None else most, part), size)


def _parts(old: str, speller: Speller, most: int) -> tuple[list[str], tuple[tuple[int, ...], ...]]:
    """Cut a region where lines end, into parts of at most so many tokens → their text, their tokens."""
    texts: list[str] = []
    tokens: list[tuple[int, ...]] = []
    for line in _kept_ends(old) or [""]:
        joined = tuple(speller.ids(texts[-1] + line)) if texts else ()
        if texts and len(joined) <= most:
            texts[-1] += line
            tokens[-1] = joined
            continue
        for piece in _short(line, speller, most):
            texts.append(piece)
            tokens.append(tuple(speller.ids(piece)))
    return texts, tuple(tokens)


def _short(line: str, speller: Speller, most: int) -> list[str]:
    """Cut a line in halves until each has at most so many tokens, or is one character."""
    if len(line) <= 1 or len(speller.ids(line)) <= most:
        return [line]
    middle = line.rfind(" ", 0, len(line) // 2 + 1)
    middle = middle if middle > 0 else len(line) // 2
    return _short(line[:middle], speller, most) + _short(line[middle:], speller, most)


def _told(instruction: str | None, old: str, hidden: str) -> str:
    said = f": {instruction.strip()}" if instruction and instruction.strip() else "."
    return TOLD.format(instruction=said, old=old) + (BEHIND.format(text=hidden) if hidden else "")


def _plain(text: str) -> str:
    """Return text as models know it, with \\n for \\r\\n."""
    return text.replace("\r\n", "\n")


def _kept_ends(text: str) -> list[str]:
    """Return lines with their ends; only \n ends one."""
    *lines, last = text.split("\n")
    return [f"{line}\n" for line in lines] + ([last] if last else [])
