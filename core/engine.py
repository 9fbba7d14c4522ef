"""Requests in, events out: rows that share a model, joining and leaving between its passes.

    add ──▶ waiting ──▶ reading ──▶ denoising ──▶ over
                          ▲   a finished canvas  │
                          └──────────────────────┘

A round is one call of `Engine.step`: rows that wait are given slots while they fit; finished canvases are read, all at
once; of the prompts that are being read those that have waited longest get `Passes.chunk` tokens in all, so that a long
one holds nobody up by more; then every canvas takes a denoising pass, all those of one length together. What shares a
pass with a row never changes its tokens: its cache, canvas, settings and random numbers are its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import TypeVar

import numpy as np

from . import forks
from .batches import Mark, alike, begin, next_pass
from .errors import DgemmaError
from .events import Event
from .finite import check_results
from .handle import Handle
from .memory import peak_memory
from .owner import Owner, owner_of
from .passes import Passes, StepResult
from .prefix import Prefixes
from .row import Request, Row, Share, check_tokens
from .tokens import Vocabulary

Result = TypeVar("Result")

MOST_ROWS = 32
"""Rows at once, where nothing else is asked for: more of them bring a CPU nothing, and each waits for all."""


class Engine:
    """Generates with one model: any number of requests, from any threads.

    One thread of the engine's own runs all passes (`core.owner`); `add`, `cancel`, `step` and `run` may be called from
    any other. The thread starts with the first pass and ends with the engine, or as the process exits. Passes have one
    engine at a time.
    """

    def __init__(
        self, passes: Passes, tokenizer: Vocabulary | None, *, most_rows: int = MOST_ROWS,
        prefix_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.passes = passes
        self.tokenizer = tokenizer
        self.most_rows = most_rows
        self.prefixes = Prefixes(passes.spare() if prefix_bytes is None else prefix_bytes)
        self._owner = owner_of(passes)
        self._process = os.getpid()
        self._lock = threading.Lock()  # of what follows; never held while anything runs
        self._waiting: deque[Row] = deque()
        self._driving = False
        self._rounds = 0  # the owner thread's alone, as all below
        self._rows: list[Row] = []  # in slots
        self._pending: deque[tuple[list[Mark], Callable[[], StepResult]]] = deque()
        if passes.survives_fork:
            forks.survive(self)

    # ---- For everybody ----------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be run.

        Raises:
            DgemmaError: the prompt is empty, longer than the model's context, or holds an id that does not exist; or
                its cache would be larger than the machine.
        """
        for check in self.passes.checks:
            check()
        config = self.passes.config
        check_tokens(request.prompt, config.vocab_size, config.image_token_ids)
        if len(request.prompt) >= config.max_positions:
            raise DgemmaError(
                f"the prompt has {len(request.prompt):,} tokens and the model's context is {config.max_positions:,}; "
                "shorten the prompt"
            )

    def add(self, request: Request, share: Share | None = None) -> Handle:
        """Take a request; nothing runs before `step` is called or its events are read.

        Requests of one prompt that have a `share` read it once.

        Raises:
            DgemmaError: it cannot be run; see `check`.
        """
        self._check_process()
        self.check(request)
        row = Row(request, self.passes.config, self.tokenizer, self._peak, share)
        with self._lock:
            self._waiting.append(row)
        return Handle(row, self.wait_for, self._drop)

    def step(self) -> bool:
        """Run one round, and return whether anything is left to do."""
        return self.run("generating", self._round)

    def run(self, doing: str, work: Callable[[], Result]) -> Result:
        """Run work between two rounds, in the engine's thread.

        Raises:
            DgemmaError: in a child that was forked after loading, where the backend's threads are gone.
        """
        self._check_process()

        def guarded() -> Result:
            with self.passes.guarded(doing):
                return work()

        return self._owner.run(guarded)

    def wait_for(self, row: Row) -> Event | BaseException | None:
        """Wait for a row's next event, and see to it that rounds are run meanwhile."""
        with suppress(Empty):
            return row.events.get_nowait()
        self._check_process()
        with self._lock:
            driven = self._driving
        # An interrupt may come between any two lines here, so it is the engine's thread that says who drives.
        running = self._owner.alive() if driven else self._owner.post(self._begin)
        while (not running or self._owner.here()) and row.events.empty():  # as the process exits, or in `run`: here
            self.step()
        return row.events.get()

    def _peak(self) -> int:
        return self.passes.peak() or peak_memory()

    @property
    def busy(self) -> int:
        """Requests that have a slot or wait for one."""
        with self._lock:
            return len(self._rows) + len(self._waiting)

    # ---- Rounds -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Drive, where nothing does: of many who wait for the first round each has asked."""
        with self._lock:
            driven, self._driving = self._driving, True
        if not driven:
            self._owner.post(self._drive)

    def _drive(self) -> None:
        """Run a round, and ask for the next one while anything is left."""
        left = False
        with suppress(BaseException):  # every reader has been told
            left = self._round()
        with self._lock:
            self._driving = left = left or bool(self._waiting)
        if left:
            self._owner.post(self._drive)

    def _round(self) -> bool:
        self._rounds += 1
        try:
            with self.passes.guarded("generating"):
                self._sweep()
                self._admit()
                self._read_canvases()
                self._read_prompts()
                self._denoise()
                self._sweep()
        except BaseException as error:  # not of one row: a bug, or the process's end
            self._fail(self._all(), error)
            self._sweep()
            raise
        with self._lock:
            return bool(self._rows or self._waiting)

    def _all(self) -> list[Row]:
        with self._lock:
            rows = [*self._rows, *self._waiting]
            self._waiting.clear()
        return rows

    def _sweep(self) -> None:
        """Free the slots of rows that are over."""
        with self._lock:
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
        for row in self._rows:
            if row.cancelled:
                row.stage = "over"
        for row in [row for row in self._rows if row.stage == "over"]:
            self._rows.remove(row)
            if row.finished and row.index:  # its prompt's end is kept, and now the answer's
                self._snapshot(row)
            self.passes.close(row.slot)
        live = set(self._rows)
        self._pending = deque(one for one in self._pending if any(row in live for row, _, _ in one[0]))

    def _admit(self) -> None:
        """Give slots to rows that wait, first come first served but for those whose prompt is being read."""
        with self._lock:
            waiting = list(self._waiting)
        for row in waiting:
            if len(self._rows) >= self.most_rows:
                return
            if self._is_being_read(row):
                continue
            try:
                with self.passes.guarded("generating"):
                    if not self.passes.fits(row.capacity, row.length) and self._rows:
                        return
                    self._take(row)
            except DgemmaError as error:
                row.fail(error)
            with self._lock:
                self._waiting.remove(row)

    def _is_being_read(self, row: Row) -> bool:
        """Whether another row reads the same prompt, and leaves its cache for this one to begin with."""
        return any(
            one.request.prompt == row.request.prompt
            and not one.prompted
            and ((one.share is not None and one.share is row.share) or self._may_be_kept(one))
            for one in self._rows
        )

    def _may_be_kept(self, row: Row) -> bool:
        return self.prefixes.budget > 0 and self.passes.saved_bytes(row.slot) <= self.prefixes.budget

    def _take(self, row: Row) -> None:
        snapshot = (row.share and row.share.snapshot) or self.prefixes.find(row.request.prompt)
        if snapshot is not None and row.share is not None and snapshot.length == len(row.request.prompt):
            row.share.snapshot, row.share = snapshot, None  # the next sample's too, whatever is given up meanwhile
        slot = self.passes.open(row.capacity, row.length, snapshot)
        self._rows.append(row)
        row.opened(slot, snapshot.length if snapshot else 0)
        row.served = self._rounds

    def _read_canvases(self) -> None:
        rows = [row for row in self._rows if row.stage == "reading" and row.prompted]
        apart = [row for row in rows if not self.passes.joined or row.walk is not None or row.settled() is not None]
        self._read({row: row.coming for row in apart})
        for group in alike([row for row in rows if row not in apart]):
            given = [(row.slot, row.coming) for row in group]
            marks, draws, starts = next_pass(group)
            with self._for(group):
                self._pending.append((marks, self.passes.read_and_step(given, draws, starts)))
                for row, (_, tokens) in zip(group, given, strict=True):
                    row.has_read(len(tokens))

    def _read_prompts(self) -> None:
        left = self.passes.chunk
        pieces: dict[Row, np.ndarray] = {}
        for row in sorted(self._rows, key=lambda row: row.served):  # who has waited longest
            if row.stage == "reading" and not row.prompted and left > 0:
                if (size := self._piece(row, left)) == 0:
                    continue
                pieces[row] = row.coming[:size]
                left -= size
                row.served = self._rounds + 1  # behind those that come now
        self._read(pieces)

    def _piece(self, row: Row, left: int) -> int:
        """Return how many tokens a row reads of a round: whole chunks, so that others do not change where it is cut."""
        coming = len(row.coming)
        size = min(coming, max(self.passes.chunk, row.length))
        return size if size <= left or left == self.passes.chunk else 0

    def _read(self, pieces: dict[Row, np.ndarray]) -> None:
        """Read some of rows' tokens."""
        given = [(row.slot, tokens) for row, tokens in pieces.items()]
        if not given:
            return
        with self._for(list(pieces)):
            self.passes.read(given)
            for row in pieces:
                row.has_read(len(pieces[row]))
                if not row.index:
                    self._snapshot(row)

    def _denoise(self) -> None:
        if not self.passes.lookahead or any(row.watches for row in self._rows if row.stage == "denoising"):
            self._take_results(len(self._pending))  # of joined passes too, which may have finished their canvases
        behind = len(self._pending)
        while held := {row: x for row in self._rows if row.stage == "denoising" and (x := row.settled()) is not None}:
            self._commit(held)  # and the canvas behind it, where that has been read
        rows = [row for row in self._rows if row.stage == "denoising" and row.begun < row.request.sampler.steps]
        rows.sort(key=lambda row: row.slot)  # neighbours in the pool, where all its rows take a pass
        for group in alike(rows):
            with self._for(group):
                self._pending.append(begin(self.passes, group))
        self._take_results(behind if self.passes.lookahead and rows else len(self._pending))

    def _take_results(self, count: int) -> None:
        for _ in range(count):
            marks, results = self._pending.popleft()
            with self._for([row for row, _, _ in marks]):
                self._look_at(marks, results())

    def _look_at(self, marks: list[Mark], result: StepResult) -> None:
        """Tell rows what a pass came to: each with the canvas and the step that it was of."""
        finished: dict[Row, np.ndarray] = {}
        for i, (row, index, step) in enumerate(marks):
            if row.stage != "denoising" or row.index != index or row.cancelled:
                continue  # what has begun since it stopped is never looked at
            try:
                if row.drafted(step, result, i, self.passes.dtype):
                    if step == 0:  # no second pass has shown what an infinite row of the table does, capped in logits
                        check_results(self.passes.soft(row.slot), self.passes.dtype)
                    finished[row] = row.newest
            except DgemmaError as error:
                row.fail(error)
        if finished:
            self._commit(finished)

    def _commit(self, finished: dict[Row, np.ndarray]) -> None:
        early: dict[Row, np.ndarray] = {}
        if self.passes.lookahead and not self.passes.joined:
            # On its way before the text is looked at, and in vain where that ends it.
            early = {row: argmax for row, argmax in finished.items() if not row.ends_with(argmax)}
            given = [(row.slot, argmax) for row, argmax in early.items()]
            if given:
                with self._for(list(early)):
                    self.passes.read(given)
        for row, argmax in finished.items():
            if row.stage != "denoising":
                continue
            with self._for([row]):
                row.commit(argmax)
            if row in early and row.stage == "reading":
                row.has_read(len(argmax))

    def _snapshot(self, row: Row) -> None:
        """Keep a row's cache for whoever begins with the same tokens."""
        share, row.share = row.share, None if row.prompted else row.share
        shared = share is not None and row.read == len(row.request.prompt)
        snapshot = self.prefixes.take(self.passes, row.slot, tuple(row.tokens[: row.read]), needed=shared)
        if share is not None and shared:
            share.snapshot = snapshot

    # ---- Errors and ends --------------------------------------------------------------------------------------

    @contextmanager
    def _for(self, rows: list[Row]) -> Iterator[None]:
        """Within, what goes wrong is some rows' own; others go on."""
        try:
            with self.passes.guarded("generating"):
                yield
        except DgemmaError as error:
            self._fail(rows, error)

    def _drop(self, row: Row) -> None:
        """Cancel a row; see `Handle`."""
        if row.stage != "over":
            row.cancelled = True
            row.events.put(None)
            self._owner.nudge(self._sweep)

    def _fail(self, rows: list[Row], error: BaseException) -> None:
        for row in rows:
            if row.stage != "over":
                row.fail(error)

    # ---- Forks: see `core.forks` ------------------------------------------------------------------------------

    def pause(self) -> None:
        self._owner.pause()

    def go_on(self) -> None:
        self._owner.go_on()

    def in_child(self) -> None:
        self._owner = Owner(self.passes.home, anywhere=True)
        self._lock, self._driving, self._process = threading.Lock(), False, os.getpid()

    def _check_process(self) -> None:
        if os.getpid() == self._process:
            return
        if not self.passes.survives_fork:
            raise DgemmaError(
                f"this model was loaded by process {self._process}, and the {self.passes.name} backend does not work "
                "in a process forked off it; load it again there, or start processes by 'spawn'"
            )
