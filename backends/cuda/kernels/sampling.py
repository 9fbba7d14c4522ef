"""Acceptance, renoising and the stop test of one denoising pass, in one launch, with every flag a tensor.

The same functions as core/sampler.py. A row's canvas is one program's work, with settings of its own:

    excl_i = Σ_j H_j · [(H_j, j) < (H_i, i)]   without a sort: L² comparisons, 65,536 for a canvas of 256
    accepted_i = excl_i ≤ bound                 canvas_i = token_i if accepted_i else noise_i   (greedy: argmax_i)
    stable' = (stable + 1) · [argmax as in the pass before]        stop = mean H < confidence and stable' ≥ stability

A held position is its token, in the canvas and the argmax, with H = 0; the mean is over the others. Which are held is
data, −1 where none is, so one captured pass serves rows with and without.

Reads 6 · 4 and writes 13 bytes for each position, 9.5 KB in all: the launch is the cost, a few microseconds. Sums are
float32. Tolerance: the flags equal the oracle's, but where excl_i or the mean lies within rounding of its bound.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....core.parts import Draws, StepState

Tensor = torch.Tensor

OTHERS = 32
"""Positions compared with at a time."""

WARPS = 8


@triton.jit
def _advance(
    entropy, token, argmax, noise, kept, last_argmax, stable,
    canvas, argmax_out, entropy_out, accepted, stable_out, stop,
    bound, confidence, stability, greedy, length, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < length
    at = row * length + place
    held = tl.load(kept + at, mask=inside, other=0)
    free = held < 0
    mine = tl.where(free, tl.load(entropy + at, mask=inside, other=0.0), 0.0)
    tl.store(entropy_out + at, mine, mask=inside)
    before = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, OTHERS):
        others = start + tl.arange(0, OTHERS)
        other = tl.load(entropy + row * length + others, mask=others < length, other=float("inf"))
        other = tl.where(tl.load(kept + row * length + others, mask=others < length, other=-1) < 0, other, 0.0)
        earlier = (other[None, :] == mine[:, None]) & (others[None, :] < place[:, None])
        counts = ((other[None, :] < mine[:, None]) | earlier) & (others < length)[None, :]
        before += tl.sum(tl.where(counts, other[None, :], 0.0), 1)
    taken = before <= tl.load(bound + row)
    tl.store(accepted + at, taken, mask=inside)
    now = tl.where(free, tl.load(argmax + at, mask=inside, other=0), held)
    tl.store(argmax_out + at, now, mask=inside)
    drawn = tl.where(tl.load(greedy + row), now, tl.load(token + at, mask=inside, other=0))
    following = tl.where(taken, drawn, tl.load(noise + at, mask=inside, other=0))
    tl.store(canvas + at, tl.where(free, following, held), mask=inside)
    changed = tl.sum((now != tl.load(last_argmax + at, mask=inside, other=0)).to(tl.int32), 0)
    count = tl.where(changed == 0, tl.load(stable + row) + 1, 0)
    tl.store(stable_out + row, count)
    # The same quotient as ever where nothing is held.
    mean = tl.sum(mine, 0) / tl.maximum(tl.sum(free.to(tl.int32), 0), 1)
    tl.store(stop + row, (mean < tl.load(confidence + row)) & (count >= tl.load(stability + row)))


def advance(
    draws: Draws, state: StepState, token: Tensor, argmax: Tensor, entropy: Tensor, soft: Tensor
) -> StepState:  # fmt: skip
    """`core.sampler.advance`: token and argmax int32 [B, L], entropy float32 [B, L], soft [B, L, D], draws a row each.

    Of the state before, `argmax` [B, L] and `stable` [B] are read.
    """
    batch, length = token.shape
    canvas, argmax_out = torch.empty_like(token), torch.empty_like(token)  # [B, L]
    entropy_out = torch.empty_like(entropy)  # [B, L]
    accepted = torch.empty(batch, length, dtype=torch.bool, device=token.device)  # [B, L]
    stable = torch.empty_like(state.stable)  # [B]
    stop = torch.empty(batch, dtype=torch.bool, device=token.device)
    dense = (x.contiguous() for x in (entropy, token, argmax, draws.noise, draws.held, state.argmax, state.stable))
    settings = (draws.entropy_bound, draws.confidence, draws.stability, draws.greedy)
    _advance[(batch,)](
        *dense, canvas, argmax_out, entropy_out, accepted, stable, stop, *(x.contiguous() for x in settings), length,
        BLOCK=triton.next_power_of_2(length), OTHERS=OTHERS, num_warps=WARPS,
    )  # fmt: skip
    return StepState(
        canvas=canvas, soft=soft, argmax=argmax_out, stable=stable, accepted=accepted, entropy=entropy_out, stop=stop
    )
