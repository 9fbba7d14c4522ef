"""How far two models agree: the arithmetic under `compare`, in NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROWS = 1 << 22
"""Logits worked on at a time, in float64."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two models' logits on the same inputs. Distributions are at the temperature of their pass, as the sampler has
    them; entropies and divergence are means over positions, in nats."""

    canvases: int
    passes: int
    positions: int
    nmse: float
    """‖B − A‖² / ‖A‖² over all logits."""
    max_error: float
    """The largest difference of two logits."""
    top1: float
    """Share of positions where both have the same likeliest token."""
    kl: float
    """KL(A ‖ B): what A's tokens cost under B's distribution beyond what they cost under A's own."""
    entropy_a: float
    entropy_b: float

    @property
    def entropy_shift(self) -> float:
        """Mean of H_B − H_A; positive where B is less sure."""
        return self.entropy_b - self.entropy_a


class Agreeing:
    """Sums an `Agreement` up, pass by pass."""

    def __init__(self) -> None:
        self.canvases = self.passes = self._positions = self._same = 0
        self._error = self._signal = self._largest = self._kl = self._entropy_a = self._entropy_b = 0.0

    def add(self, a: np.ndarray, b: np.ndarray, temperature: float) -> None:
        """Take one pass: logits a and b, float32 [L, V]."""
        step = max(1, ROWS // a.shape[1])
        self.passes += 1
        self._positions += len(a)
        # A broken model's NaN and infinity are to be seen in the result, not to end it.
        with np.errstate(invalid="ignore", over="ignore"):
            for at in range(0, len(a), step):
                one, other = (x[at : at + step].astype(np.float64) for x in (a, b))
                error = other - one
                self._error += float((error * error).sum())
                self._signal += float((one * one).sum())
                self._largest = float(np.maximum(self._largest, np.abs(error).max()))  # keeps NaN, as max() would not
                self._same += int((one.argmax(1) == other.argmax(1)).sum())
                log_p, log_q = (_log_softmax(x / temperature) for x in (one, other))
                p, q = np.exp(log_p), np.exp(log_q)
                self._kl += float((p * (log_p - log_q)).sum())
                self._entropy_a -= float((p * log_p).sum())
                self._entropy_b -= float((q * log_q).sum())

    def result(self) -> Agreement:
        count = max(1, self._positions)
        return Agreement(
            canvases=self.canvases,
            passes=self.passes,
            positions=self._positions,
            nmse=self._error / self._signal if self._signal else 0.0 if not self._error else math.inf,
            max_error=self._largest,
            top1=self._same / count,
            kl=self._kl / count,
            entropy_a=self._entropy_a / count,
            entropy_b=self._entropy_b / count,
        )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one model wrote to one prompt."""

    tokens: tuple[int, ...]
    steps: int
    canvases: int
    solved: bool | None
    """Whether it is the expected answer; None where none is known."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """B less A, and half of the 95 % interval, from the differences prompt by prompt; None where those do not vary."""

    value: float
    within: float | None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What two models wrote freely to the same prompts with the same seeds."""

    group: str
    """Which prompts; empty for all of them."""
    prompts: int
    same: int
    """Prompts to which both wrote the same tokens."""
    steps_a: float
    """Denoising passes for a canvas."""
    steps_b: float
    steps_change: Change
    answers: int
    """Prompts with a known answer."""
    solved_a: int
    solved_b: int
    only_a: int
    """Answers that A alone has right."""
    only_b: int

    @property
    def rate_change(self) -> Change | None:
        """Change of the share solved, its interval after Agresti and Min 2005; None without known answers."""
        if not self.answers:
            return None
        # Half a pair more in each cell: no interval is 0 because nothing differed in the few prompts there were.
        n, lost, won = self.answers + 2, self.only_a + 0.5, self.only_b + 0.5
        within = 1.96 * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
        return Change(value=(self.only_b - self.only_a) / self.answers, within=within if self.answers > 1 else None)


def tally(group: str, a: Sequence[Outcome], b: Sequence[Outcome]) -> Tally:
    """Count two models' outcomes on the same prompts."""
    pairs = list(zip(a, b, strict=True))
    known = [(one.solved, other.solved) for one, other in pairs if one.solved is not None]
    steps_a, rest_a = _steps(a)
    steps_b, rest_b = _steps(b)
    spread = float(np.std(rest_b - rest_a, ddof=1)) if len(pairs) > 1 else 0.0
    return Tally(
        group=group,
        prompts=len(pairs),
        same=sum(one.tokens == other.tokens for one, other in pairs),
        steps_a=steps_a,
        steps_b=steps_b,
        steps_change=Change(value=steps_b - steps_a, within=1.96 * spread / math.sqrt(len(pairs)) if spread else None),
        answers=len(known),
        solved_a=sum(one is True for one, _ in known),
        solved_b=sum(other is True for _, other in known),
        only_a=sum(one is True and not other for one, other in known),
        only_b=sum(other is True and not one for one, other in known),
    )


def _steps(outcomes: Sequence[Outcome]) -> tuple[float, np.ndarray]:
    """Steps per canvas, a ratio of two sums, and what each prompt adds to its deviation (the delta method)."""
    steps = np.array([one.steps for one in outcomes], np.float64)
    canvases = np.array([one.canvases for one in outcomes], np.float64)
    ratio = float(steps.sum() / canvases.sum())
    return ratio, (steps - ratio * canvases) / canvases.mean()
