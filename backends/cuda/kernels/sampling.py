"""Acceptance, renoising and the stop test of one denoising pass, in one launch, with every flag a tensor.

The same functions as core/sampler.py. A canvas is one program's work:

    excl_i = Σ_j H_j · [(H_j, j) < (H_i, i)]   without a sort: L² comparisons, 65,536 for a canvas of 256
    accepted_i = excl_i ≤ bound                 canvas_i = token_i if accepted_i else noise_i
    stable' = (stable + 1) · [argmax as in the pass before]        stop = mean H < confidence and stable' ≥ stability

Reads 5 · 4 and writes 5 bytes for each position, 6.4 KB in all: the launch is the cost, a few microseconds. Sums are
float32. Tolerance: the flags equal the oracle's, but where excl_i or the mean lies within rounding of its bound.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....core.sampler import Sampling, StepState

Tensor = torch.Tensor

OTHERS = 32
"""Positions compared with at a time."""

WARPS = 8


@triton.jit
def _advance(
    entropy, token, argmax, noise, last_argmax, stable, canvas, accepted, stable_out, stop, length, bound, confidence,
    stability, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < length
    at = row * length + place
    mine = tl.load(entropy + at, mask=inside, other=0.0)
    before = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, OTHERS):
        others = start + tl.arange(0, OTHERS)
        other = tl.load(entropy + row * length + others, mask=others < length, other=float("inf"))
        earlier = (other[None, :] == mine[:, None]) & (others[None, :] < place[:, None])
        counts = ((other[None, :] < mine[:, None]) | earlier) & (others < length)[None, :]
        before += tl.sum(tl.where(counts, other[None, :], 0.0), 1)
    taken = before <= bound
    tl.store(accepted + at, taken, mask=inside)
    drawn = tl.load(token + at, mask=inside, other=0)
    tl.store(canvas + at, tl.where(taken, drawn, tl.load(noise + at, mask=inside, other=0)), mask=inside)
    now = tl.load(argmax + at, mask=inside, other=0)
    changed = tl.sum((now != tl.load(last_argmax + at, mask=inside, other=0)).to(tl.int32), 0)
    count = tl.where(changed == 0, tl.load(stable + row) + 1, 0)
    tl.store(stable_out + row, count)
    tl.store(stop + row, (tl.sum(mine, 0) / length < confidence) & (count >= stability))


def advance(
    sampler: Sampling, state: StepState, token: Tensor, argmax: Tensor, entropy: Tensor, soft: Tensor,
    noise: Tensor,
) -> StepState:  # fmt: skip
    """`core.sampler.advance`: token, argmax and noise int32 [B, L], entropy float32 [B, L], soft [B, L, D]."""
    batch, length = token.shape
    canvas, accepted = torch.empty_like(noise), torch.empty_like(state.accepted)
    stable, stop = torch.empty_like(state.stable), torch.empty_like(state.stop)
    _advance[(batch,)](
        entropy.contiguous(), token.contiguous(), argmax.contiguous(), noise.contiguous(), state.argmax.contiguous(),
        state.stable, canvas, accepted, stable, stop, length, float(sampler.entropy_bound), float(sampler.confidence),
        sampler.stability, BLOCK=triton.next_power_of_2(length), OTHERS=OTHERS, num_warps=WARPS,
    )  # fmt: skip
    return StepState(
        canvas=canvas, soft=soft, argmax=argmax, stable=stable, accepted=accepted, entropy=entropy, stop=stop
    )
