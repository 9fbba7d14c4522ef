"""All that is drawn of a turn at one moment: what was asked, the text that is final, and the canvas below it."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..core.events import Commit, Done, Draft, Event
from .asked import Asked
from .frame import Pieces, printable
from .terminal import FAINT, CanvasView, heading


class Scene:
    """A turn up to its newest event.

    Args:
        asked: what the turn answers.
        encoding: as `CanvasView`.
    """

    def __init__(self, asked: Asked, encoding: str = "utf-8") -> None:
        self._title = printable(asked.title, grid=True)
        self._view = CanvasView(Pieces(asked.tokenizer), asked.ends, asked.budget, encoding)
        self._said: list[tuple[str, str]] = []  # kind and text, of complete lines
        self._kind = self._tail = ""
        self._done: Done | None = None
        self.text = ""
        """The answer so far."""
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self.lines(console, options.max_width, options.size.height - 1)
        self.widths = [line.cell_len for line in lines]
        yield Text("\n", end="").join(lines)

    def feed(self, event: Event) -> None:
        match event:
            case Draft():
                self._view.update(event)
            case Commit():
                self._say("thinking", event.thinking)
                self._say("answer", event.text)
                self.text += event.text
                self._view.commit(len(event.tokens), self._tail)
            case Done():
                self._done = event

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            self._said.append(("", self._tail + heading(self._kind, kind, self._tail[-1:])))
            self._kind, self._tail = kind, ""
        lines, end, self._tail = (self._tail + text).rpartition("\n")
        self._said.append((kind, lines + end))

    def lines(self, console: Console, width: int, height: int) -> list[Text]:
        """Return at most `height` lines; where the text has more, its first ones are left out."""
        head = Text(self._title, FAINT).wrap(console, width, overflow="fold") if self._title else []
        parts = [*self._said, (self._kind, self._tail)] if self._done is not None else self._said
        said = Text()
        for kind, text in parts:
            said.append(printable(text, grid=True), None if kind == "answer" else FAINT)
        lines = list(said.wrap(console, width, overflow="fold", tab_size=8)) if said.plain else []
        if said.plain.endswith("\n"):
            lines.pop()
        if self._done is None:
            below = self._view.lines(console, width, max(height - len(head), 4))
        else:  # no rates: they would be those of the machine that made the record
            stats = self._done.stats
            below = [Text(f"{stats.emitted_tokens:,} tokens in {stats.steps:,} passes", FAINT)]
        room = max(height - len(head) - len(below), 0)
        return [*head, *lines[max(len(lines) - room, 0) :], *below]
