"""The vocabulary head: attention over the embedding table, without logits and without a float32 buffer of them.

    x [B, L, D], table [V, D], u [B, L] → token, argmax, entropy [B, L], and the mean embedding [B, L, D]

Five launches for a chunk of at most 256 rows, R below:

    _score    a tile of 128 tokens: tile · xᵀ, softcap, temperature; for each row the tile's maximum, sum, moment and
              argmax in float32, and its masses, in the compute dtype, relative to a power of two near the maximum
    _settle   a row: everything but the mean embedding, and which tiles weigh enough to matter to it
    _list     the tiles that matter to any row, in order
    _mean     a part of D and a part of that list: Σ mass · tile
    _gather   the parts' sum over the total

Where classes of tokens are asked for, `_score` keeps its scores as well, in float32, and `head_classes.py` reads them.

Masses [R, V] are what a second pass would otherwise compute anew, at 378 GFLOP; in bf16 they are 134 MB, and the very
rounding that the reference gives its probabilities before the product, since a power of two brings tiles to one scale
without another. In float32 a chunk is 32 rows and the buffer a quarter of that. Tiles that hold, for every row, less
than 2^-20 / (number of tiles) of its probability are skipped by `_mean`: a row loses at most 2^-20 in all, a tenth of
what the tolerance law allows float32. Nothing is ever cut off by rank.

256 rows, 26B, table of 8 bits in groups of 32. Floors at 790 TFLOP/s for bf16 products and 3.35 TB/s:

             GFLOP   bytes read and written                                         floor
    _score   378     0.74 GB codes, 0.05 scales, 0.13 masses, 0.01 statistics       0.48 ms of arithmetic, 0.28 of bytes
    _mean    378     the same but the statistics; all only where rows are flat      0.48 ms, less with what is skipped

Tolerance: the law. Tokens are those of `reference.draw`, blocks of 512 included, but where u lies within rounding of a
boundary; the argmax is the first of equals after the softcap.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....core.errors import DgemmaError
from ....core.parts import Masses
from ....core.reference import DRAW_BLOCK
from ...torch.packed import QuantizedTensor
from .head_classes import Runs, reduce_classes, runs_of
from .head_mean import mean_embedding
from .head_sizes import Tiling, tiling
from .unpack import MAGIC, Stored, arrange, stored, times

Tensor = torch.Tensor

NOTHING = tl.constexpr(-1e30)
"""Score of what fills a tile up: its mass is 0, and 0 · score is not NaN, as with infinity."""

BELOW_ONE = tl.constexpr(1.0 - 2.0**-23)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)

NEGLIGIBLE = 2.0**-20
"""Share of a row's probability that skipped tiles may hold together."""


# ---- On the device ----------------------------------------------------------------------------------------------


@triton.jit
def _tanh(y, EXACT: tl.constexpr):
    """tanh as 1 − 2 / (1 + e^2y), whose absolute error is 1e-7; the exact form has a series where y is small.

    The other form squares a reciprocal root, which is one instruction where a division is ten: 2e-7.
    """
    above = 1.0 + tl.exp2(y * (2.0 * LOG2E))
    if EXACT:
        s = y * y
        series = y + y * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
        value = tl.where(tl.abs(y) < 0.25, series, 1.0 - 2.0 / above)
    else:
        root = tl.rsqrt(above)
        value = 1.0 - 2.0 * root * root
    return value


