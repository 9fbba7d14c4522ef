"""Conditioning a canvas on an automaton, against every string of a small vocabulary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgemma.backends.numpy.ops import NumpyOps
from dgemma.constraints.automaton import TokenAutomaton
from dgemma.constraints.lattice import Row, all_paths, best_paths, follow
from dgemma.constraints.layout import lattice_of
from dgemma.constraints.reach import borders
from dgemma.constraints.walk import Constraint, Walk, _perhaps_accepted
from dgemma.core import sampler
from dgemma.core.canvas import Chosen
from dgemma.core.errors import DgemmaError
from dgemma.core.parts import Masses

from .lattices import (
    POSITIONS,
    VOCABULARY,
    answer,
    automaton_of,
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
    counts, runs = np.zeros(len(true.strings)), 2000
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


def larger(seed: int, states: int = 40, tokens: int = 60) -> tuple[np.random.Generator, TokenAutomaton]:
    rng = np.random.default_rng(seed)
    return rng, random_automaton(rng, states=states, tokens=tokens)


def by_recursion(automaton: TokenAutomaton, mass: np.ndarray, final: np.ndarray) -> tuple[float, np.ndarray]:
    """Forward and backward, edge by edge in float64 logs: log P(accept) and the classes' log posterior [L, C].

    That the sum over states of α + β is the same before every position is checked on the way.
    """
    sources, labels, targets = automaton.sources, automaton.labels, automaton.targets
    length = len(mass)
    alpha, beta = np.full((2, length + 1, automaton.states), -np.inf)
    alpha[0, automaton.start] = 0
    beta[length, final] = 0
    for i in range(length):
        np.logaddexp.at(alpha[i + 1], targets, alpha[i, sources] + mass[i, labels])
    for i in range(length - 1, -1, -1):
        np.logaddexp.at(beta[i], sources, beta[i + 1, targets] + mass[i, labels])
    totals = np.logaddexp.reduce(alpha + beta, axis=1)
    np.testing.assert_allclose(totals, totals[0], rtol=1e-12)
    posterior = np.full(mass.shape, -np.inf)
    for i in range(length):
        np.logaddexp.at(posterior[i], labels, alpha[i, sources] + mass[i, labels] + beta[i + 1, targets] - totals[0])
    return float(totals[0]), posterior


@pytest.mark.parametrize("spread", [1.0, 60.0, 300.0, 5000.0])
def test_hostile_masses_lose_no_path(spread: float) -> None:
    """Masses that lie hundreds of nats apart, of positions and of classes, so that every path is far below another."""
    for seed in range(6):
        rng, automaton = larger(seed)
        lattice, length = lattice_of(automaton), 40
        mass = (-spread * rng.random((length, automaton.count)) - spread * rng.integers(0, 2, (length, 1))).astype("f4")
        row = Row(
            mass=mass, score=mass, best=np.zeros(mass.shape, int), moment=np.zeros(mass.shape, "f4"),
            held=np.full(length, -1), start=lattice.start, final=lattice.accepting,
        )  # fmt: skip
        labels, states = follow(lattice, row, best_paths(lattice, row))
        found = all_paths(lattice, row, states)
        total, posterior = by_recursion(automaton, mass.astype(np.float64), automaton.accepting)
        assert found.log_accept == pytest.approx(total, rel=2e-6, abs=1e-4)
        np.testing.assert_allclose(np.exp(found.posterior), np.exp(posterior), atol=1e-4 + 1e-7 * spread)
        np.testing.assert_allclose(np.exp(found.posterior).sum(1), 1, atol=1e-6)
        at = automaton.start
        for label in labels:
            (edge,) = np.flatnonzero((automaton.sources == at) & (automaton.labels == label))
            at = automaton.targets[edge]
        assert automaton.accepting[at]


def test_the_best_string_is_the_best_however_far_below_others() -> None:
    """Its score is that of a recursion over edges, exactly: sums are float64."""
    for seed in range(6):
        rng, automaton = larger(seed)
        lattice, length = lattice_of(automaton), 60
        score = (-300 * rng.random((length, automaton.count))).astype("f4")
        row = Row(
            mass=score, score=score, best=np.zeros(score.shape, int), moment=np.zeros(score.shape, "f4"),
            held=np.full(length, -1), start=lattice.start, final=lattice.accepting,
        )  # fmt: skip
        labels, _ = follow(lattice, row, best_paths(lattice, row))
        best = np.where(automaton.accepting, 0.0, -np.inf)
        for i in range(length - 1, -1, -1):
            before = np.full(automaton.states, -np.inf)
            np.maximum.at(before, automaton.sources, best[automaton.targets] + score[i, automaton.labels])
            best = before
        assert score[np.arange(length), labels].astype(np.float64).sum() == pytest.approx(best[0], abs=1e-9)


def test_a_token_said_to_be_drawn_is_the_one_of_the_draw_inside_its_class() -> None:
    """Whatever the order of the vocabulary; and where it is not said, nothing could have been."""
    rng, automaton = larger(3, states=4)
    said = unsaid = 0
    for _ in range(30):
        length = 30
        logs = random_logs(rng, length, float(rng.choice([0.3, 3, 10])), 60)
        way = Constraint(automaton=automaton).begin(budget=length, canvas_length=length, held=np.zeros(0, int))
        found = chosen(way, masses_of(logs, automaton), rng.random(length), np.full(length, -1))
        for i, token in enumerate(found.token):
            true = inside(logs[i], automaton, found.label[i], found.rest[i])
            assert token in (-1, true)
            said, unsaid = said + (token >= 0), unsaid + (token < 0)
    assert said > 100 and unsaid > 100


@pytest.mark.parametrize("bound", [0.0, 0.1, 3.0, 1e30])
def test_what_may_be_accepted_is_looked_into(bound: float) -> None:
    """A position that the sampler accepts has its own token; of others any may be said."""
    rng, automaton = larger(5, states=6)
    length, known = 40, 0
    for _ in range(10):
        logs = random_logs(rng, length, 4, 60)
        way = Constraint(automaton=automaton).begin(budget=length, canvas_length=length, held=np.zeros(0, int))
        masses, uniforms = masses_of(logs, automaton), rng.random(length).astype(np.float32)
        found = way.choose(masses, uniforms=uniforms, held=np.full(length, -1), bound=bound, greedy=False)
        full = chosen(way, masses, uniforms, np.full(length, -1))
        accepted = sampler.accept(NumpyOps("float32"), found.entropy[None], np.array([[bound]], np.float32))[0]
        np.testing.assert_array_equal(found.token[accepted], full.token[accepted])
        known += np.count_nonzero(found.token != full.token)
    assert known if bound < 1 else not known or bound < 1e30


def test_a_greedy_row_draws_the_best_string() -> None:
    rng, automaton = larger(2)
    way = Constraint(automaton=automaton).begin(budget=20, canvas_length=20, held=np.zeros(0, int))
    masses, uniforms = masses_of(random_logs(rng, 20, 3, 60), automaton), rng.random(20)
    greedy, drawn = (chosen(way, masses, uniforms, np.full(20, -1), greedy=g) for g in (True, False))
    np.testing.assert_array_equal(greedy.token, greedy.argmax)
    np.testing.assert_array_equal(greedy.argmax, drawn.argmax)
    np.testing.assert_array_equal(greedy.entropy, drawn.entropy)


def test_what_is_beyond_the_budget_holds_no_canvas_up() -> None:
    """What would be committed there stays what the first pass made of it; what the next pass reads goes on changing."""
    rng, automaton = larger(4)
    way = Constraint(automaton=automaton).begin(budget=12, canvas_length=20, held=np.zeros(0, int))
    one, other = (
        chosen(way, masses_of(random_logs(rng, 20, 3, 60), automaton), rng.random(20), np.full(20, -1))
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.argmax[12:], other.argmax[12:])
    assert (one.argmax[:12] != other.argmax[:12]).any() and (one.token[12:] != other.token[12:]).any()


def test_positions_beyond_the_budget_are_free() -> None:
    """They are outside the language: their likeliest token, no entropy, fed back as they are."""
    rng, automaton = larger(4)
    logs = random_logs(rng, 20, 3, 60)
    masses = masses_of(logs, automaton)
    short, alone = (
        Constraint(automaton=automaton, feedback=0.5).begin(budget=12, canvas_length=length, held=np.zeros(0, int))
        for length in (20, 12)
    )
    uniforms = rng.random(20)
    found = chosen(short, masses, uniforms, np.full(20, -1))
    true = chosen(alone, Masses(*(one[:12] for one in masses)), uniforms[:12], np.full(12, -1))
    for mine, theirs in zip(found, true, strict=True):
        assert mine is not None and theirs is not None
        np.testing.assert_array_equal(mine[:12], theirs)
    assert short.log_accept == alone.log_accept
    assert not found.entropy[12:].any() and found.factors is not None and (found.factors[12:] == 1).all()
    live = np.flatnonzero(automaton.classes >= 0)
    np.testing.assert_array_equal(found.argmax[12:], live[logs[12:, live].argmax(1)])
    np.testing.assert_array_equal(found.token[12:], found.argmax[12:])


def test_feedback_is_a_mixture() -> None:
    rng, automaton = larger(7)
    logs = random_logs(rng, 20, 3, 60)
    held = np.full(20, -1)
    way = [
        Constraint(automaton=automaton, feedback=f).begin(budget=20, canvas_length=20, held=held) for f in (0, 0.3, 1)
    ]
    none, part, full = (chosen(one, masses_of(logs, automaton), np.zeros(20), held).factors for one in way)
    assert none is None and part is not None and full is not None
    np.testing.assert_allclose(part, 0.7 + 0.3 * full, rtol=1e-6)
    np.testing.assert_allclose((np.exp(logs) * full[:, automaton.classes]).sum(1), 1, atol=1e-5)
    assert (full[:, -1] == 0).all()
    with pytest.raises(DgemmaError, match=r"feedback is 1\.5"):
        Constraint(automaton=automaton, feedback=1.5)


def word(text: str, ends: bool = True) -> TokenAutomaton:
    """Return the automaton of one string over tokens 0 … 9, with 10 to end it and 11 for padding."""
    table = np.full((len(text) + 2, 12), -1)
    for i, letter in enumerate(text):
        table[i, int(letter)] = i + 1
    table[-2, 10] = len(text) + 1
    table[-1, [10, 11]] = len(text) + 1
    return automaton_of(table, np.arange(len(text) + 2) >= len(text))


@pytest.mark.parametrize(
    ("budget", "held", "said"),
    [
        (4, {}, "needs at least 5 tokens, but max_new_tokens is 4"),
        (7, {2: 7}, "token 7, held at position 2 of the answer, is in no answer"),
        (7, {2: 11}, "hold token 11 at position 2: hold another"),
        (9, {6: 10, 7: 3}, "hold token 3 at position 7, given the 1 held elsewhere"),
        (4, {0: 3}, "needs at least 5 tokens with the token held, but max_new_tokens is 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(budget: int, held: dict[int, int], said: str) -> None:
    tokens = np.full(budget, -1)
    tokens[list(held)] = list(held.values())
    with pytest.raises(DgemmaError) as refused:
        Constraint(automaton=word("31415")).begin(budget=budget, canvas_length=4, held=tokens)
    assert said in str(refused.value)


def test_a_long_budget_is_looked_through_quickly() -> None:
    """A million tokens of budget, held here and there: only what changes is stepped through, and one set is kept."""
    _, automaton = larger(9)
    constraint = Constraint(automaton=automaton)
    held = np.full(1_000_000, -1)
    ends = int(np.flatnonzero(automaton.classes == automaton.classes[58])[0])
    held[[900_000, 999_999]] = ends
    way = constraint.begin(budget=1_000_000, canvas_length=256, held=held)
    assert len({id(one) for one in way._ends.values()}) < 300
    assert len(way._ends) == 1_000_000 // 256 + 2


def test_a_canvas_that_does_not_fit_is_not_committed() -> None:
    way = Constraint(automaton=word("31415")).begin(budget=8, canvas_length=8, held=np.zeros(0, int))
    with pytest.raises(DgemmaError, match="does not allow token 2 at position 1"):
        way.commit(np.array([3, 2, 4, 1, 5, 10, 11, 11]))


def test_a_held_canvas_is_gone_through_without_a_pass() -> None:
    held = np.array([3, 1, 4, 1, -1, -1, -1, -1])
    way = Constraint(automaton=word("31415")).begin(budget=8, canvas_length=4, held=held)
    way.commit(held[:4])
    rng = np.random.default_rng(0)
    found = chosen(way, masses_of(random_logs(rng, 4, 1, 12), word("31415")), rng.random(4), np.full(4, -1))
    assert found.argmax[:2].tolist() == [5, 10]


def test_what_a_pass_holds_beyond_what_was_asked_counts() -> None:
    """A thinking channel that is closed as the answer grows is held in a pass, and not known before."""
    rng, automaton = larger(11)
    way = Constraint(automaton=automaton).begin(budget=16, canvas_length=16, held=np.zeros(0, int))
    masses = masses_of(random_logs(rng, 16, 1, 60), automaton)
    free = chosen(way, masses, np.zeros(16), np.full(16, -1))
    held = np.full(16, -1)
    held[3] = next(t for t in range(58) if automaton.step(_after(automaton, free.argmax[:3]), t) >= 0)
    found = chosen(way, masses, np.zeros(16), held)
    assert found.argmax[3] == found.token[3] == held[3] and found.entropy[3] == 0
    way.commit(found.argmax)
    dead = Constraint(automaton=word("31415")).begin(budget=8, canvas_length=8, held=np.zeros(0, int))
    with pytest.raises(DgemmaError, match="no answer with what is held"):
        masses = masses_of(random_logs(rng, 8, 1, 12), word("31415"))
        chosen(dead, masses, np.zeros(8), np.array([3, 7, -1, -1, -1, -1, -1, -1]))


def test_an_automaton_that_never_ends_is_refused() -> None:
    """A user's own may have states that lead nowhere."""
    automaton = word("31415")
    endless = replace(automaton, accepting=np.zeros(automaton.states, bool))
    for held in ([], [3, 1]):
        with pytest.raises(DgemmaError, match="no answer that"):
            Constraint(automaton=endless).begin(budget=20, canvas_length=8, held=np.array(held, int))


