"""The smallest deterministic automaton that accepts the same."""

from __future__ import annotations

import numpy as np


def trimmed(table: np.ndarray, start: int, accepting: np.ndarray) -> np.ndarray:
    """Return which states count, bool [S]: those that `start` leads to and that lead to acceptance.

    Args:
        table: int [S, C], the next state on each symbol, −1 where there is none.
    """
    sources, labels = np.nonzero(table >= 0)
    targets = table[sources, labels]
    pairs = np.unique(sources.astype(np.int64) * len(table) + targets)
    sources, targets = pairs // len(table), pairs % len(table)
    reached = np.zeros(len(table), bool)
    reached[start] = True
    return (distances(targets, sources, reached) >= 0) & (distances(sources, targets, accepting) >= 0)


def distances(sources: np.ndarray, targets: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Return each state's fewest edges to a goal, int64 [S], −1 where no way leads to one."""
    found = np.where(goals, 0, -1)
    order = np.argsort(targets, kind="stable")
    sources, counts = sources[order], np.bincount(targets, minlength=len(goals))
    firsts = np.cumsum(counts) - counts
    front = np.flatnonzero(goals)
    while len(front):
        spans = counts[front]
        at = np.repeat(firsts[front] - (np.cumsum(spans) - spans), spans) + np.arange(spans.sum())
        before = np.unique(sources[at])
        depth = found[front[0]] + 1
        front = before[found[before] < 0]
        found[front] = depth
    return found


def lengths(table: np.ndarray, start: int, accepting: np.ndarray) -> tuple[int, int | None]:
    """Return the fewest and the most symbols of what a trimmed automaton accepts, None where there is no most."""
    sources, labels = np.nonzero(table >= 0)
    shortest = int(distances(sources, table[sources, labels], accepting)[start])
    front, most = np.array([start]), 0
    for step in range(len(table)):
        if accepting[front].any():
            most = step
        following = np.unique(table[front])
        front = following[following >= 0]
        if not len(front):
            return shortest, most
    return shortest, None


def equal_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group equal rows → the first row of each group, rising; the group of each row, both int64."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, firsts, groups = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return firsts[order], places[groups.reshape(-1)]


def minimal(table: np.ndarray, start: int, accepting: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Drop and merge states → table, start, accepting. States are numbered in the order a search by breadth meets them.

    Moore's refinement of partitions, a round a gather over [S, C]. It begins with the distance to acceptance, which
    equal states share: a chain of counted repeats is then told apart at once and not a link a round.

    Args:
        table: int [S, C], −1 where there is no next state.
        accepting: bool [S].

    Raises:
        ValueError: nothing is accepted.
    """
    kept = trimmed(table, start, accepting)
    if not kept[start]:
        raise ValueError("no state is left")
    numbers = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)
    table, start, accepting = numbers[table[kept]], int(numbers[start]), accepting[kept]
    sources, labels = np.nonzero(table >= 0)
    groups = distances(sources, table[sources, labels], accepting)
    weights = np.random.default_rng(0).integers(1, 1 << 63, (table.shape[1] + 1,), dtype=np.uint64) | np.uint64(1)
    count = len(np.unique(groups))
    while True:
        ahead = np.append(groups, -1)[table]
        sums = (ahead + 1).astype(np.uint64) @ weights[:-1] + groups.astype(np.uint64) * weights[-1]
        firsts, found = equal_rows(sums[:, None])
        if len(firsts) == count:  # settled, if sums did not fall together: rows say so themselves
            firsts, found = equal_rows(np.column_stack([groups, ahead]))
            if len(firsts) == count:
                break
        groups, count = found, len(firsts)
    return _ordered(np.append(found, -1)[table[firsts]], int(found[start]), accepting[firsts])


def _ordered(table: np.ndarray, start: int, accepting: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    order, seen = [start], {start}
    for state in order:
        for target in table[state].tolist():
            if target >= 0 and target not in seen:
                seen.add(target)
                order.append(target)
    numbers = np.full(len(table) + 1, -1, np.int64)
    numbers[order] = np.arange(len(order))
    return numbers[table[order]].astype(np.int32), 0, accepting[order]
