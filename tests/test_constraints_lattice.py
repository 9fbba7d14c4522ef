"""Conditioning a canvas on an automaton, against every string of a small vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma.constraints.automaton import TokenAutomaton
from dgemma.constraints.walk import Constraint, Walk
from dgemma.core.canvas import Chosen
from dgemma.core.errors import DgemmaError
from dgemma.core.parts import Masses

from .lattices import (
    POSITIONS,
    VOCABULARY,
    answer,
    language,
    masses_of,
    random_automaton,
    random_logs,
)

FREE = np.full(POSITIONS, -1)
CASES = [(seed, ends, held_class, holds) for seed in range(60) for ends, held_class, holds in
         [(True, False, 0.0), (True, False, 0.3), (False, False, 0.0), (True, True, 0.3)]]  # fmt: skip


def drawn_case(
    seed: int, ends: bool, held_class: bool, holds: float
) -> tuple[np.random.Generator, TokenAutomaton, np.ndarray]:
    rng = np.random.default_rng([seed, ends, held_class, int(10 * holds)])
    automaton = random_automaton(rng, states=int(rng.integers(1, 7)), ends=ends, held_class=held_class)
    held = np.where(rng.random(POSITIONS) < holds, rng.integers(0, VOCABULARY, POSITIONS), -1)
    return rng, automaton, held


def begun(automaton: TokenAutomaton, held: np.ndarray, budget: int, canvas: int, feedback: float = 0.0) -> Walk | None:
    """Begin, or return None where every string says that nothing fits and it is refused."""
    constraint = Constraint(automaton=automaton, feedback=feedback)
    if len(language(automaton, held, budget)):
        return constraint.begin(budget=budget, canvas_length=canvas, held=held[:budget])
    with pytest.raises(DgemmaError) as refused:
        constraint.begin(budget=budget, canvas_length=canvas, held=held[:budget])
    assert "\n" not in str(refused.value)
    return None


def chosen(way: Walk, masses: Masses, uniforms: np.ndarray, held: np.ndarray, greedy: bool = False) -> Chosen:
    return way.choose(masses, uniforms=uniforms, held=held, bound=np.inf, greedy=greedy)


def inside(logs: np.ndarray, automaton: TokenAutomaton, label: int, rest: float) -> int:
    """Draw a token of a class, in rising order, from log probabilities [V]."""
    tokens = np.flatnonzero(automaton.classes == label)
    shares = np.exp(logs[tokens] - np.logaddexp.reduce(logs[tokens]))
    return int(tokens[min(np.searchsorted(np.cumsum(shares), rest, side="right"), len(tokens) - 1)])


@pytest.mark.parametrize("canvas", [5, 3])
@pytest.mark.parametrize("quarter", range(4))
def test_a_pass_says_what_every_string_says(canvas: int, quarter: int) -> None:
    """Entropies, marginals, log P(accept), the best string and where it leads, canvas by canvas."""
    seen = 0
    for case in CASES[quarter::4]:
        rng, automaton, held = drawn_case(*case)
        budget = int(rng.integers(1, POSITIONS + 1))
        way = begun(automaton, held, budget, canvas, feedback=1.0)
        strings = language(automaton, held, budget)
        committed = np.zeros(0, int)
        while way is not None and len(committed) < budget:
            at = len(committed)
            length = min(canvas, budget - at)
            fixed = np.append(held, FREE)[at : at + canvas]
            logs = random_logs(rng, canvas)
            true = answer(strings[:, at : at + length], logs[:length], fixed[:length])
            found = chosen(
                way, masses_of(logs, automaton), rng.random(canvas), np.where(np.arange(canvas) < length, fixed, -1)
            )
            assert way.log_accept == pytest.approx(true.log_accept, abs=1e-5)
            np.testing.assert_allclose(found.entropy[:length], true.entropy, atol=1e-5)
            assert not found.entropy[length:].any()
            np.testing.assert_allclose(posterior(found, logs, automaton)[:length][fixed[:length] < 0],
                                       true.posterior[fixed[:length] < 0], atol=1e-5)  # fmt: skip
            score = {s.tobytes(): x for s, x in zip(true.strings, true.logs, strict=True)}
            best = found.argmax[:length].astype(true.strings.dtype)
            assert score[best.tobytes()] == pytest.approx(true.logs.max(), abs=1e-5)
            committed = np.concatenate([committed, best])
            strings = strings[(strings[:, : len(committed)] == committed).all(1)]
            way.commit(found.argmax)
            seen += 1
    assert seen > 30


def posterior(found: Chosen, logs: np.ndarray, automaton: TokenAutomaton) -> np.ndarray:
    """Return the tokens' posterior, float [L, V], of a pass with the whole of it fed back."""
    assert found.factors is not None
    return np.exp(logs) * found.factors[:, automaton.classes]


@pytest.mark.parametrize("seed", range(5))
def test_drawn_strings_have_the_posteriors_distribution(seed: int) -> None:
    """Chi-squared, over whole strings, the draw inside the class included."""
    rng, automaton, held = drawn_case(seed, True, seed == 4, 0.2)
    while len(language(automaton, held, POSITIONS)) < 10:
        automaton, held = random_automaton(rng), np.where(rng.random(POSITIONS) < 0.2, held, -1)
    way = Constraint(automaton=automaton).begin(budget=POSITIONS, canvas_length=POSITIONS, held=held)
    logs = random_logs(rng, POSITIONS, 1.0)
    masses = masses_of(logs, automaton)
    true = answer(language(automaton, held, POSITIONS), logs, held)
    number = {s.tobytes(): i for i, s in enumerate(true.strings)}
    counts, runs = np.zeros(len(true.strings)), 3000
    for _ in range(runs):
        found = chosen(way, masses, rng.random(POSITIONS), held)
        string = [t if t >= 0 else inside(logs[i], automaton, found.label[i], found.rest[i])
                  for i, t in enumerate(found.token)]  # fmt: skip
        counts[number[np.array(string, true.strings.dtype).tobytes()]] += 1
    expected = runs * np.exp(true.logs - true.log_accept)
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    assert counts[-1] < expected[-1] + 5 * expected[-1] ** 0.5 + 5
    freedom = len(counts) - 1
    squared = ((counts - expected) ** 2 / np.maximum(expected, 8)).sum()
    assert squared < freedom + 4.5 * (2 * freedom) ** 0.5 + 8