def _after(automaton: TokenAutomaton, tokens: np.ndarray) -> int:
    state = automaton.start
    for token in tokens:
        state = automaton.step(state, int(token))
    return state


def test_a_pass_of_no_numbers_is_said_to_be_one() -> None:
    rng, automaton = larger(12)
    way = Constraint(automaton=automaton).begin(budget=8, canvas_length=8, held=np.zeros(0, int))
    masses = masses_of(random_logs(rng, 8, 1, 60), automaton)
    masses.mass[3, 1] = np.nan
    assert np.isnan(chosen(way, masses, np.zeros(8), np.full(8, -1)).entropy).all()


def test_what_is_left_of_a_uniform_is_uniform() -> None:
    """Over all uniforms of one position: each class has its share of them, and their rests fill [0, 1) evenly."""
    rng, automaton = larger(13, states=5)
    way = Constraint(automaton=automaton, feedback=1.0).begin(budget=6, canvas_length=6, held=np.zeros(0, int))
    logs = random_logs(rng, 6, 1, 60)
    masses, count = masses_of(logs, automaton), 2000
    found = [
        chosen(way, masses, np.append((k + 0.5) / count, np.zeros(5)), np.full(6, -1)) for k in range(count)
    ]  # fmt: skip
    labels, rest = np.array([one.label[0] for one in found]), np.array([one.rest[0] for one in found])
    assert (np.diff(labels) >= 0).all()
    assert found[0].factors is not None
    shares = np.exp(masses.mass[0]) * found[0].factors[0, :-1]
    for label, share in enumerate(shares):
        mine = rest[labels == label]
        assert len(mine) == pytest.approx(count * share, abs=1.01)
        np.testing.assert_allclose(mine, (np.arange(len(mine)) + 0.5) / max(len(mine), 1), atol=2 / max(len(mine), 1))


