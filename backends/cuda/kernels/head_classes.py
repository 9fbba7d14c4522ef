"""What the vocabulary head makes of classes of tokens: sums, moments and likeliest tokens of scores that it kept.

    scores [V, R], classes [V] → mass, best, score, moment [R, C]

Two launches behind `head.py`'s `_score` and `_settle`. Tokens are put in order of their class first, by a stable sort,
so that a class is a run of that order, and within it ids rise:

    _slice    up to 256 tokens of one class and 32 rows: maximum, first token that has it, sum and moment, relative to
              that maximum, in float32
    _join     a class and 32 rows: its slices, one after the other in an order that never changes, and the logs

Scores stand token by token, so whatever the order, the scores of a token are read as whole lines. Nothing is added up
by atomics and nothing passes through an exponential that a score could be too small for: a score is the difference
that it is in the logits, less the log of the total.

256 rows, V = 262,144, C = 150: scores are 268 MB, written once and read once, 0.16 ms at 3.35 TB/s; what slices leave
is at most 16 · R · (V / 256 + C) bytes, 4.8 MB. The sort of 262,144 small integers is some 0.05 ms.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....core.parts import NOTHING, Masses

Tensor = torch.Tensor

_NOTHING = tl.constexpr(NOTHING)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)

SLICE = 256
"""Tokens of one class that a program takes."""

TOKENS, ROWS, PARTS, WARPS = 64, 32, 32, 4
"""Tokens at a time, rows of a program, slices at a time."""


class Runs(NamedTuple):
    """Tokens by class."""

    order: Tensor  # int32 [V]: tokens, those of class −1 first, then those of 0, …
    edges: Tensor  # int32 [C + 1]: class c is order[edges[c] : edges[c + 1]]


def runs_of(classes: Tensor, count: int) -> Runs:
    """Sort tokens by class: classes int32 [V]. Reads nothing back, so that a graph can hold it."""
    ordered, order = torch.sort(classes, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(count + 1, dtype=classes.dtype, device=classes.device))
    return Runs(order.int(), edges.int())


@triton.jit
def _run(edges, label, count, SLICE: tl.constexpr, CLASSES: tl.constexpr):
    """Return where runs begin and end, how many slices each has, and how many there are with it and those before."""
    begins = tl.load(edges + label, mask=label < count, other=0)
    ends = tl.load(edges + label + 1, mask=label < count, other=0)
    slices = (ends - begins + SLICE - 1) // SLICE
    return begins, ends, slices, tl.cumsum(slices, 0)


@triton.jit
def _slice(
    scores, order, edges, partial, places, rows, count, slices,
    SLICE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    label = tl.arange(0, CLASSES)
    begins, ends, held, upto = _run(edges, label, count, SLICE, CLASSES)
    owner = tl.sum(((upto <= own) & (label < count)).to(tl.int32), 0)  # `count` where there are fewer slices
    mine = label == owner
    first = tl.sum(tl.where(mine, begins + (own - (upto - held)) * SLICE, 0), 0)
    stop = tl.minimum(first + SLICE, tl.sum(tl.where(mine, ends, 0), 0))
    peak = tl.full([ROWS], _NOTHING, tl.float32)
    total, moment = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    place = tl.full([ROWS], FAR, tl.int32)
    for at in range(first, stop, TOKENS):
        index = at + tl.arange(0, TOKENS)
        inside = index < stop
        token = tl.load(order + index, mask=inside, other=0)
        part = tl.load(
            scores + token[:, None] * rows + row[None, :], mask=inside[:, None] & live[None, :], other=_NOTHING
        )
        high = tl.max(part, 0)
        here = tl.min(tl.where((part == high[None, :]) & inside[:, None], index[:, None], FAR), 0)
        place = tl.where(high > peak, here, place)  # the first of equals
        top = tl.maximum(peak, high)
        shifted = part - top[None, :]
        odds = tl.exp2(shifted)
        fade = tl.exp2(peak - top)
        moment = (moment + total * (peak - top)) * fade + tl.sum(odds * shifted, 0)
        total = total * fade + tl.sum(odds, 0)
        peak = top
    kept = live & (owner < count)
    at = own * rows + row
    tl.store(partial + at, peak, mask=kept)
    tl.store(partial + slices * rows + at, total, mask=kept)
    tl.store(partial + 2 * slices * rows + at, moment, mask=kept)
    # Of a row of NaN, a token of the class none the less.
    likeliest = tl.load(order + tl.minimum(place, stop - 1), mask=kept, other=0)
    tl.store(places + at, likeliest, mask=kept)


@triton.jit
def _join(
    partial, places, edges, norms, mass, best, score, moment_out, rows, first_row, count, slices,
    SLICE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    label = tl.arange(0, CLASSES)
    _, _, held, upto = _run(edges, label, count, SLICE, CLASSES)
    stop = tl.sum(tl.where(label == own, upto, 0), 0)
    first = stop - tl.sum(tl.where(label == own, held, 0), 0)
    peak = tl.full([ROWS], _NOTHING, tl.float32)
    total, moment = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    place = tl.full([ROWS], FAR, tl.int32)
    for at in range(first, stop, PARTS):
        index = at + tl.arange(0, PARTS)
        inside = (index < stop)[:, None] & live[None, :]
        where = index[:, None] * rows + row[None, :]
        peaks = tl.load(partial + where, mask=inside, other=_NOTHING)
        sums = tl.load(partial + slices * rows + where, mask=inside, other=0.0)
        moments = tl.load(partial + 2 * slices * rows + where, mask=inside, other=0.0)
        high = tl.max(peaks, 0)
        here = tl.min(tl.where((peaks == high[None, :]) & inside, index[:, None], FAR), 0)
        place = tl.where(high > peak, here, place)
        top = tl.maximum(peak, high)
        shifted = peaks - top[None, :]
        odds = tl.exp2(shifted)
        fade = tl.exp2(peak - top)
        moment = (moment + total * (peak - top)) * fade + tl.sum((moments + sums * shifted) * odds, 0)
        total = total * fade + tl.sum(sums * odds, 0)
        peak = top
    any_ = first < stop
    likeliest = tl.load(places + tl.minimum(place, stop - 1) * rows + row, mask=live & any_, other=0)
    # The likeliest token's own: 0 − log of the total, where it is the likeliest of all.
    log2 = (peak - tl.load(norms + row, mask=live, other=0.0)) - tl.load(norms + rows + row, mask=live, other=0.0)
    whole = tl.maximum(log2 + tl.log2(total), log2)
    sum_of_logs = tl.exp2(log2) * (moment + total * log2)
    at = (first_row + row) * count + own
    tl.store(mass + at, tl.where(any_, whole * LN2, _NOTHING), mask=live)
    tl.store(best + at, likeliest, mask=live)
    tl.store(score + at, tl.where(any_, log2 * LN2, _NOTHING), mask=live)
    tl.store(moment_out + at, tl.where(any_, sum_of_logs * LN2, 0.0), mask=live)


def reduce_classes(scores: Tensor, norms: Tensor, runs: Runs, rows: int, start: int, out: Masses) -> None:
    """Write what some rows of a call make of classes.

    Args:
        scores: float32, by token and row, [V, rows] as it begins: logits over temperature, times log2 e.
        norms: float32, [2, rows] as it begins: their maximum, and log2 of the sum of 2^(score − maximum).
        runs: tokens by class.
        rows, start: how many rows, and where they stand in `out`.
        out: [R, C] each, written.
    """
    count = out.mass.shape[-1]
    slices = triton.cdiv(runs.order.shape[0], SLICE) + count
    partial = torch.empty(3, slices, rows, dtype=torch.float32, device=scores.device)
    places = torch.empty(slices, rows, dtype=torch.int32, device=scores.device)
    classes, across = triton.next_power_of_2(count), triton.cdiv(rows, ROWS)
    _slice[(slices, across)](
        scores, runs.order, runs.edges, partial, places, rows, count, slices,
        SLICE=SLICE, TOKENS=TOKENS, ROWS=ROWS, CLASSES=classes, num_warps=WARPS,
    )  # fmt: skip
    _join[(count, across)](
        partial, places, runs.edges, norms, *out, rows, start, count, slices,
        SLICE=SLICE, PARTS=PARTS, ROWS=ROWS, CLASSES=classes, num_warps=WARPS,
    )  # fmt: skip
