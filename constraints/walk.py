"""A constraint on a row's answer, and the row's way through it, canvas by canvas.

    Constraint ──begin(budget, held)──▶ Walk ──choose(masses) per pass──▶ Chosen
                                          ▲                                 │ the canvas is final
                                          └────────────commit(argmax)───────┘

Each pass, every position's distribution is conditioned on the whole automaton: entropies of the posterior say which
positions are accepted and when the canvas is finished, one string is drawn jointly from left to right with the pass's
uniforms, and the most probable string is the argmax canvas. What is committed therefore always fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..core.canvas import Chosen, Classes
from ..core.errors import DgemmaError
from ..core.parts import Masses
from .automaton import TokenAutomaton
from .lattice import POSSIBLE, Paths, Row, all_paths, best_paths, follow
from .layout import Lattice, lattice_of
from .reach import before, borders, fewest

MARGIN = 1e-4
"""How far from the border of the likeliest token's interval a uniform must be for no backend to draw another."""

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraint:
    """An automaton that answers must follow; rows and threads share it."""

    automaton: TokenAutomaton
    feedback: float = 0.0
    """Which distribution feeds self-conditioning: 0 the model's own, 1 the posterior, a mixture between."""

    def __post_init__(self) -> None:
        if not 0 <= self.feedback <= 1:
            raise DgemmaError(f"feedback is {self.feedback}, expected a number from 0 to 1")

    @property
    def classes(self) -> Classes:
        return Classes(of=self.automaton.classes, count=self.automaton.count, key=self.automaton.key)

    @cached_property
    def lattice(self) -> Lattice:
        return lattice_of(self.automaton)

    @cached_property
    def sizes(self) -> np.ndarray:
        """How many tokens each class has, float64 [C], at least 1."""
        known = self.automaton.classes[self.automaton.classes >= 0]
        return np.maximum(np.bincount(known, minlength=self.automaton.count), 1).astype(np.float64)

    def begin(self, *, budget: int, canvas_length: int, held: np.ndarray) -> Walk:
        """Return a row's way through the constraint.

        held int [≤ budget]: tokens by position of the answer, −1 where free.

        Raises:
            DgemmaError: no string of the constraint keeps what is held and fits the budget.
        """
        held = np.asarray(held, np.int64)
        classes = self.classes_of(held)
        for i in np.flatnonzero(classes == self.automaton.count)[:1]:
            raise DgemmaError(
                f"token {held[i]}, held at position {i} of the answer, is in no answer that the constraint has"
            )
        ends = borders(self.lattice, classes, budget, canvas_length)
        if not ends[0][self.lattice.start]:
            raise DgemmaError(_why(self.lattice, held, classes, budget))
        return Walk(self, ends, classes, budget)

    def classes_of(self, held: np.ndarray) -> np.ndarray:
        """Return the class that each held token counts as, int [n]: −1 where free, C where it has none."""
        if self.automaton.held_class is not None:
            return np.where(held >= 0, self.automaton.held_class, -1)
        known = held < len(self.automaton.classes)
        found = np.where(known, self.automaton.classes[np.where(known, held, 0)], -1)
        return np.where(held < 0, -1, np.where(found < 0, self.automaton.count, found))


def _why(lattice: Lattice, held: np.ndarray, classes: np.ndarray, budget: int) -> str:
    """Return why nothing fits, in one line."""
    fixed = int(np.count_nonzero(held >= 0))
    kept = f" with the {fixed} tokens held" if fixed > 1 else " with the token held" if fixed else ""
    count, where = fewest(lattice, classes)
    if count is None and not fixed:
        return f"the constraint has no answer that ends within {budget} tokens"
    if count is None:
        before = f", given the {fixed - 1} held elsewhere" if fixed > 1 else ""
        return (
            f"no answer that the constraint has may hold token {held[where]} at position {where}{before}: hold another"
        )
    if count <= budget:
        return f"the constraint has no answer of {budget} tokens{kept}; it has one of {count}"
    return f"the constraint needs at least {count} tokens{kept}, but max_new_tokens is {budget}: raise it"


