"""Attention over the cache and the canvas, whose keys already stand in the cache's tail; no mask tensor.

    q [B, H, L, A], keys and values [N, K, S, A], held int32 [B], slots int32 [B] or none → [B, L, H·A]

A row reads the slot of the cache that is its own. What is visible follows from three numbers, the entries `held`, the
window and whether it is causal (`core.parts.Span`):

    denoise   keys max(0, held − window + 1) … held + L − 1, the same for every query
    encode    query i: keys max(0, held + i − window + 1) … held + i
    joined    the last queries, a canvas, as in denoise behind the others, which are as in encode

The query heads that share a key-value head are rows of one matrix, position by position (row r is position r // G, head
r % G), so that a block of rows spans few positions and a causal block skips what lies beyond them. A program takes one
block of rows and one of `splits` even parts of the keys it sees; a second launch merges the parts by their log-sums.
The grid depends on shapes alone and the loop's bounds are read from the device, so one CUDA graph serves every context
length that fits the buffers.

256 queries, 16 heads, bf16, for one layer. Floor: arithmetic at 790 TFLOP/s (what a large bf16 product reaches), bytes
at 3.35 TB/s.

    layer             keys     GFLOP   keys and values    floor     note
    sliding, K 8      1,279    5.4     10.5 MB            6.8 µs    the same at every context from 1,023 on
    full, K 2, 1k     1,280    10.7    5.2 MB             13.6 µs   computed as 16.1 GFLOP
    full, K 2, 32k    33,024   277     135 MB             351 µs    computed as 415 GFLOP; 5 layers have 1.75 ms

A program has registers for 128 rows of 256 columns. Of a head of 512 it therefore sums half, and computes scores for
it anew: half as much again of arithmetic, and a quarter less to bring from L2 than for 64 rows of 512 columns, where
Triton would also have both warpgroups compute the same scores (docs/cuda.md). Softmax is float32, in powers of two;
parts are merged from sums in the compute dtype. Tolerance: the law.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .unpack import place as placed

Tensor = torch.Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Launch sizes of one head width on one architecture."""

    rows: int
    keys: int
    warps: int
    stages: int
    columns: int = 256
    """Columns of the values that one program sums: a wider head takes several, each with scores of its own."""
    programs: int = 132
    """What the keys are split for: programs that run at once on the whole card."""
    merged: int = 8
    """Rows of a program that merges."""
    least: int = 1
    """Parts of the keys, at least, where the result is arranged for 4 bits: merging does that with fewer registers."""


TILINGS: dict[tuple[str, int, int], Tiling] = {
    # architecture, bytes of an element, widest head
    ("sm_80", 2, 256): Tiling(rows=64, keys=32, warps=8, stages=3, programs=108),
    ("sm_80", 2, 512): Tiling(rows=64, keys=32, warps=4, stages=2, programs=108, least=2),
    ("sm_89", 2, 256): Tiling(rows=64, keys=16, warps=8, stages=2, programs=128),
    ("sm_89", 2, 512): Tiling(rows=32, keys=16, warps=2, stages=2, programs=128),
    ("sm_90", 2, 256): Tiling(rows=128, keys=64, warps=8, stages=2, programs=132),
    ("sm_90", 2, 512): Tiling(rows=128, keys=32, warps=8, stages=2, programs=132),
    ("sm_100", 2, 256): Tiling(rows=128, keys=64, warps=8, stages=2, programs=148),
    ("sm_100", 2, 512): Tiling(rows=128, keys=32, warps=8, stages=2, programs=148),
}

EXACT = {256: Tiling(rows=16, keys=32, warps=4, stages=1), 512: Tiling(rows=16, keys=16, warps=8, stages=1)}
"""float32: without tensor cores, for comparisons and not for speed."""


def tiling(arch: str, dtype: torch.dtype, width: int) -> Tiling:
    widest = 256 if width <= 256 else 512
    return EXACT[widest] if dtype == torch.float32 else TILINGS[arch, dtype.itemsize, widest]


