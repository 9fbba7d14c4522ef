"""What a pass says of each position, given an automaton: the best string, and sums over all strings.

A canvas of L positions and an automaton of S states make a lattice: a path through it is a string of token classes
that the automaton takes.

    γ_i(s)  best score of any way from state s before position i to an end that is allowed    (`best_paths`)
    β_i(s)  log of the summed probability of all of them                                      (`all_paths`)

From β come the chances of leaving a state by each of its pairs, numbers between 0 and 1 whatever the masses are, and
from these, forwards, how likely the posterior is at each state and in each class. Only β needs logarithms: no forward
pass in logs is made, and what is left out, by rounding or on purpose, is at most 1e-12 of the posterior a state.
Source: forward-backward of hidden Markov models (Rabiner 1989), over masses of a token class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..core.parts import NOTHING
from .layout import Block, Lattice

POSSIBLE = NOTHING / 10
"""What is above this is the log of a probability."""

_UNLIKELY = 1e-12
"""States of a posterior that is sure of itself are left out below this."""

_FEW = 4
"""How many times as long a pair takes that is picked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One canvas of one row, up to the end of its budget. L positions, C classes."""

    mass: np.ndarray  # float32 [L, C]
    score: np.ndarray  # float [L, C]
    best: np.ndarray  # int [L, C]
    moment: np.ndarray  # float [L, C]
    held: np.ndarray  # int [L]: the class that is held there, −1 where free, C where it is no token of the language
    start: int
    final: np.ndarray  # bool [S]: where it may end


class Paths(NamedTuple):
    """What follows from the sums over all paths."""

    beta: np.ndarray  # float32 [L + 1, S + 1]: β but for a number of each position; the last state is that of padding
    log_accept: float
    posterior: np.ndarray  # float64 [L, C]: log of each class's probability; NOTHING at held positions
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
    found = np.full((len(values), len(lattice.member_starts) + 1), NOTHING, values.dtype)
    found[:, :-1] = over_sets(np.ascontiguousarray(values.T), lattice.members, lattice.member_starts, total).T
    return found


def _views(flat: np.ndarray, blocks: Sequence[Block]) -> list[np.ndarray]:
    """Return the blocks of an array [..., P], each [..., depth, width], in its memory."""
    parts = (flat[..., b.offset : b.offset + b.depth * b.width] for b in blocks)
    return [part.reshape(*flat.shape[:-1], b.depth, b.width) for part, b in zip(parts, blocks, strict=True)]


def _spans(blocks: Sequence[Block]) -> list[slice]:
    return [slice(b.first, b.first + b.width) for b in blocks]


class Best(NamedTuple):
    """Scores of best paths, float64: the scores added up are float32, so that the sums are exact but for last bits."""

    gamma: np.ndarray  # [L + 1, S + 1]; the last state is that of padding
    sets: np.ndarray  # [L, D + 1], of each set's best class


def best_paths(lattice: Lattice, row: Row) -> Best:
    """Return γ."""
    length, states = len(row.held), lattice.states
    sets = _of_sets(lattice, row.score, False).astype(np.float64)
    gamma = np.full((length + 1, states + 1), NOTHING)
    gamma[length, :states][row.final] = 0
    terms, other = np.empty(len(lattice.targets)), np.empty(len(lattice.targets))
    blocks = [*zip(_views(terms, lattice.blocks), _spans(lattice.blocks), strict=True)]
    for i in range(length - 1, -1, -1):
        after, here = gamma[i + 1], gamma[i]
        if row.held[i] >= 0:
            sources, targets = lattice.labelled(int(row.held[i]))
            here[sources] = after[targets]
            continue
        after.take(lattice.targets, out=terms, mode="wrap")
        sets[i].take(lattice.sets, out=other, mode="wrap")
        np.add(terms, other, out=terms)
        for view, span in blocks:
            np.maximum.reduce(view, axis=0, out=here[span])
    return Best(gamma, sets)


def follow(lattice: Lattice, row: Row, best: Best) -> tuple[np.ndarray, np.ndarray]:
    """Return the best string's classes, int [L], and the states before each position and after the last, int [L + 1].

    Of equal ways the one whose pair has the least label, and in it the least label.
    """
    length = len(row.held)
    labels, states = np.empty(length, np.intp), np.empty(length + 1, np.intp)
    ends = np.append(lattice.member_starts, len(lattice.members))
    state = states[0] = row.start
    for i in range(length):
        edges = lattice.out[state]
        if row.held[i] >= 0:
            labels[i] = row.held[i]
            state = lattice.step(state, int(row.held[i]))
        else:
            ways = best.gamma[i + 1][edges.pair_targets]
            ways += best.sets[i][edges.sets]
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
        logs = np.where(shares > 0, np.log(shares), NOTHING) - sets[:, :-1]
    weight = np.full((len(free), lattice.classes), NOTHING)
    rows = np.ascontiguousarray(logs.T)
    weight[:, lattice.used] = over_sets(rows, lattice.holders, lattice.holder_starts, True).T
    posterior = weight + row.mass
    # They sum to 1 but for rounding; what is forced is then 1 exactly, and its entropy 0.
    total = np.log(np.exp(posterior[free]).sum(1, keepdims=True))
    posterior[free] -= total
    weight[free] -= total
    posterior[~free] = weight[~free] = NOTHING
    return Paths(beta, log_accept, posterior, weight)


class _Chances(NamedTuple):
    """How likely each state is left by each of its pairs: `parts` over `sums`."""

    parts: np.ndarray  # float32 [L, P]
    sums: np.ndarray  # float32 [L, S]


def _backward(lattice: Lattice, row: Row, sets: np.ndarray, along: np.ndarray) -> tuple[np.ndarray, _Chances, float]:
    """Return β, the chances that follow from it, and log P(accept)."""
    length, states = len(row.held), lattice.states
    beta = np.full((length + 1, states + 1), NOTHING, np.float32)
    beta[length, :states][row.final] = 0
    chances = _Chances(np.empty((length, len(lattice.targets)), np.float32), np.ones((length, states), np.float32))
    terms = np.empty(len(lattice.targets), np.float32)
    blocks = [*zip(_views(chances.parts, lattice.blocks), _spans(lattice.blocks), strict=True)]
    scale = 0.0
    for i in range(length - 1, -1, -1):
        after, here = beta[i + 1], beta[i, :states]
        if row.held[i] >= 0:
            sources, targets = lattice.labelled(int(row.held[i]))
            here[sources] = after[targets]
        else:
            parts, sums = chances.parts[i], chances.sums[i]
            after.take(lattice.targets, out=terms, mode="wrap")
            sets[i].take(lattice.sets, out=parts, mode="wrap")
            np.add(parts, terms, out=parts)
            for block, span in blocks:
                part, top = block[i], here[span]
                if len(part) == 1:  # the only way out: its chance is 1
                    top[:] = part[0]
                    part.fill(1)
                    continue
                np.maximum.reduce(part, axis=0, out=top)
                np.subtract(part, top, out=part)
                np.exp(part, out=part)
                top += np.log(np.add.reduce(part, axis=0, out=sums[span]))
        reference = here[along[i]]
        scale += float(reference)
        here -= reference
    return beta, chances, scale


def _onward(
    lattice: Lattice, at: np.ndarray, likely: np.ndarray, parts: np.ndarray, shares: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Return the next states' probabilities, float32 [S], from a few states alone; shares [D] are filled in."""
    counts = lattice.pair_counts[likely]
    ends = counts.cumsum()
    pairs = np.arange(ends[-1]) + (lattice.pair_starts[likely] + counts - ends).repeat(counts)
    flow = parts[lattice.pair_places[pairs]] * at[likely].repeat(counts)
    shares[:] = np.bincount(lattice.pair_sets[pairs], flow, len(shares))
    return np.bincount(lattice.pair_targets[pairs], flow, lattice.states).astype(np.float32)


