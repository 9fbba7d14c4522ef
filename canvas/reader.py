"""Looks at canvases that nothing is committed to, batched, between the rounds of an engine's generations.

    look ──▶ its prompt's cache (kept, or read as a request reads it) ──▶ waiting ──▶ one pass over those of one length

A prompt is read as a request that writes nothing: in chunks, in turn with all others, once for all who ask at the same
time, and kept as every prompt is. Looks of all threads wait in one line, and whoever comes first to the engine's thread
runs a pass over as many as it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import finite, memory
from ..core.config import SamplerConfig
from ..core.engine import Engine
from ..core.errors import DgemmaError
from ..core.passes import Scores, Snapshot
from ..core.row import Request, Share
from .language import Text

Tokens = tuple[int, ...]

TOGETHER = 32
"""Canvases of one pass."""
WORTH = 8
"""Tokens from which on a beginning that prompts have in common is read by itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """One canvas behind a prompt, and where it is looked at."""

    prompt: Tokens
    canvas: np.ndarray
    """int32 [L]"""
    at: tuple[int, ...]
    """R positions."""


@dataclass(kw_only=True, eq=False)
class _Job:
    look: Look
    tokens: np.ndarray
    snapshot: Snapshot
    found: Scores | None = None
    error: BaseException | None = None
    gone: bool = False
    """Whether nobody waits for it any more."""

    @property
    def done(self) -> bool:
        return self.found is not None or self.error is not None


