"""The entropy-bound sampler: acceptance, renoising and adaptive stopping, as pure functions of arrays.

    canvas ──denoise──▶ sampled token, argmax, entropy
       ▲                        │ accept the surest positions, within the entropy bound
       │                        ▼
       └──── accepted tokens, and fresh random ones everywhere else

Nothing but a held position stays frozen: an accepted one is predicted again on the next pass. What is committed is the
argmax canvas, not the sample. Every setting is a row's own number (`Draws`), so that one compiled pass serves them all.
Source: transformers 5.23 `EntropyBoundSampler`, after Ben-Hamu et al. 2025 (arXiv:2505.24857).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .config import COLDEST, SamplerConfig
from .errors import DgemmaError
from .parts import Array, Draws, StepState
from .primitives import Primitives
from .random import step_noise
from .reader import show


def start(ops: Primitives, noise: Array, hidden_size: int) -> StepState:
    """Return the state before the first pass: noise int32 [B, L] is the canvas."""
    batch, length = noise.shape
    soft = ops.reshape(noise, (batch, length, 1)) * ops.asarray([0] * hidden_size, "int32")
    return StepState(
        canvas=noise,
        soft=ops.cast(soft, ops.dtype),
        argmax=noise * 0 - 1,  # equals no canvas, so the first pass is never stable
        stable=ops.asarray([0] * batch, "int32"),
        accepted=noise < 0,
        entropy=ops.cast(noise * 0, ops.wide),
        stop=ops.asarray([False] * batch, "bool"),
    )


def accept(ops: Primitives, entropy: Array, bound: Array) -> Array:
    """Accept positions in order of rising entropy while the sum of those before stays within the bound.

    entropy wide [B, L], bound wide [B, 1] → bool [B, L]. No sort is needed: each position sums the entropies that sort
    before its own, ties by position. The surest position is always accepted.
    """
    batch, length = entropy.shape
    mine = ops.reshape(entropy, (batch, length, 1))
    other = ops.reshape(entropy, (batch, 1, length))
    place = ops.arange(length)
    earlier = ops.reshape(place, (1, 1, length)) < ops.reshape(place, (1, length, 1))
    before = (other < mine) | ((other == mine) & earlier)
    return ops.reduce(ops.where(before, other, 0.0), "sum", -1) <= bound


def held_in(
    ops: Primitives, held: Array, bound: Array, noise: Array, taken: Array, argmax: Array, entropy: Array
) -> tuple[Array, Array, Array, Array]:
    """Accept and renoise, with some positions held: int32 [B, L], −1 where free; bound wide [B, 1].

    A held position is its token, in what is committed and in what the next pass reads. It is sure of itself, so it
    takes nothing of the entropy bound.

    Returns:
        argmax and entropy [B, L] as they count, what is accepted, bool [B, L], and the next canvas, int32 [B, L]: the
        token that was `taken` where a free position is accepted, else noise.
    """
    free = held < 0
    entropy, argmax = ops.where(free, entropy, 0.0), ops.where(free, argmax, held)
    accepted = accept(ops, entropy, bound)
    return argmax, entropy, accepted, ops.where(free, ops.where(accepted, taken, noise), held)


def confident(ops: Primitives, held: Array, entropy: Array, confidence: Array) -> Array:
    """Test whether the mean entropy of the free positions is below `confidence`, wide [B] → bool [B].

    entropy wide [B, L], 0 where held; int32 [B, L] as `held_in` takes it.
    """
    count = ops.reduce(ops.cast(held < 0, ops.wide), "sum", -1)
    share = entropy.shape[1] / ops.where(count < 1, 1.0, count)  # exactly 1 where nothing is held: no bit changes
    return ops.reduce(entropy, "mean", -1) * share < confidence


def advance(
    ops: Primitives, draws: Draws, state: StepState, token: Array, argmax: Array, entropy: Array, soft: Array
) -> StepState:
    """Turn one pass's predictions into the next state; shapes as in `StepState` and `Draws`."""
    # The draw, alone of all that a pass computes, is what a greedy row leaves out.
    taken = ops.where(draws.greedy, argmax, token)
    bound = ops.cast(draws.entropy_bound, ops.wide)
    argmax, entropy, accepted, canvas = held_in(ops, draws.held, bound, draws.noise, taken, argmax, entropy)
    same = ops.reduce(ops.cast(argmax == state.argmax, "int32"), "min", -1)  # int32 [B], 1 where nothing changed
    stable = (state.stable + 1) * same
    return StepState(
        canvas=canvas,
        soft=soft,
        argmax=argmax,
        stable=stable,
        accepted=accepted,
        entropy=entropy,
        stop=confident(ops, draws.held, entropy, ops.cast(draws.confidence, ops.wide)) & (stable >= draws.stability),
    )


def first_canvas(seed: int, canvas: int, length: int, vocab_size: int) -> np.ndarray:
    """Return the noise, int32 [L], that denoising of a canvas starts from."""
    return step_noise(seed=seed, canvas=canvas, step=0, length=length, vocab_size=vocab_size)[1]


def draws_of(
    sampler: SamplerConfig, *, seed: int, canvas: int, step: int, length: int, vocab_size: int,
    held: np.ndarray | None = None, skipped: int = 0,
) -> Draws:  # fmt: skip
    """Return what pass `step` (0 is the first) of a row's canvas is given: NumPy arrays of one row.

    held int32 [L], −1 where free; the temperature is that of so many passes later as are `skipped`.
    """
    uniforms, noise = step_noise(seed=seed, canvas=canvas, step=step + 1, length=length, vocab_size=vocab_size)
    return Draws(
        temperature=np.full((1, 1), sampler.temperature(step + skipped), np.float32),
        uniforms=uniforms[None],
        noise=noise[None],
        entropy_bound=np.full((1, 1), sampler.entropy_bound),
        confidence=np.full(1, sampler.confidence),
        stability=np.full(1, sampler.stability, np.int32),
        greedy=np.full((1, 1), sampler.greedy),
        held=(np.full(length, -1, np.int32) if held is None else held)[None],
    )


def stacked(rows: list[Draws]) -> Draws:
    """Return rows' draws as one pass's."""
    return Draws(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def settings(base: SamplerConfig, *, temperature: float | None = None, **given: Any) -> SamplerConfig:
    """Return a checkpoint's settings with some of them changed; None leaves one as it is.

    `temperature` multiplies the schedule, `t_min` and `t_max`: 1 is as it stands, and 0 is greedy, on the schedule as
    it stands. One of `t_min` and `t_max` that is given alone takes the other with it where they would cross.

    Raises:
        DgemmaError: a value out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, other, crosses in (("t_max", "t_min", min), ("t_min", "t_max", max)):
        if _number(given.get(name)) and given[name] >= 0 and other not in given:
            given[other] = crosses(given[name], getattr(base, other))
    if temperature is None:
        return replace(base, **given)
    if not _number(temperature) or not 0 <= temperature <= 100:
        raise DgemmaError(f"temperature is {show(temperature)}, expected a number from 0 (greedy) to 100")
    if temperature == 0:
        return replace(base, **given | {"greedy": True})
    chosen = replace(base, **given)
    return replace(chosen, t_min=chosen.t_min * temperature, t_max=max(chosen.t_max * temperature, COLDEST))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
