"""The vocabulary head's second product: the mean embedding under masses that `head.py` left, tile by tile.

    masses [R, V] · table [V, D] / total → [R, D]

Only tiles that some row wants are read. Their numbers are put in a list first, so that programs share them evenly: a
program takes a part of D, and every so manieth entry of the list. Bytes, FLOPs and floor are on top of `head.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .head_sizes import Tiling
from .unpack import MAGIC, Stored, dequantized, place

Tensor = torch.Tensor


@triton.jit
def _list(wanted, listed, count, tiles, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    flag = tl.load(wanted + tile, mask=tile < tiles, other=0)
    tl.store(listed + tl.cumsum(flag, 0) - 1, tile, mask=flag != 0)
    tl.store(count, tl.sum(flag, 0))


@triton.jit
def _mean(
    masses, ceilings, ceiling, words, scales, biases, magic, listed, count, parts, rows, vocab, tiles,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live, in_width = row < rows, column < WIDTH
    top = tl.load(ceiling + row, mask=live, other=0.0)
    PER: tl.constexpr = TOKENS // DEPTH
    steps = tl.load(count) * PER
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    # The tile's number is read a turn ahead: the copies of this turn need it to start.
    tile = tl.load(listed + part // PER, mask=part < steps, other=0)
    for step in tl.range(part, steps, SPLITS, num_stages=STAGES):
        ahead = tl.load(listed + (step + SPLITS) // PER, mask=step + SPLITS < steps, other=0)
        token = tile * TOKENS + step % PER * DEPTH + tl.arange(0, DEPTH)
        mass = tl.load(masses + row[:, None] * (tiles * TOKENS) + token[None, :], mask=live[:, None], other=0.0)
        # A power of two times a stored mass is exact: probabilities are rounded once, as the reference rounds them.
        fade = tl.exp2(tl.load(ceilings + tile * rows + row, mask=live, other=0.0) - top)
        mass = mass * fade.to(mass.dtype)[:, None]
        real = token < vocab
        if BITS == 16:
            at = token[:, None] * WIDTH + column[None, :]
            values = tl.load(words + at, mask=real[:, None] & in_width[None, :], other=0.0)
        else:
            values = _packed_tile(
                words, scales, biases, magic, token, real, tl.program_id(0) * COLUMNS, WIDTH, BITS, GROUP, COLUMNS
            )
        acc = tl.dot(mass, values, acc, input_precision="ieee" if EXACT else "tf32")
        tile = ahead
    at = (part * rows + row)[:, None] * WIDTH + column[None, :]
    tl.store(parts + at, acc, mask=live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _packed_tile(
    words, scales, biases, magic, token, real, start,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return some tokens' weights from column `start` on, bf16 [DEPTH, COLUMNS] in arranged order (`unpack.place`)."""
    CODES: tl.constexpr = 32 // BITS
    BIASED: tl.constexpr = biases is not None
    word = start // CODES + tl.arange(0, COLUMNS // CODES)
    GROUPS: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    group = start // GROUP + tl.arange(0, GROUPS)
    inside = real[:, None] & (word < WIDTH // CODES)[None, :]
    tile = tl.load(words + token[:, None] * (WIDTH // CODES) + word[None, :], mask=inside, other=0)
    inside = real[:, None] & (group < WIDTH // GROUP)[None, :]
    at = token[:, None] * (WIDTH // GROUP) + group[None, :]
    scale = tl.load(scales + at, mask=inside, other=0.0)
    bias = scale
    if BIASED:
        bias = tl.load(biases + at, mask=inside, other=0.0)
    return dequantized(tile, scale, bias, magic, BITS, False, BIASED, token.shape[0], COLUMNS // CODES, GROUPS)


@triton.jit
def _gather(parts, total, out, size, width, BITS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    source = at - at % width + place(at % width, BITS)  # columns stand in the order that words unpack in
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(parts + part * size + source, mask=inside, other=0.0)
    mean = acc / tl.load(total + at // width, mask=inside, other=1.0)
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)


def mean_embedding(
    masses: Tensor, ceilings: Tensor, wanted: Tensor, ceiling: Tensor, total: Tensor, weight: Stored, soft: Tensor,
    sizes: Tiling, *, exact: bool,
) -> None:  # fmt: skip
    """Write Σ mass · tile / total over the wanted tiles into soft.

    Args:
        masses: compute dtype [R, tiles · tokens], relative to 2^ceilings.
        ceilings: float32 [tiles, R].
        wanted: int32 [tiles], 1 or 0.
        ceiling, total: float32 [R], the row's own power of two, and its masses' sum as stored, relative to that.
        weight: the table, as `unpack.stored` has it.
        soft: [R, D], written.
        exact: float32 without tensor cores.
    """
    rows, width = soft.shape
    tiles = wanted.shape[0]
    # No wider than a row: with one group of scales in it, Triton 3.6 fails to lay out the operand of a wider program.
    part = min(sizes.mean_width, max(16, triton.next_power_of_2(width)))
    columns, blocks = triton.cdiv(width, part), triton.cdiv(rows, sizes.mean_rows)
    turns = tiles * (sizes.tokens // sizes.mean_depth)
    splits = max(1, min(sizes.programs // (columns * blocks), turns))
    listed, count = torch.empty_like(wanted), torch.empty(1, dtype=torch.int32, device=soft.device)
    parts = torch.empty(splits, rows, width, dtype=torch.float32, device=soft.device)
    _list[(1,)](wanted, listed, count, tiles, TILES=triton.next_power_of_2(tiles), num_warps=8)
    _mean[(columns, splits, blocks)](
        masses, ceilings, ceiling, weight.words, weight.scales, weight.biases, MAGIC, listed, count, parts,
        rows, weight.rows, tiles,
        WIDTH=width, BITS=weight.bits, GROUP=weight.group, TOKENS=sizes.tokens, ROWS=sizes.mean_rows,
        COLUMNS=part, DEPTH=sizes.mean_depth, SPLITS=splits, STAGES=sizes.mean_stages, EXACT=exact,
        num_warps=sizes.mean_warps, num_stages=sizes.mean_stages,
    )  # fmt: skip
    _gather[(triton.cdiv(soft.numel(), 1024),)](
        parts, total, soft, soft.numel(), width, BITS=weight.bits, SPLITS=splits, BLOCK=1024, num_warps=4
    )