class Reader:
    """Looks at canvases with an engine's model; any number of threads may ask."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.filler: int | None = None
        """What the model sees behind an answer's end, once it was asked."""
        self.texts: dict[Tokens, Text] = {}
        """What holes are made of, by what fills them up, once that was asked."""
        self.labels: dict[int, list[str]] = {}
        """Of so many options, once they were looked for."""
        self._waiting: deque[_Job] = deque()  # without a lock, which a forked child might find taken
        self._line: list[_Job] = []  # the engine's thread's alone

    def scores(self, looks: Sequence[Look], tokens: Sequence[int], stem: Tokens = ()) -> list[Scores]:
        """Look at canvases: of each, what its R positions say of the K tokens, in their order.

        Args:
            looks: of prompts and canvases that the model's context holds.
            tokens: K different ids.
            stem: what all prompts begin with, where it is worth keeping by itself.

        Raises:
            DgemmaError: a pass that comes to NaN or infinity, or whatever the device refuses.
        """
        passes, wanted = self.engine.passes, np.asarray(tokens, np.int32)
        for check in passes.checks:
            check()
        results: list[Scores] = []
        begun: Snapshot | None = None
        for group in _grouped(looks, self._at_once([look.prompt for look in looks])):
            prompts = list(dict.fromkeys(look.prompt for look in group))
            caches, begun = self._caches(prompts, stem, begun)
            jobs = [_Job(look=look, tokens=wanted, snapshot=caches[look.prompt]) for look in group]
            results += self._looked(jobs)
        return results

    def _at_once(self, prompts: list[Tokens]) -> int:
        """Return of how many prompts the caches are held at once."""
        if len(set(prompts)) == 1:
            return 1
        size = memory.cache_bytes(self.engine.passes.config, max(map(len, prompts)), 4)
        return int(max(1, min(TOGETHER, self.engine.passes.spare() // size)))

    # ---- Prompts ----------------------------------------------------------------------------------------------

    def _caches(
        self, prompts: list[Tokens], stem: Tokens, begun: Snapshot | None
    ) -> tuple[dict[Tokens, Snapshot], Snapshot | None]:
        """Return what stands behind each prompt, and behind the stem if need be; what is not kept is read."""
        asked = prompts if begun or not stem else [*prompts, stem]
        kept = self.engine.run("reading", lambda: {one: self._kept(one) for one in asked})
        caches = {one: cache for one in prompts if (cache := kept[one]) is not None}
        missing = [one for one in prompts if one not in caches]
        if missing:
            begun = begun or kept.get(stem)
            if begun is None and WORTH <= len(stem) < min(map(len, missing)):
                begun = self._read([stem], None)[stem]
            caches |= self._read(missing, begun)
        return caches, begun

    def _kept(self, prompt: Tokens) -> Snapshot | None:
        found = self.engine.prefixes.find(prompt)
        return found if found is not None and found.length == len(prompt) else None

    def _read(self, prompts: list[Tokens], behind: Snapshot | None) -> dict[Tokens, Snapshot]:
        """Read prompts as requests whose answer is one held token, which takes no pass."""
        shares = [Share(snapshot=behind) for _ in prompts]
        handles = []
        try:
            for prompt, share in zip(prompts, shares, strict=True):
                request = Request(
                    prompt=prompt, max_new_tokens=1, seed=0, sampler=SamplerConfig(), eos_token_ids=(), drafts=False,
                    held=(prompt[-1],), canvas_length=1,
                )  # fmt: skip
                handles.append(self.engine.add(request, share))
            for handle in handles:
                for _ in handle.events():
                    pass
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        caches = {prompt: share.snapshot for prompt, share in zip(prompts, shares, strict=True)}
        if any(cache is None or cache.length != len(prompt) for prompt, cache in caches.items()):
            raise DgemmaError("out of memory while keeping a prompt; take a shorter one or a smaller model")
        return {prompt: cache for prompt, cache in caches.items() if cache is not None}

    # ---- Passes -----------------------------------------------------------------------------------------------

    def _looked(self, jobs: list[_Job]) -> list[Scores]:
        self._waiting.extend(jobs)
        try:
            for job in jobs:
                while not job.done:
                    self.engine.run("reading", self._pass)
        finally:
            for job in jobs:
                job.gone = True
        results = []
        for job in jobs:
            if job.error is not None:
                raise job.error
            assert job.found is not None
            results.append(job.found)
        return results

    def _pass(self) -> None:
        """Run one pass over those that wait; in the engine's thread."""
        while self._waiting:
            self._line.append(self._waiting.popleft())
        self._line = [job for job in self._line if not job.done and not job.gone]
        if not self._line:
            return
        length = len(self._line[0].look.canvas)
        jobs = [job for job in self._line if len(job.look.canvas) == length][:TOGETHER]
        try:
            room = max(len(job.look.prompt) for job in jobs)
            while not self.engine.passes.fits(room, length, len(jobs)) and len(jobs) > 1:
                jobs = jobs[: len(jobs) // 2]
            self._run(jobs, room, length)
        except BaseException as error:
            for job in jobs:
                job.error = error
        self._line = [job for job in self._line if not job.done]

    def _run(self, jobs: list[_Job], room: int, length: int) -> None:
        passes, slots = self.engine.passes, list[int]()
        tokens = np.unique(np.concatenate([job.tokens for job in jobs]))
        at = [(row, position) for row, job in enumerate(jobs) for position in job.look.at]
        try:
            for job in jobs:
                slots.append(passes.open(room, length, job.snapshot))
            found = passes.scores(slots, np.stack([job.look.canvas for job in jobs]), at, tokens)
        finally:
            for slot in slots:
                passes.close(slot)
        finite.check_results(found.entropy, passes.dtype)
        # An infinite row of the table looks like certainty behind the soft cap.
        finite.check_results(passes.embed(np.unique(found.token)), passes.dtype)
        begin = 0
        for job in jobs:
            mine = slice(begin, begin + len(job.look.at))
            log_p = found.log_p[mine][:, np.searchsorted(tokens, job.tokens)]
            job.found = Scores(
                log_p=log_p, entropy=found.entropy[mine], token=found.token[mine], top=found.top[mine]
            )  # fmt: skip
            begin = mine.stop


def _grouped(looks: Sequence[Look], most: int) -> list[list[Look]]:
    """Cut looks, in order, where they would be of more than `most` prompts."""
    groups: list[list[Look]] = []
    prompts: set[Tokens] = set()
    for look in looks:
        if not groups or len(prompts | {look.prompt}) > most:
            groups.append([])
            prompts = set()
        groups[-1].append(look)
        prompts.add(look.prompt)
    return groups