class Walk:
    """One row's way through a constraint. Not for two threads at once."""

    def __init__(self, constraint: Constraint, ends: dict[int, np.ndarray], classes: np.ndarray, budget: int) -> None:
        self.log_accept = 0.0
        self._constraint, self._ends, self._budget = constraint, ends, budget
        self._classes = classes
        self._state, self._position = constraint.lattice.start, 0
        self._fixed: np.ndarray | None = None
        self._behind: np.ndarray | None = None
        """Of this canvas: what its first pass made of the positions beyond the budget."""

    def choose(self, masses: Masses, *, uniforms: np.ndarray, held: np.ndarray, bound: float, greedy: bool) -> Chosen:
        """Condition one pass's distributions on the automaton.

        masses: of one row, [L, C]; uniforms float [L] in [0, 1); held int [L], tokens, −1 where free; bound: the
        entropy bound; greedy: the draw is the argmax. Positions beyond the budget are free.
        """
        lattice = self._constraint.lattice
        length = len(uniforms)
        if not np.isfinite(masses.mass).all():
            return _nothing(length)
        inside = min(length, self._budget - self._position)
        held = np.asarray(held)
        row = self._row(masses, held, inside)
        best_of = best_paths(lattice, row)
        if not best_of.gamma[0, row.start] > POSSIBLE:
            raise DgemmaError(f"the constraint has no answer with what is held behind position {self._position}")
        labels, states = follow(lattice, row, best_of)
        paths = all_paths(lattice, row, states)
        self.log_accept = paths.log_accept
        entropy = np.zeros(length, np.float32)
        entropy[:inside] = _entropies(row, paths, self._constraint.sizes)
        best, score = np.asarray(masses.best), np.asarray(masses.score)
        everywhere = score.argmax(1)  # of all classes: what stands beyond the budget
        everywhere[:inside] = labels
        argmax = self._tokens(best, everywhere, row.held, held)
        if self._behind is None:
            self._behind = argmax[inside:].copy()
        argmax[inside:] = self._behind  # nobody sees it: it must not keep the canvas from being finished
        label, rest = everywhere.astype(np.int32), np.zeros(length, np.float32)
        token = argmax
        if not greedy:
            perhaps = _perhaps_accepted(entropy, bound)[:inside]
            until = int(perhaps.nonzero()[0].max(initial=-1)) + 1  # what is behind becomes noise, whatever is drawn
            label[:until], rest[:until] = _draw(lattice, row, paths.beta, np.asarray(uniforms[:until], np.float64))
            token = self._tokens(best, label, row.held, held)
            unknown = _unknown(row, label[:inside], rest[:inside], self._constraint.sizes)
            token[:inside][unknown & perhaps] = -1
        return Chosen(token, label, rest, argmax, entropy, self._factors(paths, row, length))

    def commit(self, argmax: np.ndarray) -> None:
        """Go on behind a canvas: argmax int [L], its final tokens.

        Raises:
            DgemmaError: the constraint does not allow them.
        """
        lattice = self._constraint.lattice
        inside = min(len(argmax), self._budget - self._position)
        fixed = self._held_classes(inside) if self._fixed is None else self._fixed
        classes = np.where(fixed >= 0, fixed, self._constraint.automaton.classes[argmax[:inside]])
        state = self._state
        for i, label in enumerate(classes):
            state = lattice.step(state, int(label))
            if state < 0:
                raise DgemmaError(
                    f"the constraint does not allow token {argmax[i]} at position {self._position + i} of the answer"
                )
        self._state = state
        self._position += inside
        self._fixed = self._behind = None

    def _held_classes(self, inside: int) -> np.ndarray:
        """Return the classes held on this canvas, int [inside], −1 where free."""
        found = np.full(inside, -1, np.int64)
        given = self._classes[self._position : self._position + inside]
        found[: len(given)] = given
        return found

    def _row(self, masses: Masses, held: np.ndarray, inside: int) -> Row:
        columns = (np.asarray(column)[:inside] for column in (masses.mass, masses.score, masses.best, masses.moment))
        mass, score, best, moment = columns
        self._fixed = self._constraint.classes_of(held[:inside])
        return Row(
            mass=mass.astype(np.float32), score=score, best=best, moment=moment, held=self._fixed, start=self._state,
            final=self._final(self._position + inside),
        )  # fmt: skip

    def _final(self, position: int) -> np.ndarray:
        """Return in which states the answer may be at a position: those from which the rest of the budget is filled."""
        if position not in self._ends:
            border = min(end for end in self._ends if end > position)
            now = self._ends[border]
            for i in range(border - 1, position - 1, -1):
                now = before(self._constraint.lattice, now, int(self._classes[i]) if i < len(self._classes) else -1)
            self._ends[position] = now
        return self._ends[position]

    def _tokens(self, best: np.ndarray, labels: np.ndarray, fixed: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Return the likeliest token of each position's class, int32 [L], or what is held there."""
        found = np.take_along_axis(best, labels[:, None].astype(np.intp), axis=1)[:, 0].astype(np.int32)
        found[: len(fixed)] = np.where(fixed >= 0, held[: len(fixed)], found[: len(fixed)])
        return found

    def _factors(self, paths: Paths, row: Row, length: int) -> np.ndarray | None:
        """Return what self-conditioning multiplies probabilities by, float32 [L, C + 1]; the last are dead tokens."""
        mix = self._constraint.feedback
        if not mix:
            return None
        found = np.ones((length, self._constraint.automaton.count + 1), np.float32)
        weight = np.exp(np.minimum(paths.weight, 80))
        found[: len(weight), :-1] = (1 - mix) + mix * weight
        found[: len(weight), -1] = 1 - mix
        found[: len(weight)][row.held >= 0] = 1
        return found


def _nothing(length: int) -> Chosen:
    """Return a choice whose entropies say that the pass came to no numbers."""
    none = np.zeros(length, np.int32)
    numbers = np.full(length, np.nan, np.float32)
    return Chosen(token=none, label=none, rest=numbers, argmax=none, entropy=numbers)


def _entropies(row: Row, paths: Paths, sizes: np.ndarray) -> np.ndarray:
    """Return the entropy of each position's posterior over tokens, nats, float64 [L]; 0 where a token is held.

    With posterior Q of a class and h the entropy inside it, H = Σ Q·(h − log Q). h = m − Σ p·log p / Σ p, which is the
    same as the sum over weights, −Σ (w·g + Q·log w), but stays right where a mass is below what float32 can hold and
    its weight above; there, as where the sums underflow, a class counts as its likeliest token.
    """
    mass = row.mass.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        inside = mass - row.moment * np.exp(-mass)
    least = np.maximum(mass - row.score, 0)
    inside = np.clip(np.where(mass > -80, inside, least), least, np.log(sizes))
    share = np.exp(paths.posterior)
    live = paths.posterior > POSSIBLE
    found = np.where(live, share * (inside - np.where(live, paths.posterior, 0)), 0).sum(1)
    return np.maximum(found, 0)


def _draw(lattice: Lattice, row: Row, beta: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw as much of a string as there are uniforms, left to right.

    Returns its classes, int [U], and what is left of each uniform for the draw inside the class, in [0, 1).
    """
    length = len(uniforms)
    labels, rest = row.held[:length].copy(), np.zeros(length)
    state = row.start
    for i in range(length):
        edges = lattice.out[state]
        if row.held[i] >= 0:
            state = lattice.step(state, int(row.held[i]))
            continue
        if len(edges.labels) == 1:
            k, rest[i] = 0, uniforms[i]
        else:
            logs = beta[i + 1][edges.targets]
            logs += row.mass[i][edges.labels]
            logs -= logs.max()
            upto = np.exp(logs).cumsum(dtype=np.float64)
            wanted = uniforms[i] * upto[-1]
            k = min(int(upto.searchsorted(wanted, side="right")), int(upto.searchsorted(upto[-1])))
            start = upto[k - 1] if k else 0.0
            rest[i] = (wanted - start) / (upto[k] - start)
        labels[i], state = edges.labels[k], edges.targets[k]
    return labels, np.clip(rest, 0, BELOW_ONE)


def _unknown(row: Row, labels: np.ndarray, rest: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return where the draw inside the class may be another token than its likeliest, bool [L].

    That token has the share f of its class. Wherever the tokens before it in the vocabulary's order leave its interval,
    it covers [1 − f, f).
    """
    at = labels[:, None].astype(np.intp)
    mass, score = (np.take_along_axis(a, at, axis=1)[:, 0].astype(np.float64) for a in (row.mass, row.score))
    share = np.exp(score - mass)
    certain = (rest >= 1 - share + MARGIN) & (rest < share - MARGIN)
    alone = (sizes[labels] == 1) | (mass <= score) | (row.held >= 0)
    return ~(certain | alone)


def _perhaps_accepted(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Return where a position may be accepted, bool [L]: a little more than the bound, for sums rounded otherwise."""
    order = np.argsort(entropy, kind="stable")
    ordered = entropy[order].astype(np.float64)
    earlier = np.cumsum(ordered) - ordered
    found = np.empty(len(entropy), bool)
    found[order] = earlier <= bound * (1 + MARGIN) + MARGIN + 1e-6 * earlier
    return found if math.isfinite(bound) else np.ones(len(entropy), bool)