def test_whatever_the_sampler_accepts_may_be_accepted() -> None:
    """Where the sum of entropies is the bound itself, and a last bit decides."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        entropy = (rng.random(64) ** 4).astype(np.float32)
        bound = np.cumsum(np.sort(entropy), dtype=rng.choice([np.float32, np.float64]))[rng.integers(0, 64)]
        accepted = sampler.accept(NumpyOps("float32"), entropy[None], np.array([[bound]], np.float32))[0]
        perhaps = _perhaps_accepted(entropy, float(bound))
        assert perhaps[accepted].all()
        assert np.sort(entropy[perhaps])[:-1].sum() <= 1.001 * bound + 1e-3


def test_a_held_canvas_comes_behind_one_of_passes() -> None:
    automaton = word("31415926")
    held = np.array([-1, -1, -1, -1, 5, 9, 2, 6, -1, -1, -1, -1])
    way = Constraint(automaton=automaton).begin(budget=12, canvas_length=4, held=held)
    rng = np.random.default_rng(0)
    masses = masses_of(random_logs(rng, 4, 1, 12), automaton)
    first = chosen(way, masses, rng.random(4), held[:4])
    assert first.argmax.tolist() == [3, 1, 4, 1]
    way.commit(first.argmax)
    way.commit(held[4:8])
    assert chosen(way, masses, rng.random(4), held[8:]).argmax[0] == 10


@pytest.mark.parametrize("seed", range(40))
def test_borders_are_those_of_stepping_through_all_positions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng, states=int(rng.integers(2, 9)), ends=bool(seed % 2))
    lattice, budget = lattice_of(automaton), 40
    held = np.where(rng.random(budget) < 0.3, rng.integers(0, max(automaton.count, 1), budget), -1)
    found = borders(lattice, held, budget, every=3)
    now = automaton.accepting
    for at in range(budget, -1, -1):
        if at % 3 == 0 or at == budget:
            np.testing.assert_array_equal(found.pop(at)[lattice.renumbered], now)
        if at:
            taken = now[automaton.targets] & ((held[at - 1] < 0) | (automaton.labels == held[at - 1]))
            now = np.bincount(automaton.sources[taken], minlength=automaton.states) > 0
    assert not found
