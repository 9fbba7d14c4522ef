"""An automaton laid out for one pass over a canvas: best paths, all paths, and what both say of each position.

A canvas of L positions and an automaton of S states make a lattice: a path through it is a string of token classes
that the automaton takes. Edges with the same source and target are one *pair*, and the labels of a pair are a *set*;
an automaton has far fewer distinct sets than pairs, so that what depends on a position is first summed over each set.

    γ_i(s)  best score of any way from state s before position i to an end that is allowed    (`best_paths`)
    β_i(s)  log of the summed probability of all of them                                      (`all_paths`)

From β come the chances of leaving a state by each of its pairs, numbers between 0 and 1 whatever the masses are, and
from these, forwards, how likely the posterior is at each state and in each class. Only β needs logarithms: no forward
pass in logs is made, and nothing that is left out by rounding can weigh more than float32 tells from 0.

Pairs lie in padded blocks, [depth, states], states of about equally many pairs to a block, so that sums over a state's
pairs are sums of rows. Source: forward-backward of hidden Markov models (Rabiner 1989), over masses of a token class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .automaton import TokenAutomaton

NEVER = -1e30
"""Log of a probability of nothing: far below any real one, and finite, so that differences are never NaN."""

POSSIBLE = -1e29
"""What is above this is the log of a probability."""

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
    by_label: dict[int, tuple[np.ndarray, np.ndarray]]  # rising sources, and targets, of each label's edges

    def step(self, state: int, label: int) -> int:
        """Return the state that a label leads to, −1 where none does; the held class is a label like any other."""
        sources, targets = self.by_label.get(label, (_NONE, _NONE))
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
        out=_out(renumbered[sources], renumbered[targets], labels, pair_sources, pair_targets, sets, starts, states),
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
    cuts = np.flatnonzero(np.concatenate([[True], degree[1:] != degree[:-1], [True]]))
    best, back = [0.0], [0]
    for j in range(1, len(cuts)):
        costs = [best[i] + degree[cuts[i]] * (cuts[j] - cuts[i]) + _CALL for i in range(j)]
        back.append(int(np.argmin(costs)))
        best.append(costs[back[-1]])
    blocks: list[Block] = []
    j = len(cuts) - 1
    while j > 0:
        first = int(cuts[back[j]])
        blocks.insert(0, Block(0, int(degree[first]), first, int(cuts[j]) - first))
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
    sources: np.ndarray, targets: np.ndarray, labels: np.ndarray, pair_sources: np.ndarray, pair_targets: np.ndarray,
    sets: np.ndarray, starts: np.ndarray, states: int,
) -> tuple[Edges, ...]:  # fmt: skip
    """Return each state's ways out: edges by label, pairs by their first label."""
    edges = np.lexsort((labels, sources))
    pairs = np.lexsort((labels[starts], pair_sources))
    edge_cuts = np.searchsorted(sources[edges], np.arange(1, states))
    pair_cuts = np.searchsorted(pair_sources[pairs], np.arange(1, states))
    columns = zip(
        np.split(labels[edges], edge_cuts), np.split(targets[edges], edge_cuts),
        np.split(sets[pairs], pair_cuts), np.split(pair_targets[pairs], pair_cuts), strict=True,
    )  # fmt: skip
    return tuple(Edges(labels=a, targets=b, sets=c, pair_targets=d) for a, b, c, d in columns)


