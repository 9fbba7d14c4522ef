"""Caches that are kept because another request may begin with the same tokens.

What can be kept are whole snapshots, at the ends of prompts, of chunks and of answers: a sliding layer holds no more
than its window, so a cache cannot be taken back to an earlier token. One whose tokens a prompt begins with saves
reading them; in float32 the tokens that follow are those of a prompt that was read whole.
"""

from __future__ import annotations

from collections import OrderedDict

from .errors import DgemmaError
from .passes import Passes, Snapshot

Tokens = tuple[int, ...]


class Prefixes:
    """Snapshots by the tokens they stand behind, the one unused for longest given up first.

    At most `budget` bytes and `most` snapshots; with a budget of 0 nothing is kept.
    """

    def __init__(self, budget: int, most: int = 32) -> None:
        self.budget, self.most = budget, most
        self.nbytes = 0
        self._kept: OrderedDict[Tokens, Snapshot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, prompt: Tokens) -> Snapshot | None:
        """Return the longest snapshot whose tokens a prompt begins with."""
        best = max((kept for kept in self._kept if kept == prompt[: len(kept)]), key=len, default=None)
        if best is None:
            return None
        self._kept.move_to_end(best)
        return self._kept[best]

    def take(self, passes: Passes, slot: int, tokens: Tokens, *, needed: bool = False) -> Snapshot | None:
        """Copy a slot's cache, which stands behind these tokens, and keep it where it is wanted.

        With `needed` it is copied in any case. None where it is not, or memory has run out: then what is kept goes.
        """
        wanted = self.wants(tokens, passes.saved_bytes(slot))
        if not (wanted or needed):
            return None
        try:
            with passes.guarded("keeping a prompt"):
                snapshot = passes.save(slot)
        except DgemmaError:
            self.clear()
            return None
        if wanted and snapshot.length == len(tokens):  # no canvas was read behind them whose text then ended the answer
            self.keep(tokens, snapshot)
        return snapshot

    def wants(self, tokens: Tokens, nbytes: int) -> bool:
        """Whether a snapshot of so many bytes, behind these tokens, would be kept."""
        return tokens not in self._kept and 0 < nbytes <= self.budget

    def keep(self, tokens: Tokens, snapshot: Snapshot) -> None:
        """Keep a snapshot, and give up what no longer fits."""
        if not self.wants(tokens, snapshot.nbytes):
            return
        self._kept[tokens] = snapshot
        self.nbytes += snapshot.nbytes
        while self.nbytes > self.budget or len(self._kept) > self.most:
            _, gone = self._kept.popitem(last=False)
            self.nbytes -= gone.nbytes

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0
