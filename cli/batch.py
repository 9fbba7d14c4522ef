"""`dgemma batch`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import DgemmaError
from .keep import extend_option
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

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.events import Event
    from ..runtime import DiffusionGemma
    from ..tools.batch import Item, Results


@click.command(cls=Command, short_help="Answer a file of prompts.")
@click.argument("prompts", type=click.Path(path_type=Path, allow_dash=True), metavar="IN.jsonl")
@option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE", group="Output",
    help="The file of results. One that is there is gone on with.",
)  # fmt: skip
@option(
    "--rows", type=click.IntRange(min=1), metavar="N", group="Output", show_default="32",
    help="Answer N lines side by side, or as many of them as memory has room for.",
)  # fmt: skip
@option("--force", is_flag=True, group="Output", help="Begin anew, in place of the results in FILE.")
@extend_option
@option("--quiet", "-q", is_flag=True, group="Output", help="Say nothing on stderr but errors.")
@system_option
@raw_option
@specials_option
@model_options
@sampling_options
def batch(
    prompts: Path, out: Path, rows: int | None, force: bool, quiet: bool, system: str | None, raw: bool, model: str,
    revision: str | None, backend: str, device: str, dtype: str, **sampling: Any,
) -> None:  # fmt: skip
    """Answer every line of IN.jsonl (- is stdin) and write the results, a line of JSON each, to FILE.

    A line is a prompt as a JSON string, or an object with a "prompt" or "messages". The object may have a "system"
    prompt and settings of its own, spelled as the options below ("seed", "max_new_tokens", ...), and "held" tokens by
    position; whatever else is in it is repeated in its result. All lines are checked before the first is answered.
    Results come in the order of the lines; one that fails is named and does not stop the others. Stopped or killed, the
    same command goes on with the lines that have no result yet.

    \b
    dgemma batch boards.jsonl --out answers.jsonl
    {"prompt": ".3.1 .2.. .... ...4", "id": 1}
    """
    if raw and system is not None:
        raise click.UsageError("--system stands in the chat template, which --raw leaves out")
    from ..core.engine import MOST_ROWS
    from ..tools.batch import Results, read_items
    from . import notes
    from .output import consoles, load_model, note, put_words

    where = "stdin" if str(prompts) == "-" else str(prompts)
    items = read_items(read_file(prompts), where, options={*sampling, "held"}, system=system)
    if raw and (chat := next((item.line for item in items if not isinstance(item.asked, str)), None)):
        raise DgemmaError(
            f"{where}: line {chat}: messages and system stand in the chat template, which --raw leaves out"
        )
    settings = sampling | {"raw": raw, "model": model, "revision": revision}
    keys = {item.line: item.key(settings) for item in items}
    _, errors = consoles(quiet=quiet)
    with Results(out, keys, force=force) as results:
        left = [item for item in items if item.line not in results.done]
        done = Outcome()
        if left:
            loaded = load_model(
                errors, model, revision=revision, backend=backend, device=device, dtype=dtype, rows=rows
            )
            lines = Lines(loaded, where, sampling | {"raw": raw}, left, last=items[-1].line)
            lines.check(errors)
            if not raw and not loaded.tokenizer.has_template:
                note(errors, notes.without_template(model))
            try:
                lines.answer(errors, results, keys, done, ahead=2 * (rows or MOST_ROWS))
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on from here") from None
        there = len(items) - len(left)
        if empty := done.empty:
            many = "1 answer is" if len(empty) == 1 else f"{len(empty)} answers are"
            note(errors, f"{many} empty: line {', '.join(map(str, empty[:8]))}{', ...' if len(empty) > 8 else ''}")
        answered = len(left) - len(done.failed)
        put_words(errors, f"{answered} answered{f', {there} were there already' if there else ''}: {out}")
    if failed := done.failed:
        rest = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise DgemmaError(f"{next(iter(failed.values()))}{rest}; the same command tries again")


class Failed(DgemmaError):
    """An answer that ended in an error; others go on."""


@dataclass
class Outcome:
    empty: list[int] = field(default_factory=list)
    """Lines whose answer is empty."""
    failed: dict[int, str] = field(default_factory=dict)
    """By line, what went wrong."""


@dataclass(frozen=True)
class Lines:
    """Lines to be answered by a model."""

    model: DiffusionGemma
    where: str
    settings: dict[str, Any]
    items: list[Item]
    last: int

    def ask(self, item: Item) -> Iterator[Event]:
        try:
            return self.model.stream(item.asked, **self.settings | dict(item.options))
        except (DgemmaError, TypeError) as error:
            raise DgemmaError(f"{self.where}: line {item.line}: {error}") from None

    def check(self, errors: Console) -> None:
        from .output import Wait

        with Wait(errors, "checking") as wait:
            for i, item in enumerate(self.items, 1):
                self.ask(item)  # checks it
                wait.update(i, len(self.items), f"line {item.line} of {self.last}")

    def answer(
        self, errors: Console, results: Results, keys: Mapping[int, str], done: Outcome, *, ahead: int
    ) -> None:  # fmt: skip
        """Answer every line and write the results, in order."""
        from ..show.asked import asked_of
        from .sinks import ResultSink, follow

        for item, events in self._side_by_side(ahead):
            head = {"line": item.line, "key": keys[item.line], **item.carried}
            what = f"line {item.line} of {self.last}"
            sink = ResultSink(errors, lambda record, head=head: results.append(head | record), what=what)
            sink.asked = asked_of(events)
            try:
                follow(self._events(item, events), sink, title=what)
            except Failed as error:
                done.failed[item.line] = str(error)
            else:
                done.empty += [] if sink.answer.strip() else [item.line]

    def _side_by_side(self, ahead: int) -> Iterator[tuple[Item, Iterator[Event]]]:
        """Yield every line with its events, in order; `ahead` lines behind it are being answered already."""
        begun: deque[tuple[Item, Iterator[Event]]] = deque()
        for item in self.items:
            begun.append((item, self.ask(item)))
            if len(begun) > ahead:
                yield begun.popleft()
        yield from begun

    def _events(self, item: Item, events: Iterator[Event]) -> Iterator[Event]:
        try:
            yield from events
        except DgemmaError as error:
            raise Failed(f"{self.where}: line {item.line}: {error}") from None
