"""Small automata for tests of constraints, and what every string of a small vocabulary says of a pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from dgemma.constraints.automaton import TokenAutomaton
from dgemma.core.parts import NOTHING, Masses

VOCABULARY, POSITIONS = 6, 5


def automaton_of(table: np.ndarray, accepting: np.ndarray, held_class: bool = False) -> TokenAutomaton:
    """Return the automaton of a table int [S, V] (−1: no edge), from state 0; states that lead nowhere are left out.

    With `held_class` every state also goes, with the class that no token has, to the state before it in a ring.
    """
    states = len(table)
    table = np.where(_useful(table, accepting)[table] & (table >= 0), table, -1)
    kept = np.flatnonzero(_reached(table))
    number = np.full(states + 1, -1)
    number[kept] = np.arange(len(kept))
    table, accepting = number[table[kept]], accepting[kept]
    columns: dict[bytes, int] = {}
    live = [v for v in range(table.shape[1]) if (table[:, v] >= 0).any()]
    classes = np.full(table.shape[1], -1, np.int32)
    for v in live:
        classes[v] = columns.setdefault(table[:, v].tobytes(), len(columns))
    firsts = [int(np.flatnonzero(classes == c)[0]) for c in range(len(columns))]
    edges = [(s, c, int(table[s, v])) for s in range(len(kept)) for c, v in enumerate(firsts) if table[s, v] >= 0]
    if held_class:
        edges += [(s, len(columns), (s - 1) % len(kept)) for s in range(len(kept))]
    sources, labels, targets = np.array(sorted(edges), np.int32).reshape(-1, 3).T
    return TokenAutomaton(
        classes=classes, count=len(columns) + held_class, sources=sources, labels=labels, targets=targets,
        states=len(kept), start=0, accepting=accepting, held_class=len(columns) if held_class else None,
    )  # fmt: skip


def _useful(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    found = np.append(accepting, False)
    for _ in range(len(table)):
        found[:-1] |= found[table].any(1)
    return found


def _reached(table: np.ndarray) -> np.ndarray:
    found = np.zeros(len(table) + 1, bool)
    found[0] = True
    for _ in range(len(table)):
        found[table[found[:-1]]] = True
    return found[:-1]


def random_automaton(
    rng: np.random.Generator, *, states: int = 5, tokens: int = VOCABULARY, ends: bool = True, held_class: bool = False
) -> TokenAutomaton:
    """Return an automaton whose last two tokens, where it `ends`, are an end token and padding."""
    while True:
        columns = rng.integers(0, states, (states, rng.integers(1, tokens + 1)))
        columns[rng.random(columns.shape) < rng.choice([0.2, 0.5, 0.7])] = -1
        table = columns[:, rng.integers(0, columns.shape[1], tokens)]
        accepting = rng.random(states) < 0.4
        if ends:
            table[:, -2:] = -1
            table[accepting, -2] = states
            table = np.vstack([table, [-1] * (tokens - 2) + [states, states]])
            accepting = np.append(accepting, True)
        if _useful(table, accepting)[0]:
            return automaton_of(table, accepting, held_class)


def masses_of(logs: np.ndarray, automaton: TokenAutomaton, dtype: type = np.float32) -> Masses:
    """Return what the head's class sums are for log probabilities [L, V]."""
    length, count = len(logs), automaton.count
    mass, score = np.full((length, count), NOTHING), np.full((length, count), NOTHING)
    moment, best = np.zeros((length, count)), np.zeros((length, count), np.int32)
    for c in range(count):
        tokens = np.flatnonzero(automaton.classes == c)
        if len(tokens):
            own = logs[:, tokens]
            score[:, c], best[:, c] = own.max(1), tokens[own.argmax(1)]
            mass[:, c] = np.maximum(np.logaddexp.reduce(own, axis=1), score[:, c])
            moment[:, c] = (np.exp(own) * own).sum(1)
    return Masses(mass.astype(dtype), best, score.astype(dtype), moment.astype(dtype))


def random_logs(rng: np.random.Generator, length: int, spread: float = 2.0, tokens: int = VOCABULARY) -> np.ndarray:
    logs = rng.normal(0, spread, (length, tokens))
    return logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)


STRINGS = np.array(list(product(range(VOCABULARY), repeat=POSITIONS)))


def language(automaton: TokenAutomaton, held: np.ndarray, budget: int) -> np.ndarray:
    """Return the strings of `budget` tokens that the automaton takes and that keep what is held, int [n, budget]."""
    strings = np.unique(STRINGS[:, :budget], axis=0)
    step = np.full((automaton.states + 1, automaton.count + 1), automaton.states)
    step[automaton.sources, automaton.labels] = automaton.targets
    at, kept = np.full(len(strings), automaton.start), np.ones(len(strings), bool)
    for i in range(budget):
        labels = automaton.classes[strings[:, i]]
        if i < len(held) and held[i] >= 0:
            kept &= strings[:, i] == held[i]
            labels = labels if automaton.held_class is None else np.full_like(labels, automaton.held_class)
        at = step[at, labels]
    return strings[kept & np.append(automaton.accepting, False)[at]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What every string says of a canvas."""

    strings: np.ndarray  # [n, L]
    logs: np.ndarray  # [n], of each string; held positions count 0
    log_accept: float
    posterior: np.ndarray  # [L, V]
    entropy: np.ndarray  # [L]


def answer(strings: np.ndarray, logs: np.ndarray, held: np.ndarray) -> Answer:
    """Weigh the different strings of a canvas; held int [L]."""
    strings = np.unique(strings, axis=0)
    own = np.where(held >= 0, 0, logs[np.arange(len(logs)), strings])
    scores = own.sum(1)
    total = np.logaddexp.reduce(scores)
    posterior = np.zeros(logs.shape)
    for i in range(len(logs)):
        np.add.at(posterior[i], strings[:, i], np.exp(scores - total))
    entropy = -np.where(posterior > 0, posterior * np.log(np.where(posterior > 0, posterior, 1)), 0).sum(1)
    return Answer(strings=strings, logs=scores, log_accept=float(total), posterior=posterior, entropy=entropy)
