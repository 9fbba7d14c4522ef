"""An automaton laid out for passes over a canvas: pairs, sets of labels, and blocks whose rows are summed.

Edges with the same source and target are one *pair*, and the labels of a pair are a *set*; an automaton has far fewer
distinct sets than pairs, so that what depends on a position is first summed over each set.

Pairs lie in padded blocks, [depth, states], states of about equally many pairs to a block, so that sums over a state's
pairs are sums of rows: NumPy adds rows several times faster than the segments of a flat array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .automaton import TokenAutomaton

_NONE = np.zeros(0, np.intp)

_CALL = 2000
"""Padded entries that cost as much as one block more."""


class Block(NamedTuple):
    """Entries [depth, width] of a flat array, at `offset`; each column is one sum, of `first` and those after it."""

    offset: int
    depth: int
    first: int
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges:
    """The ways out of one state."""

    labels: np.ndarray  # int [e], rising
    targets: np.ndarray  # int [e]
    sets: np.ndarray  # int [k], of its pairs
    pair_targets: np.ndarray  # int [k]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lattice:
    """An automaton's edges, with its states numbered anew: those of many pairs first."""

    states: int
    classes: int
    renumbered: np.ndarray  # int [S]: this lattice's number of each of the automaton's states
    start: int
    accepting: np.ndarray  # bool [S]
    out: tuple[Edges, ...]
    members: np.ndarray  # int [N]: the labels of each set, set after set
    member_starts: np.ndarray  # int [D]
    holders: np.ndarray  # int [N]: the sets that each label is in, label after label
    holder_starts: np.ndarray  # int [labels that edges have]
    used: np.ndarray  # int [labels that edges have]
    blocks: tuple[Block, ...]  # over states, by source
    targets: np.ndarray  # int [P]; S where padded
    sets: np.ndarray  # int [P]; D where padded
    into_blocks: tuple[Block, ...]  # over states, by target
    into: np.ndarray  # int [P']: entries of the blocks by source; P where padded
    into_order: np.ndarray  # int [S]: where each state is among those blocks' sums
    set_order: np.ndarray  # int [K]: entries of the blocks by source, set after set
    set_starts: np.ndarray  # int [D]
    pairs: tuple[np.ndarray, np.ndarray]  # sources and targets
    pair_counts: np.ndarray  # int [S], of each state
    pair_starts: np.ndarray  # int [S]: where its pairs begin in the three below
    pair_places: np.ndarray  # int [K]: entries of the blocks by source
    pair_sets: np.ndarray  # int [K]
    pair_targets: np.ndarray  # int [K]
    by_label: dict[int, tuple[np.ndarray, np.ndarray]]  # rising sources, and targets, of each label's edges

    def labelled(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rising sources, and targets, of the edges of a label; none where nothing has it."""
        return self.by_label.get(label, (_NONE, _NONE))

    def step(self, state: int, label: int) -> int:
        """Return the state that a label leads to, −1 where none does; the held class is a label like any other."""
        sources, targets = self.labelled(label)
        at = int(sources.searchsorted(state))
        return int(targets[at]) if at < len(sources) and sources[at] == state else -1


# ---- Building ------------------------------------------------------------------------------------------------------


def lattice_of(automaton: TokenAutomaton) -> Lattice:
    """Lay an automaton out."""
    states = automaton.states
    # What held tokens count as is nothing that a free position can take.
    free = automaton.labels != (-1 if automaton.held_class is None else automaton.held_class)
    order = np.lexsort((automaton.labels, automaton.targets, automaton.sources))
    columns = (automaton.sources, automaton.targets, automaton.labels)
    sources, targets, labels = (column[order][free[order]].astype(np.intp) for column in columns)
    new = np.ones(len(sources), bool)
    new[1:] = (sources[1:] != sources[:-1]) | (targets[1:] != targets[:-1])
    starts = np.flatnonzero(new)
    sets, members = _sets(labels, starts)
    degree = np.bincount(sources[starts], minlength=states)
    renumbered = np.empty(states, np.intp)
    renumbered[np.argsort(-degree, kind="stable")] = np.arange(states)
    pair_sources, pair_targets = renumbered[sources[starts]], renumbered[targets[starts]]
    blocks, place, size = _padded(pair_sources, states)
    incoming = np.bincount(pair_targets, minlength=states)
    rank = np.empty(states, np.intp)
    rank[np.argsort(-incoming, kind="stable")] = np.arange(states)
    into_blocks, into_place, into_size = _padded(rank[pair_targets], states)
    by_set = np.argsort(sets, kind="stable")
    by_source, counts = np.argsort(pair_sources, kind="stable"), np.bincount(pair_sources, minlength=states)
    flat = np.concatenate(members) if members else np.zeros(0, np.intp)
    lengths = np.array([len(m) for m in members], np.intp)
    by_member = np.argsort(flat, kind="stable")
    used, holder_starts = np.unique(flat[by_member], return_index=True)
    return Lattice(
        states=states,
        classes=automaton.count,
        renumbered=renumbered,
        start=int(renumbered[automaton.start]),
        accepting=_scattered(renumbered, automaton.accepting, states, False),
        out=_out(
            (renumbered[sources], renumbered[targets], labels),
            (pair_sources, pair_targets, sets),
            starts,
            states,
        ),
        members=flat,
        member_starts=np.cumsum(lengths) - lengths,
        holders=np.repeat(np.arange(len(members)), lengths)[by_member],
        holder_starts=holder_starts,
        used=used,
        blocks=blocks,
        targets=_scattered(place, pair_targets, size, states),
        sets=_scattered(place, sets, size, len(members)),
        into_blocks=into_blocks,
        into=_scattered(into_place, place, into_size, size),
        into_order=rank,
        set_order=place[by_set],
        set_starts=np.searchsorted(sets[by_set], np.arange(len(members))),
        pairs=(pair_sources, pair_targets),
        pair_counts=counts,
        pair_starts=counts.cumsum() - counts,
        pair_places=place[by_source],
        pair_sets=sets[by_source],
        pair_targets=pair_targets[by_source],
        by_label=_by_label(renumbered[automaton.sources], renumbered[automaton.targets], automaton.labels),
    )


def _scattered(place: np.ndarray, values: np.ndarray, size: int, fill: int | bool) -> np.ndarray:
    """Return an array of `size` with these values at these places, and `fill` elsewhere."""
    found = np.full(size, fill, np.asarray(values).dtype)
    found[place] = values
    return found


def _sets(labels: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return each pair's set, int [K], and the labels of each set."""
    known: dict[bytes, int] = {}
    members: list[np.ndarray] = []
    found = np.empty(len(starts), np.intp)
    for k, labels_of in enumerate(np.split(labels, starts[1:]) if len(starts) else []):
        found[k] = known.setdefault(labels_of.tobytes(), len(members))
        if found[k] == len(members):
            members.append(labels_of)
    return found, members


def _padded(columns: np.ndarray, count: int) -> tuple[tuple[Block, ...], np.ndarray, int]:
    """Return blocks for entries of `count` columns, columns of many entries first, and the place of each entry.

    Where the blocks are cut costs least in all: padded entries, and so many entries more for each block.
    """
    degree = np.bincount(columns, minlength=count)
    depths = np.maximum(degree, 1)  # a sum of nothing is one of padding
    cuts = np.flatnonzero(np.concatenate([[True], depths[1:] != depths[:-1], [True]]))
    best, back = [0.0], [0]
    for j in range(1, len(cuts)):
        costs = [best[i] + depths[cuts[i]] * (cuts[j] - cuts[i]) + _CALL for i in range(j)]
        back.append(int(np.argmin(costs)))
        best.append(costs[back[-1]])
    blocks: list[Block] = []
    j = len(cuts) - 1
    while j > 0:
        first = int(cuts[back[j]])
        blocks.insert(0, Block(0, int(depths[first]), first, int(cuts[j]) - first))
        j = back[j]
    sizes = [block.depth * block.width for block in blocks]
    offsets = np.cumsum([0, *sizes])
    blocks = [block._replace(offset=int(offset)) for block, offset in zip(blocks, offsets, strict=False)]
    of = np.searchsorted([block.first for block in blocks], columns, side="right") - 1
    order = np.argsort(columns, kind="stable")
    depth = np.empty(len(columns), np.intp)
    depth[order] = np.arange(len(columns)) - (np.cumsum(degree) - degree)[columns[order]]
    counts, firsts = (np.array([block[i] for block in blocks], np.intp) for i in (3, 2))
    place = offsets[of] + depth * counts[of] + columns - firsts[of]
    return tuple(blocks), place, int(offsets[-1])


def _out(
    edges: tuple[np.ndarray, ...], pairs: tuple[np.ndarray, ...], starts: np.ndarray, states: int
) -> tuple[Edges, ...]:  # fmt: skip
    """Return each state's ways out: edges by label, pairs by their first label.

    edges: sources, targets and labels; pairs: sources, targets and sets; starts: the first edge of each pair.
    """
    sources, targets, labels = edges
    by_label = np.lexsort((labels, sources))
    by_first = np.lexsort((labels[starts], pairs[0]))
    cuts = np.searchsorted(sources[by_label], np.arange(1, states))
    pair_cuts = np.searchsorted(pairs[0][by_first], np.arange(1, states))
    columns = zip(
        *(np.split(column[by_label], cuts) for column in (labels, targets)),
        *(np.split(column[by_first], pair_cuts) for column in pairs[1:]), strict=True,
    )  # fmt: skip
    return tuple(Edges(labels=a, targets=b, pair_targets=c, sets=d) for a, b, c, d in columns)


def _by_label(sources: np.ndarray, targets: np.ndarray, labels: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    order = np.lexsort((sources, labels))
    found, starts = np.unique(labels[order], return_index=True)
    ends = np.append(starts, len(order))[1:]
    parts = {int(label): order[a:b] for label, a, b in zip(found, starts, ends, strict=True)}
    return {label: (sources[part], targets[part]) for label, part in parts.items()}
