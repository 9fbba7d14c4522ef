"""The entropy-bound sampler: acceptance, renoising and adaptive stopping, as pure functions of arrays.

    canvas ──denoise──▶ sampled token, argmax, entropy
       ▲                        │ accept the surest positions, within the entropy bound
       │                        ▼
       └──── accepted tokens, and fresh random ones everywhere else

Nothing stays frozen: an accepted position is predicted again on the next pass. What is committed is the argmax canvas,
not the sample. Source: transformers 5.23 `EntropyBoundSampler`, after Ben-Hamu et al. 2025 (arXiv:2505.24857).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import COLDEST, SamplerConfig
from .errors import DgemmaError
from .reader import show

if TYPE_CHECKING:
    from .ops import Array, Ops


class Thresholds(NamedTuple):
    """What a pass reads of a `SamplerConfig`, as arrays: one compiled pass serves every setting."""

    entropy_bound: Array  # wide [1, 1], nats
    confidence: Array  # wide [1], nats
    stability: Array  # int32 [1]


Sampling = SamplerConfig | Thresholds


class StepState(NamedTuple):
    """What one pass hands to the next, and to whoever watches."""

    canvas: Array  # int32 [B, L] what the next pass reads
    soft: Array  # [B, L, D] mean embedding under this pass's distribution, unscaled
    argmax: Array  # int32 [B, L] what would be committed now
    stable: Array  # int32 [B] passes in a row that left the argmax canvas as it was
    accepted: Array  # bool [B, L]
    entropy: Array  # wide [B, L], nats
    stop: Array  # bool [B]


def start(ops: Ops, noise: Array, hidden_size: int) -> StepState:
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


def accept(ops: Ops, entropy: Array, bound: float | Array) -> Array:
    """Accept positions in order of rising entropy while the sum of those before stays within the bound.

    entropy wide [B, L] → bool [B, L]. No sort is needed: each position sums the entropies that sort before its own,
    ties by position. The surest position is always accepted.
    """
    batch, length = entropy.shape
    mine = ops.reshape(entropy, (batch, length, 1))
    other = ops.reshape(entropy, (batch, 1, length))
    place = ops.arange(length)
    earlier = ops.reshape(place, (1, 1, length)) < ops.reshape(place, (1, length, 1))
    before = (other < mine) | ((other == mine) & earlier)
    return ops.reduce(ops.where(before, other, 0.0), "sum", -1) <= bound


def advance(
    ops: Ops, sampler: Sampling, state: StepState, token: Array, argmax: Array, entropy: Array, soft: Array,
    noise: Array,
) -> StepState:  # fmt: skip
    """Turn one pass's predictions into the next state; shapes as in `StepState`, noise int32 [B, L]."""
    accepted = accept(ops, entropy, sampler.entropy_bound)
    same = ops.reduce(ops.cast(argmax == state.argmax, "int32"), "min", -1)  # int32 [B], 1 where nothing changed
    stable = (state.stable + 1) * same
    confident = ops.reduce(entropy, "mean", -1) < sampler.confidence
    return StepState(
        canvas=ops.where(accepted, token, noise),
        soft=soft,
        argmax=argmax,
        stable=stable,
        accepted=accepted,
        entropy=entropy,
        stop=confident & (stable >= sampler.stability),
    )


def settle(ops: Ops, state: StepState, noise: Array) -> StepState:
    """Put the most probable token wherever a pass accepted a position, in place of the one it drew.

    Outside the pass, and so the same on every backend: the draw, alone of all it computes, is what greedy leaves out.
    """
    return state._replace(canvas=ops.where(state.accepted, state.argmax, noise))


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