@triton.jit
def _attend(
    q, keys, values, held_of, slots, out, log_sums,
    length, kv_heads, window, q_batch, q_head, q_row, kv_slot, kv_head, kv_row,
    CAUSAL: tl.constexpr, CANVAS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    SLICES: tl.constexpr = BLOCK // COLUMNS
    part, slice = tl.program_id(2) // SLICES, tl.program_id(2) % SLICES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row, in_column = row < length * GROUP, column < WIDTH
    place = row // GROUP
    held = tl.load(held_of + batch)
    slot = batch
    if slots is not None:
        slot = tl.load(slots + batch)

    # The keys that any row of this block sees, and this program's part of them.
    first, last = 0, held + length
    nearest, farthest = place, place  # own keys up to one; the window counts back from the other
    if CAUSAL:
        begin = (tl.program_id(0) * ROWS) // GROUP
        end = tl.minimum(tl.program_id(0) * ROWS + ROWS, length * GROUP)
        last = (end - 1) // GROUP + 1
        if CANVAS > 0:
            read = length - CANVAS  # queries before the canvas
            nearest, farthest = tl.where(place < read, place, length - 1), tl.minimum(place, read)
            begin, last = tl.minimum(begin, read), tl.where(last <= read, last, length)
        last += held
        if window is not None:
            first = tl.maximum(0, held + begin - window + 1)
    elif window is not None:
        first = tl.maximum(0, held - window + 1)
    share = tl.cdiv(tl.cdiv(last - first, KEYS), SPLITS) * KEYS
    first += part * share
    last = tl.minimum(last, first + share)

    q += batch.to(tl.int64) * q_batch + (head * GROUP).to(tl.int64) * q_head
    at = row % GROUP * q_head + place * q_row  # within a head group, as all offsets of vectors: below 2^31 elements
    query = _load(q + at[:, None] + column[None, :], in_row[:, None], in_column[None, :], WHOLE)
    keys += slot.to(tl.int64) * kv_slot + head.to(tl.int64) * kv_head
    values += slot.to(tl.int64) * kv_slot + head.to(tl.int64) * kv_head
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    own = slice * COLUMNS + tl.arange(0, COLUMNS)  # of the values' columns
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        index = start + tl.arange(0, KEYS)
        seen = index < last
        offset = index * kv_row
        # Entries beyond the valid ones may hold anything, NaN included: nothing is read of them.
        key = _load(keys + offset[None, :] + column[:, None], seen[None, :], in_column[:, None], WHOLE)
        scores = tl.dot(query, key, input_precision=PRECISION) * LOG2E
        if CAUSAL:
            visible = (held + nearest[:, None] - index[None, :] >= 0) & seen[None, :]
            if window is not None:
                visible = visible & (held + farthest[:, None] - index[None, :] < window)
            scores = tl.where(visible, scores, NOTHING)
        else:
            scores = tl.where(seen[None, :], scores, NOTHING)
        peak = tl.maximum(top, tl.max(scores, 1))
        steady = tl.where(peak == NOTHING, 0.0, peak)  # no key yet: −inf − −inf would be NaN
        odds = tl.exp2(scores - steady[:, None])
        fade = tl.exp2(top - steady)
        total = total * fade + tl.sum(odds, 1)
        value = _load(values + offset[:, None] + own[None, :], seen[:, None], (own < WIDTH)[None, :], WHOLE)
        acc = tl.dot(odds.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        top = peak
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = in_row[:, None] & (own < WIDTH)[None, :]
    if SPLITS == 1:
        out += (batch.to(tl.int64) * length * kv_heads + head) * GROUP * WIDTH
        at = place * (kv_heads * GROUP) + row % GROUP
        result = acc.to(out.dtype.element_ty)
        if BITS != 16:  # as `unpack.place` has them, moved here: stores to scattered places spill behind newer Tritons
            HALF: tl.constexpr = 16 // BITS
            result = tl.permute(tl.reshape(result, (ROWS, COLUMNS // (8 * HALF), 4, 2, HALF)), (0, 1, 4, 2, 3))
            result = tl.reshape(result, (ROWS, COLUMNS))
        tl.store(out + at[:, None] * WIDTH + own[None, :], result, mask=inside)
    else:
        start = (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (length * GROUP)
        out += start * WIDTH
        tl.store(out + row[:, None] * WIDTH + own[None, :], acc.to(out.dtype.element_ty), mask=inside)
        # log2 0 = −inf where this part saw nothing
        tl.store(log_sums + start + row, top + tl.log2(total), mask=in_row & (slice == 0))


@triton.jit
def _load(at, in_row, in_column, WHOLE: tl.constexpr):
    """Load a tile whose rows may be cut off, and its columns where a head does not fill its block."""
    return tl.load(at, mask=in_row if WHOLE else in_row & in_column, other=0.0)


@triton.jit
def _merge(
    parts, log_sums, out, length, group, kv_heads, width,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = row < length * group
    inside = in_row[:, None] & (column < width)[None, :]
    stride = tl.num_programs(1).to(tl.int64) * length * group  # from part to part
    at = pair.to(tl.int64) * length * group + row
    top = tl.full([ROWS], NOTHING, tl.float32)
    for part in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(log_sums + part * stride + at, mask=in_row, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(log_sums + part * stride + at, mask=in_row, other=0.0) - top)
        total += weight
        piece = tl.load(parts + (part * stride + at)[:, None] * width + column[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * piece.to(tl.float32)
    batch, head = pair // kv_heads, pair % kv_heads
    place = (batch.to(tl.int64) * length + row // group) * (kv_heads * group) + head * group + row % group
    acc = acc / total[:, None]
    tl.store(out + place[:, None] * width + placed(column, BITS)[None, :], acc.to(out.dtype.element_ty), mask=inside)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, held: Tensor, slots: Tensor | None = None, *, window: int | None,
    causal: bool, canvas: int = 0, arch: str = "sm_90", sizes: Tiling | None = None, bits: int = 16,
) -> Tensor:  # fmt: skip
    """Attend to slots that hold cached keys and, behind them, the queries' own L.

    Args:
        q: [B, H, L, A], last axis dense.
        keys, values: [N, K, S, A] of the same strides, last axis dense, S ≥ held + L.
        held: int32 [B], cached keys of each row's slot.
        slots: int32 [B], each row's slot; None where row b has slot b.
        window, causal, canvas: as in `core.parts.Span`.
        arch: picks the launch sizes, unless `sizes` gives them.
        bits: of the weight that reads the result, which is arranged for it (`unpack.arrangement`).

    Returns:
        [B, L, H·A] in q's dtype. Softmax and sums are float32.
    """
    batch, heads, length, width = q.shape
    kv_heads = keys.shape[1]
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values have different strides, {keys.stride()} and {values.stride()}")
    group = heads // kv_heads
    sizes = sizes or tiling(arch, q.dtype, width)
    pairs, blocks = batch * kv_heads, triton.cdiv(length * group, sizes.rows)
    # Of shapes alone: the grid is the same for every context length.
    block = max(16, triton.next_power_of_2(width))
    columns = min(sizes.columns, block)
    slices = block // columns
    splits = max(1, min(sizes.programs // (pairs * blocks * slices), triton.cdiv(keys.shape[2], sizes.keys)))
    splits = max(splits, sizes.least if bits == 4 else 1)
    out = torch.empty(batch, length, heads * width, dtype=q.dtype, device=q.device)  # [B, L, H·A]
    parts, log_sums = out, None
    if splits > 1:
        parts = torch.empty(splits, pairs, length * group, width, dtype=q.dtype, device=q.device)
        log_sums = torch.empty(splits, pairs, length * group, dtype=torch.float32, device=q.device)
    _attend[(blocks, pairs, splits * slices)](
        q, keys, values, held.contiguous(), slots, parts, log_sums, length, kv_heads, window,
        *q.stride()[:3], *keys.stride()[:3],
        CAUSAL=causal, GROUP=group, WIDTH=width, SPLITS=splits, ROWS=sizes.rows, KEYS=sizes.keys, BLOCK=block,
        COLUMNS=columns, WHOLE=block == width, STAGES=sizes.stages, BITS=bits, CANVAS=canvas,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    if splits > 1:
        _merge[(triton.cdiv(length * group, sizes.merged), pairs)](
            parts, log_sums, out, length, group, kv_heads, width,
            SPLITS=splits, ROWS=sizes.merged, BLOCK=block, BITS=bits, num_warps=4,
        )  # fmt: skip
    return out
