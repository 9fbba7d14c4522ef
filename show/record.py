"""Keeping a stream of events in a file while it goes on.

    {"format": "dgemma record 1", "dgemma": "0.1.0"}
    {"t": 0.0, "asked": {"title": …, "model": …, "prompt": […], "text": …, "ends": […], "budget": 256, "options": {…}}}
    {"t": 0.0312, "draft": {…}, "pieces": [[21, "the"], …]}        see lines.py

Each line is written whole and at once, so that a file whose writer was killed is good up to its last line. A record can
be drawn without the model: it holds the text of every token that it shows.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..canvas.candidate import Candidate
from ..canvas.edit import Editor
from ..checkpoints import files
from ..core.errors import DgemmaError, shown
from ..core.events import Commit, Draft, Event
from ..core.handle import Events
from ..core.version import __version__
from .asked import Asked, Stream, known
from .frame import Frames
from .lines import encode

FORMAT = "dgemma record 1"
_BEGINS = b'{"format": "dgemma record '


class Recorder(AbstractContextManager["Recorder"]):
    """A record that is being written.

    What goes wrong after it was opened (a disk that is full) ends the record and nothing else: `problem` says it, and
    events are taken as before.

    Args:
        path: the file, which must not be there.
        force: write over an earlier record, and over nothing else.
        extend: go on with an earlier record, behind its last whole line.

    Raises:
        DgemmaError: it cannot be written, or something is there.
    """

    def __init__(self, path: str | Path, *, force: bool = False, extend: bool = False) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self._began = time.perf_counter()
        self._asked: Asked | None = None
        self._frames: Frames | None = None
        self._spelled: set[int | tuple[int, ...]] = set()
        there = extend and not force and os.path.lexists(self.path)
        self._handle = _reopen(self.path) if there else _open(self.path, force)
        if not os.fstat(self._handle).st_size:
            self._write({"format": FORMAT, "dgemma": __version__})

    def begin(self, asked: Asked) -> None:
        """The events that follow answer this."""
        self._asked, self._frames = asked, asked.frames()
        text = asked.tokenizer.decode(asked.prompt, special=True) if asked.prompt else ""
        self._line("asked", {
            "title": asked.title, "model": asked.model, "prompt": list(asked.prompt), "text": text,
            "ends": list(asked.ends), "budget": asked.budget, "options": dict(asked.options),
        })  # fmt: skip

    def add(self, event: Event) -> None:
        """Write an event down."""
        assert self._asked is not None and self._frames is not None
        if self.problem is not None:
            return
        ((kind, data),) = encode(event).items()
        spelled = []
        if isinstance(event, Draft):
            spelled = self._new_pieces(event, self._asked, self._frames)
        elif isinstance(event, Commit):
            self._frames.commit(len(event.tokens))
        self._line(kind, data, **({"pieces": spelled} if spelled else {}))

    def _new_pieces(self, draft: Draft, asked: Asked, frames: Frames) -> list[list[Any]]:
        """Spell what did not come up before: single tokens, and what a drawing joins."""
        wanted = draft.tokens.tolist()
        if draft.following is not None:  # where it is noise, no drawing spells it
            wanted += draft.following[draft.accepted].tolist()
        found: list[list[Any]] = []
        for token in dict.fromkeys(wanted):
            if token not in self._spelled:
                self._spelled.add(token)
                found.append([token, asked.tokenizer.decode([token], special=True)])
        for span in frames.add(draft).spans:
            tokens = tuple(wanted[span.start : span.stop])
            if len(tokens) > 1 and tokens not in self._spelled:
                self._spelled.add(tokens)
                found.append([list(tokens), asked.tokenizer.decode(tokens, special=True)])
        return found

    def _line(self, kind: str, data: dict[str, Any], **more: Any) -> None:
        self._write({"t": round(time.perf_counter() - self._began, 4), kind: data} | more)

    def _write(self, record: dict[str, Any]) -> None:
        if self.problem is not None:
            return
        # The first line has the spaces by which a record is known.
        separators = (", ", ": ") if "format" in record else (",", ":")
        data = (json.dumps(record, separators=separators, allow_nan=False) + "\n").encode()
        before = os.fstat(self._handle).st_size
        try:
            rest = memoryview(data)
            while rest:  # where a part was written, the next attempt says why not all of it
                rest = rest[os.write(self._handle, rest) :]
        except OSError as error:
            self.problem = f"{shown(self.path)}: {files.why(error)}; the record ends there, the answer does not"
            os.ftruncate(self._handle, before)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __exit__(self, *_: object) -> None:
        self.close()


class Recorded(Stream, Iterator[Event]):
    """A stream that is written down while it is read. `close` ends both."""

    def __init__(self, events: Iterable[Event], recorder: Recorder, asked: Asked) -> None:
        self.asked = asked
        self._events = events
        self._next = iter(events)
        self._recorder = recorder
        recorder.begin(asked)

    def __next__(self) -> Event:
        try:
            event = next(self._next)
        except BaseException as ended:
            self._recorder.close()
            if isinstance(ended, StopIteration) and self._recorder.problem is not None:
                raise DgemmaError(self._recorder.problem) from None
            raise
        self._recorder.add(event)
        return event

    def close(self) -> None:
        self._recorder.close()
        if isinstance(self._events, Events | Recorded | Candidate | Editor):
            self._events.close()


def record(
    events: Iterable[Event], path: str | Path, *, force: bool = False, title: str = "", model: str = ""
) -> Recorded:
    """Keep a stream in a file while it is read, for `replay`.

        for event in dgemma.record(model.stream("…"), "run.jsonl"): ...

    Args:
        events: what `model.stream`, `stream_fill` or `stream_edit` returns, or a recording.
        path: the file, which must not be there.
        force: write over an earlier record, and over nothing else.
        title: what drawings have above them; by default nothing.
        model: what to call the model.

    Returns:
        The same events. Where the disk is full all of them come, and the error behind the last.

    Raises:
        DgemmaError: the file cannot be written, or is there already.
    """
    asked = known(events, "record")
    asked = replace(asked, title=title or asked.title, model=model or asked.model)
    return Recorded(events, Recorder(path, force=force), asked)


def check_path(path: str | Path, *, force: bool) -> None:
    """Find out, before the work, whether a record can be written under a name.

    Raises:
        DgemmaError: it cannot, or something is there that is not to be written over.
    """
    if files.check_target(path) is None:
        return
    where = shown(path)
    if not force:
        raise DgemmaError(f"{where}: is there already; choose another name, or write over it with force")
    with files.open_file(Path(path)) as file:
        begins = file.read(len(_BEGINS))
    if not _BEGINS.startswith(begins):
        raise DgemmaError(f"{where}: is no record, and is not written over; remove it, or choose another name")


def _open(path: Path, force: bool) -> int:
    check_path(path, force=force)
    try:
        with files.Folder(path.parent) as folder:
            if not force:
                return folder.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            name, handle = folder.fresh()  # other names of the old file keep what it holds
            try:
                folder.rename(name, path.name)
            except BaseException:
                os.close(handle)
                folder.remove(name)
                raise
            return handle
    except OSError as error:
        if error.errno == errno.EEXIST:
            check_path(path, force=force)
        raise DgemmaError(f"{shown(path)}: {files.why(error)}") from None


def _reopen(path: Path) -> int:
    """Open an earlier record, and take away a line that was cut short."""
    check_path(path, force=True)
    where = shown(path)
    try:
        with files.Folder(path.parent) as folder:
            handle = folder.open(path.name, os.O_RDWR | os.O_APPEND)
        try:
            first, end, _ = os.pread(handle, 1 << 12, 0).partition(b"\n")
            if end and not first.startswith(f'{{"format": "{FORMAT}"'.encode()):
                raise DgemmaError(f"{where}: a record of another version, which is not gone on with")
            os.ftruncate(handle, _whole(handle))
        except BaseException:
            os.close(handle)
            raise
        return handle
    except OSError as error:
        raise DgemmaError(f"{where}: {files.why(error)}") from None


def _whole(handle: int) -> int:
    """Return how many bytes of a file its whole lines take."""
    end, block = os.fstat(handle).st_size, 1 << 16
    while end:
        start = max(end - block, 0)
        at = os.pread(handle, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