def _by_label(sources: np.ndarray, targets: np.ndarray, labels: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    order = np.lexsort((sources, labels))
    found, starts = np.unique(labels[order], return_index=True)
    ends = np.append(starts, len(order))[1:]
    parts = {int(label): order[a:b] for label, a, b in zip(found, starts, ends, strict=True)}
    return {label: (sources[part], targets[part]) for label, part in parts.items()}


# ---- A pass --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One canvas of one row, up to the end of its budget. L positions, C classes."""

    mass: np.ndarray  # float [L, C]
    score: np.ndarray  # float [L, C]
    best: np.ndarray  # int [L, C]
    moment: np.ndarray  # float [L, C]
    held: np.ndarray  # int [L]: the class that is held there, −1 where free
    start: int
    final: np.ndarray  # bool [S]: where it may end


class Paths(NamedTuple):
    """What follows from the sums over all paths."""

    beta: np.ndarray  # float32 [L + 1, S + 1]: β but for a number of each position; the last state is that of padding
    log_accept: float
    posterior: np.ndarray  # float64 [L, C]: log of each class's probability; NEVER at held positions
    weight: np.ndarray  # float64 [L, C]: log of posterior over prior


def over_sets(values: np.ndarray, members: np.ndarray, starts: np.ndarray, total: bool) -> np.ndarray:
    """Return the maximum or, where `total`, the log of the sum of exponentials over groups of rows.

    values float [C, L], members int [N], starts int [D] → [D, L].
    """
    rows = values[members]
    top = np.maximum.reduceat(rows, starts, axis=0)
    if not total or len(starts) == len(members):
        return top
    counts = np.diff(starts, append=len(members))
    rows -= np.repeat(top, counts, axis=0)
    np.exp(rows, out=rows)
    found = np.log(np.add.reduceat(rows, starts, axis=0))
    found += top
    return found


def _of_sets(lattice: Lattice, values: np.ndarray, total: bool) -> np.ndarray:
    """Return values [L, C] over the sets, [L, D + 1]; the last is that of padding."""
    found = np.full((len(values), len(lattice.member_starts) + 1), NEVER, values.dtype)
    found[:, :-1] = over_sets(np.ascontiguousarray(values.T), lattice.members, lattice.member_starts, total).T
    return found


def _views(flat: np.ndarray, blocks: Sequence[Block]) -> list[np.ndarray]:
    return [flat[b.offset : b.offset + b.depth * b.width].reshape(b.depth, b.width) for b in blocks]


def best_paths(lattice: Lattice, row: Row) -> np.ndarray:
    """Return γ, float64 [L + 1, S + 1]: scores are float32, so that their sums are exact but for the last bits."""
    length, states = len(row.held), lattice.states
    sets = _of_sets(lattice, row.score, False).astype(np.float64)
    gamma = np.full((length + 1, states + 1), NEVER)
    gamma[length, :states][row.final] = 0
    terms, other = np.empty(len(lattice.targets)), np.empty(len(lattice.targets))
    views = _views(terms, lattice.blocks)
    for i in range(length - 1, -1, -1):
        after, here = gamma[i + 1], gamma[i]
        if row.held[i] >= 0:
            sources, targets = lattice.by_label[int(row.held[i])]
            here[sources] = after[targets]
            continue
        np.take(after, lattice.targets, out=terms, mode="wrap")
        np.take(sets[i], lattice.sets, out=other, mode="wrap")
        np.add(terms, other, out=terms)
        for view, block in zip(views, lattice.blocks, strict=True):
            if block.depth:
                np.maximum.reduce(view, axis=0, out=here[block.first : block.first + block.width])
    return gamma


def walk(lattice: Lattice, row: Row, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best string's classes, int [L], and the states before each position and after the last, int [L + 1].

    Of equal ways the one whose pair has the least label, and in it the least label.
    """
    length = len(row.held)
    sets = _of_sets(lattice, row.score, False)
    labels, states = np.empty(length, np.intp), np.empty(length + 1, np.intp)
    ends = np.append(lattice.member_starts, len(lattice.members))
    state = states[0] = row.start
    for i in range(length):
        edges = lattice.out[state]
        if row.held[i] >= 0:
            labels[i] = row.held[i]
            state = lattice.step(state, int(row.held[i]))
        else:
            ways = gamma[i + 1][edges.pair_targets]
            ways += sets[i][edges.sets]
            k = ways.argmax()
            state, chosen = int(edges.pair_targets[k]), edges.sets[k]
            members = lattice.members[ends[chosen] : ends[chosen + 1]]
            labels[i] = members[row.score[i][members].argmax()] if len(members) > 1 else members[0]
        states[i + 1] = state
    return labels, states


def all_paths(lattice: Lattice, row: Row, along: np.ndarray) -> Paths:
    """Return the sums over all paths; along int [L + 1]: states of one of them, the best.

    Logs of a position are kept relative to the state of that path, so that those that matter are small numbers and
    float32 tells them apart, however improbable all of it is.
    """
    sets = _of_sets(lattice, row.mass, True)
    beta, chances, log_accept = _backward(lattice, row, sets, along)
    shares = _forward(lattice, row, chances)
    free = row.held < 0
    with np.errstate(divide="ignore"):
        logs = np.where(shares > 0, np.log(shares), NEVER) - sets[:, :-1]
    weight = np.full((len(free), lattice.classes), NEVER)
    rows = np.ascontiguousarray(logs.T, np.float64)
    weight[:, lattice.used] = over_sets(rows, lattice.holders, lattice.holder_starts, True).T
    posterior = weight + row.mass
    # They sum to 1 but for rounding; what is forced is then 1 exactly, and its entropy 0.
    total = np.log(np.exp(posterior[free]).sum(1, keepdims=True))
    posterior[free] -= total
    weight[free] -= total
    posterior[~free] = weight[~free] = NEVER
    return Paths(beta, log_accept, posterior, weight)


def _backward(lattice: Lattice, row: Row, sets: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return β, the chances of leaving each state by each of its pairs, float32 [L, P], and log P(accept)."""
    length, states = len(row.held), lattice.states
    beta = np.full((length + 1, states + 1), NEVER, np.float32)
    beta[length, :states][row.final] = 0
    chances = np.empty((length, len(lattice.targets)), np.float32)
    terms = np.empty(len(lattice.targets), np.float32)
    scale = 0.0
    for i in range(length - 1, -1, -1):
        after, here = beta[i + 1], beta[i, :states]
        if row.held[i] >= 0:
            sources, targets = lattice.by_label[int(row.held[i])]
            here[sources] = after[targets]
        else:
            np.take(after, lattice.targets, out=terms, mode="wrap")
            np.take(sets[i], lattice.sets, out=chances[i], mode="wrap")
            np.add(chances[i], terms, out=chances[i])
            for view, block in zip(_views(chances[i], lattice.blocks), lattice.blocks, strict=True):
                if block.depth:
                    here[block.first : block.first + block.width] = _normalised(view)
        reference = here[along[i]]
        scale += float(reference)
        here -= reference
    return beta, chances, scale


def _normalised(terms: np.ndarray) -> np.ndarray:
    """Turn logs [depth, n] into shares of their columns, in place, and return the logs of the columns' sums."""
    top = np.maximum.reduce(terms, axis=0)
    np.subtract(terms, top, out=terms)
    np.exp(terms, out=terms)
    total = np.add.reduce(terms, axis=0)
    np.divide(terms, total, out=terms)
    return top + np.log(total)


def _forward(lattice: Lattice, row: Row, chances: np.ndarray) -> np.ndarray:
    """Return how probable the posterior is in each set, float32 [L, D]; chances becomes that of each pair."""
    length, states = len(row.held), lattice.states
    shares = np.zeros((length, len(lattice.set_starts)), np.float32)
    at = np.zeros(states, np.float32)
    at[row.start] = 1
    flow = np.zeros(len(lattice.targets) + 1, np.float32)
    views = _views(flow, lattice.blocks)
    into, by_set = np.empty(len(lattice.into), np.float32), np.empty(len(lattice.set_order), np.float32)
    into_views, sums = _views(into, lattice.into_blocks), np.zeros(states, np.float32)
    for i in range(length):
        if row.held[i] >= 0:
            sources, targets = lattice.by_label[int(row.held[i])]
            at = np.bincount(targets, at[sources], states).astype(np.float32)
            continue
        for view, given, block in zip(views, _views(chances[i], lattice.blocks), lattice.blocks, strict=True):
            np.multiply(given, at[block.first : block.first + block.width], out=view)
        np.take(flow, lattice.set_order, out=by_set, mode="wrap")
        np.add.reduceat(by_set, lattice.set_starts, out=shares[i])
        np.take(flow, lattice.into, out=into, mode="wrap")
        for view, block in zip(into_views, lattice.into_blocks, strict=True):
            np.add.reduce(view, axis=0, out=sums[block.first : block.first + block.width])
        at = sums[lattice.into_order]
    return shares
