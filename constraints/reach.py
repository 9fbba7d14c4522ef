"""Whether an automaton has a string that fits: exact, by sets of states, with the held positions in."""

from __future__ import annotations

import numpy as np

from .layout import Lattice


def before(lattice: Lattice, after: np.ndarray, label: int) -> np.ndarray:
    """Return from which states one token leads into `after`, bool [S]; label is the class of the token, −1 for any."""
    found = np.zeros(lattice.states, bool)
    if label < 0:
        padded = np.append(after, False)[lattice.targets]
        for block in lattice.blocks:
            view = padded[block.offset : block.offset + block.depth * block.width].reshape(block.depth, block.width)
            np.logical_or.reduce(view, axis=0, out=found[block.first : block.first + block.width])
    else:
        sources, targets = lattice.labelled(label)
        found[sources[after[targets]]] = True
    return found


def behind(lattice: Lattice, at: np.ndarray, label: int) -> np.ndarray:
    """Return where one token leads to from `at`, bool [S]."""
    sources, targets = lattice.pairs if label < 0 else lattice.labelled(label)
    found = np.zeros(lattice.states, bool)
    found[targets[at[sources]]] = True
    return found


def borders(lattice: Lattice, held: np.ndarray, budget: int, every: int) -> dict[int, np.ndarray]:
    """Return from which states the rest of the budget can be filled, bool [S], at 0, every, 2·every … and the budget.

    held int [≤ budget]: the class held at each position, −1 where free. Positions are passed one by one only until the
    set is the same before and after a free one; from there to the next held position it stays. Equal neighbours are one
    array, so that a long budget takes little memory.
    """
    fixed = np.flatnonzero(held >= 0)
    at, now = budget, lattice.accepting
    found = {budget: now}
    settled = False
    while at:
        if settled:
            stop = int(fixed[-1]) + 1 if (fixed := fixed[fixed < at]).size else 0
            found.update(dict.fromkeys(range(-(-stop // every) * every, at, every), now))
            at = stop
            settled = False
            continue
        label = int(held[at - 1]) if at <= len(held) else -1
        previous = before(lattice, now, label)
        at -= 1
        settled = label < 0 and bool((previous == now).all())
        now = now if settled else previous
        if at % every == 0:
            found[at] = now
    return found


def fewest(lattice: Lattice, held: np.ndarray) -> tuple[int | None, int]:
    """Return how many tokens the shortest string has that keeps all that is held, and −1.

    Where no string of any length does: None, and the first held position that no path reaches, or the last one.
    """
    at = np.zeros(lattice.states, bool)
    at[lattice.start] = True
    fixed = np.flatnonzero(held >= 0)
    last = int(fixed[-1]) + 1 if len(fixed) else 0
    i = 0
    while i < last or not (at & lattice.accepting).any():
        label = int(held[i]) if i < len(held) else -1
        following = behind(lattice, at, label)
        if not following.any() or i >= last + lattice.states:
            return None, min(i, last - 1)
        i += 1
        if i < last and label < 0 and (following == at).all():
            i = int(fixed[np.searchsorted(fixed, i)])
        at = following
    return i, -1
