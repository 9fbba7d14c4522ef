"""From characters to the bytes of UTF-8, strictly: nothing overlong, no surrogates, no character left half."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import DgemmaError
from .chars import CharDfa
from .minimal import equal_rows

LARGEST = 100_000
"""States of a deterministic automaton over bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteDfa:
    """A deterministic automaton over bytes."""

    table: np.ndarray
    """int32 [S, 256]: the next state, −1 where there is none."""

    start: int
    accepting: np.ndarray
    """bool [S]"""

    @classmethod
    def of(cls, found: CharDfa) -> ByteDfa:
        """Spell an automaton's characters in bytes.

        Its states stay and come first; behind them are states inside a character, shared where the same characters
        are left. What the smallest automaton over characters gives is the smallest over bytes.

        Raises:
            DgemmaError: too many states inside characters.
        """
        tails = _Tails(found.atoms)
        rows = [np.full(256, -1, np.int32) for _ in found.table]
        known: dict[bytes, int] = {}

        def state(row: np.ndarray) -> int:
            if (key := row.tobytes()) not in known:
                if len(rows) >= LARGEST:
                    raise DgemmaError(
                        f"the pattern needs more than {LARGEST:,} states for the bytes of its characters; bound its "
                        "repeats lower or take a smaller alphabet, (?a) for ASCII's letters and digits"
                    )
                known[key] = len(rows)
                rows.append(row)
            return known[key]

        def joined(inner: np.ndarray, shape: np.ndarray) -> np.ndarray:
            """States for nodes of the next level: rows of continuation bytes, at 0x80 to 0xBF."""
            made = np.full(len(shape) + 1, -1, np.int32)
            for i, following in enumerate(np.append(inner, -1)[shape]):
                if (following >= 0).any():
                    row = np.full(256, -1, np.int32)
                    row[0x80:0xC0] = following
                    made[i] = state(row)
            return made

        wide = np.unique(tails.last)
        for i, following in enumerate(found.table):
            targets = np.append(following, -1).astype(np.int32)
            rows[i][:0x80] = targets[found.atoms[:0x80]]
            if (targets[wide] < 0).all():
                continue
            two = joined(targets, tails.last)
            three = joined(two[:-1], tails.middle)
            four = joined(three[:-1], tails.first)
            rows[i][0xC2:0xE0] = two[tails.leads2]
            rows[i][0xE0:0xF0] = three[tails.leads3]
            rows[i][0xF0:0xF5] = four[tails.leads4]
        table = np.array(rows, np.int32)
        accepting = np.zeros(len(table), bool)
        accepting[: len(found.table)] = found.accepting
        return cls(table=table, start=found.start, accepting=accepting)


class _Tails:
    """What is left of characters behind their first bytes, equal tails once.

    Attributes:
        last: int [N, 64], atoms by last byte.
        middle, first: int [N, 64], numbers of tails by the byte before, −1 where there is none.
        leads2, leads3, leads4: the tails behind the lead bytes C2 to DF, E0 to EF, F0 to F4.
    """

    def __init__(self, atoms: np.ndarray) -> None:
        atoms = np.append(np.full(0x80, -1, atoms.dtype), atoms[0x80:]).reshape(-1, 64)
        firsts, blocks = equal_rows(atoms)
        self.last = atoms[firsts]
        self.leads2 = blocks[2:32]
        triples = blocks[:1024].reshape(16, 64).copy()
        triples[0, :32] = -1  # overlong; surrogates are in no atom
        fours = blocks[1024:].reshape(-1, 64)
        firsts, groups = equal_rows(np.concatenate([triples, fours]))
        self.middle = np.concatenate([triples, fours])[firsts]
        self.leads3 = groups[:16]
        quadruples = np.full((5, 64), -1, np.int64)
        quadruples.reshape(-1)[16 : 16 + len(fours)] = groups[16:]
        firsts, self.leads4 = equal_rows(quadruples)
        self.first = quadruples[firsts]