def _forward(lattice: Lattice, row: Row, chances: _Chances) -> np.ndarray:
    """Return how probable the posterior is in each set, float32 [L, D]."""
    length, states = len(row.held), lattice.states
    shares = np.zeros((length, len(lattice.set_starts)), np.float32)
    at = np.zeros(states, np.float32)
    at[row.start] = 1
    flow = np.zeros(len(lattice.targets) + 1, np.float32)
    parts = _views(chances.parts, lattice.blocks)
    blocks = [*zip(_views(flow, lattice.blocks), parts, _spans(lattice.blocks), strict=True)]
    into, by_set = np.empty(len(lattice.into), np.float32), np.empty(len(lattice.set_order), np.float32)
    arrived = np.zeros(states, np.float32)
    sums = [*zip(_views(into, lattice.into_blocks), [arrived[s] for s in _spans(lattice.into_blocks)], strict=True)]
    for i in range(length):
        if row.held[i] >= 0:
            sources, targets = lattice.labelled(int(row.held[i]))
            at = np.bincount(targets, at[sources], states).astype(np.float32)
            continue
        likely = (at > _UNLIKELY).nonzero()[0]
        at /= chances.sums[i]
        if 8 * len(likely) < states and _FEW * lattice.pair_counts[likely].sum() < len(lattice.pair_places):
            at = _onward(lattice, at, likely, chances.parts[i], shares[i])
            continue
        for view, part, span in blocks:
            np.multiply(part[i], at[span], out=view)
        flow.take(lattice.set_order, out=by_set, mode="wrap")
        np.add.reduceat(by_set, lattice.set_starts, out=shares[i])
        flow.take(lattice.into, out=into, mode="wrap")
        for view, total in sums:
            np.add.reduce(view, axis=0, out=total)
        arrived.take(lattice.into_order, out=at, mode="wrap")
    return shares