@triton.jit
def _score(
    x, words, scales, biases, magic, temperature, masses, statistics, ceilings, raw, wanted,
    rows, first_row, length, vocab, tiles, softcap, temperature_batch,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # Row blocks of one tile run side by side, so that the table comes from memory once.
    row_blocks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    row = block * ROWS + tl.arange(0, ROWS)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live, real = row < rows, token < vocab
    if EXACT:
        acc = tl.zeros((TOKENS, ROWS), tl.float32)
        for at in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            k = at + tl.arange(0, DEPTH)
            part = tl.load(
                words + token[:, None] * WIDTH + k[None, :], mask=real[:, None] & (k < WIDTH)[None, :], other=0.0
            )
            part_x = tl.load(
                x + row[None, :] * WIDTH + k[:, None], mask=live[None, :] & (k < WIDTH)[:, None], other=0.0
            )
            acc = tl.dot(part, part_x, acc, input_precision="ieee")
    else:
        acc = times(
            x, row * WIDTH, live, words, scales, biases, tl.full((), 0, tl.int64), token, real, magic, 0,
            WIDTH, 1, WIDTH, BITS, GROUP, False, TOKENS, ROWS, DEPTH, STAGES,
        )  # fmt: skip
    # Rows are finished in parts: all at once, the softmax of 256 would need more registers than there are.
    _finish(
        acc, block * ROWS, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row, length, tiles,
        softcap, temperature_batch, EXACT,
    )  # fmt: skip
    tl.store(wanted + tile, 0, mask=block == 0)


@triton.jit
def _finish(
    acc, start, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row, length, tiles, softcap,
    temperature_batch, EXACT: tl.constexpr,
):  # fmt: skip
    """Turn products [TOKENS, ROWS], of rows `start` on, into masses and what `_settle` needs of them."""
    ROWS: tl.constexpr = acc.shape[1]
    MOST: tl.constexpr = 64 if raw is None else 32
    if ROWS > MOST:  # in parts: in the layout of a product that moves no register, and at once would take too many
        low, high = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, ROWS // 2)), (0, 2, 1)))
        _finish(
            low, start, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row, length, tiles,
            softcap, temperature_batch, EXACT,
        )  # fmt: skip
        _finish(
            high, start + ROWS // 2, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row,
            length, tiles, softcap, temperature_batch, EXACT,
        )  # fmt: skip
    else:
        _finish_part(
            acc, start, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row, length, tiles,
            softcap, temperature_batch, EXACT,
        )  # fmt: skip


@triton.jit
def _finish_part(
    acc, start, tile, real, temperature, masses, statistics, ceilings, raw, rows, first_row, length, tiles, softcap,
    temperature_batch, EXACT: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = acc.shape[0]
    row = start + tl.arange(0, acc.shape[1])
    live = row < rows
    heat = tl.load(temperature + (first_row + row) // length * temperature_batch, mask=live, other=1.0)
    # Everything from here is in powers of two: scores are softcap · tanh(logit / softcap) / T · log2 e.
    scores = _tanh(acc * (1.0 / softcap), EXACT) * (softcap / heat * LOG2E)[None, :]
    scores = tl.where(real[:, None], scores, NOTHING)
    order = tl.arange(0, TOKENS)
    if raw is not None:
        place = raw + (tile * TOKENS + order)[:, None] * rows + row[None, :]
        tl.store(place, scores, mask=real[:, None] & live[None, :])
    peak = tl.max(scores, 0)
    best = tl.min(tl.where(scores == peak[None, :], order[:, None], TOKENS - 1), 0)  # the first of equals
    shifted = scores - peak[None, :]
    odds = tl.exp2(shifted)
    at = statistics + row * tiles + tile
    tl.store(at, peak, mask=live)
    tl.store(at + rows * tiles, tl.sum(odds, 0), mask=live)
    tl.store(at + 2 * rows * tiles, tl.sum(odds * shifted, 0), mask=live)
    tl.store(at + 3 * rows * tiles, best.to(tl.float32), mask=live)
    ceiling = tl.ceil(peak)
    tl.store(ceilings + tile * rows + row, ceiling, mask=live)
    stored = (odds * tl.exp2(peak - ceiling)[None, :]).to(masses.dtype.element_ty)
    # The mean embedding is over the sum of what is stored: of a row with one token left, that token's row, to the bit.
    tl.store(at + 4 * rows * tiles, tl.sum(stored.to(tl.float32), 0), mask=live)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    place = masses + row[None, :] * (tiles * TOKENS) + token[:, None]
    tl.store(place, stored, mask=live[None, :])


@triton.jit
def _settle(
    masses, statistics, u, token, argmax, entropy, ceiling, total_out, norms, wanted, rows, vocab, tiles, negligible,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    known = tile < tiles
    peaks = statistics + row * tiles
    sums, moments, places = peaks + rows * tiles, peaks + 2 * rows * tiles, peaks + 3 * rows * tiles
    peak = tl.load(peaks + tile, mask=known, other=NOTHING)
    top = tl.max(peak, 0)
    fade = tl.exp2(peak - top)
    mass = tl.load(sums + tile, mask=known, other=0.0) * fade
    total = tl.sum(mass, 0)
    moment = tl.sum(tl.load(moments + tile, mask=known, other=0.0) * fade + mass * (peak - top), 0)
    # The tensor first: in the interpreter constant · tensor is a constant, which Triton 3.7 and later do not store.
    tl.store(entropy + row, (tl.log2(total) - moment / total) * LN2)
    tl.store(wanted + tile, 1, mask=known & (mass > total * negligible))  # rows write the same, so no atomic is needed
    tl.store(ceiling + row, tl.ceil(top))
    if norms is not None:
        tl.store(norms + row, top)
        tl.store(norms + rows + row, tl.log2(total))
    held = tl.load(places + rows * tiles + tile, mask=known, other=0.0)
    tl.store(total_out + row, tl.sum(held * tl.exp2(tl.ceil(peak) - tl.ceil(top)), 0))
    first = tl.minimum(tl.min(tl.where(peak == top, tile, FAR), 0), tiles - 1)
    # Of a row of NaN, a token none the less: the next pass looks it up.
    likeliest = first * TOKENS + tl.load(places + first).to(tl.int32)
    tl.store(argmax + row, tl.minimum(likeliest, vocab - 1))

    # The draw. A parallel running sum rounds differently at each place and may step back: mass says what can be hit.
    BLOCKS: tl.constexpr = TILES * TOKENS // BLOCK
    blocks = tl.sum(tl.reshape(mass, (BLOCKS, BLOCK // TOKENS)), 1)
    index = tl.arange(0, BLOCKS)
    target = tl.minimum(tl.load(u + row) * total, total * BELOW_ONE)
    block = _first(tl.cumsum(blocks, 0) > target, blocks > 0.0, index)
    before = tl.sum(tl.where(index < block, blocks, 0.0), 0)
    own = tl.sum(tl.where(index == block, blocks, 0.0), 0)
    inner = tl.arange(0, BLOCK)
    drawn = block * BLOCK + inner
    inside = drawn < tiles * TOKENS
    scale = tl.load(peaks + drawn // TOKENS, mask=inside, other=NOTHING)
    odds = tl.load(masses + row.to(tl.int64) * (tiles * TOKENS) + drawn, mask=inside, other=0.0).to(tl.float32)
    odds = odds * tl.exp2(tl.ceil(scale) - top)
    # Stored masses are rounded: the place in the block is scaled to their own sum, and stays strictly inside.
    sum_of_odds = tl.sum(odds, 0)
    rest = tl.minimum((target - before) / own * sum_of_odds, sum_of_odds * BELOW_ONE)
    drawn = block * BLOCK + _first(tl.cumsum(odds, 0) > rest, odds > 0.0, inner)
    tl.store(token + row, tl.minimum(drawn, vocab - 1))


@triton.jit
def _first(hit, possible, index):
    """Return the first index that is hit and possible; the last possible one where none is; never below 0."""
    last = tl.max(tl.where(possible, index, 0), 0)
    return tl.minimum(tl.min(tl.where(hit & possible, index, FAR), 0), last)


# ---- From the host ----------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What tiles say of each row of a chunk."""

    masses: Tensor  # compute dtype [R, tiles · tokens], relative to 2^ceiling of their tile
    statistics: Tensor  # float32 [5, R, tiles]: log2 of the largest mass; Σ mass and Σ mass · log2 mass, relative to
    # it; the first token that has it, counted in its tile; Σ of the masses as they are stored
    ceilings: Tensor  # float32 [tiles, R], whole numbers


def vocab_head(
    x: Tensor, table: Tensor | QuantizedTensor, softcap: float, temperature: Tensor, u: Tensor, *,
    arch: str = "sm_90", sizes: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`Ops.vocab_head`: everything a denoising pass needs of the logits.

    Args:
        x: [B, L, D], bfloat16 or float32.
        table: [V, D] in x's dtype, or packed in 4 or 8 bits, affine, under bfloat16.
        softcap: logits are softcap · tanh(logit / softcap).
        temperature: float32 [B, 1] or [1, 1].
        u: float32 [B, L], uniform in [0, 1).
        arch: picks the launch sizes, unless `sizes` gives them.

    Returns:
        token int32 [B, L], argmax int32 [B, L], entropy float32 [B, L] in nats, mean embedding [B, L, D] in x's dtype.

    Raises:
        DgemmaError: a table in another format.
    """
    found = _head(x, table, softcap, temperature, u, sizes or tiling(arch, x.dtype), None)
    return tuple(one.view(*x.shape[:2], *one.shape[1:]) for one in found)  # type: ignore[return-value]


def class_head(
    x: Tensor, table: Tensor | QuantizedTensor, softcap: float, temperature: Tensor, classes: Tensor, count: int, *,
    arch: str = "sm_90", sizes: Tiling | None = None,
) -> tuple[Tensor, Masses]:  # fmt: skip
    """`Ops.class_head`: `vocab_head` for what looks at classes of tokens; arguments as there, and

    Args:
        classes: int32 [V], each token's class, −1 for none.
        count: of classes.

    Returns:
        mean embedding [B, L, D] in x's dtype, the same bits as `vocab_head`'s; `Masses`, float32 and int32 [B, L, C].

    Raises:
        DgemmaError: a table in another format.
    """
    rows = x.shape[0] * x.shape[1]
    mass, score, moment = (torch.empty(rows, count, dtype=torch.float32, device=x.device) for _ in range(3))
    out = Masses(mass, torch.empty(rows, count, dtype=torch.int32, device=x.device), score, moment)
    u = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device)
    sizes = sizes or tiling(arch, x.dtype)
    soft = _head(x, table, softcap, temperature, u, sizes, _Wanted(runs_of(classes, count), out))[3]
    return soft.view(x.shape), Masses(*(one.view(*x.shape[:2], count) for one in out))


class _Wanted(NamedTuple):
    """What is to be found out about classes."""

    runs: Runs
    out: Masses  # [R, C]


def _head(
    x: Tensor, table: Tensor | QuantizedTensor, softcap: float, temperature: Tensor, u: Tensor, sizes: Tiling,
    wanted_classes: _Wanted | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return token, argmax, entropy [R] and mean embedding [R, D], chunk by chunk."""
    length, width = x.shape[1:]
    weight = _stored(table, x.dtype)
    flat, u = x.reshape(-1, width), u.reshape(-1).contiguous()
    rows, tiles = flat.shape[0], triton.cdiv(weight.rows, sizes.tokens)
    arranged = arrange(flat.contiguous(), weight.bits)
    token, argmax = (torch.empty(rows, dtype=torch.int32, device=x.device) for _ in range(2))
    entropy = torch.empty(rows, dtype=torch.float32, device=x.device)
    soft = torch.empty_like(flat)
    most = min(rows, sizes.chunk)
    held = Held(
        torch.empty(most, tiles * sizes.tokens, dtype=x.dtype, device=x.device),
        torch.empty(5, most, tiles, dtype=torch.float32, device=x.device),
        torch.empty(tiles, most, dtype=torch.float32, device=x.device),
    )
    raw = norms = None
    if wanted_classes is not None:
        raw = torch.empty(weight.rows, most, dtype=torch.float32, device=x.device)
        norms = torch.empty(2, most, dtype=torch.float32, device=x.device)
    wanted = torch.empty(tiles, dtype=torch.int32, device=x.device)
    per_batch = 0 if temperature.numel() == 1 else temperature.stride(0)
    exact = x.dtype == torch.float32
    for start in range(0, rows, sizes.chunk):
        part = slice(start, min(start + sizes.chunk, rows))
        count = part.stop - start
        _score[(tiles * triton.cdiv(count, sizes.rows),)](
            arranged[part], weight.words, weight.scales, weight.biases, MAGIC, temperature, *held, raw, wanted,
            count, start, length, weight.rows, tiles, softcap, per_batch,
            WIDTH=width, BITS=weight.bits, GROUP=weight.group, TOKENS=sizes.tokens, ROWS=sizes.rows,
            DEPTH=sizes.depth, STAGES=sizes.stages, EXACT=exact,
            num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip
        ceiling, total = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
        _settle[(count,)](
            *held[:2], u[part], token[part], argmax[part], entropy[part], ceiling, total, norms, wanted,
            count, weight.rows, tiles, NEGLIGIBLE / tiles, TOKENS=sizes.tokens, BLOCK=DRAW_BLOCK,
            TILES=max(triton.next_power_of_2(tiles), DRAW_BLOCK // sizes.tokens), num_warps=4,
        )  # fmt: skip
        mean_embedding(held.masses, held.ceilings, wanted, ceiling, total, weight, soft[part], sizes, exact=exact)
        if wanted_classes is not None and raw is not None and norms is not None:
            reduce_classes(raw, norms, wanted_classes.runs, count, start, wanted_classes.out)
    return token, argmax, entropy, soft


def _stored(table: Tensor | QuantizedTensor, dtype: torch.dtype) -> Stored:
    if isinstance(table, Tensor) and table.dtype == dtype:
        words = table.contiguous()
        return Stored(words=words, scales=None, biases=None, factor=None, bits=16, group=0, per_row=False)
    if isinstance(table, Tensor) or dtype != torch.bfloat16 or table.format.mode != "affine":
        found = table.dtype if isinstance(table, Tensor) else f"{table.format.bits}-bit {table.format.mode}"
        raise DgemmaError(f"the vocabulary head reads no {found} table under {dtype}; use bfloat16 and affine weights")
    return stored(table)
