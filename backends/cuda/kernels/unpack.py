"""Stored weights to matrix-unit operands: one tile of a packed weight, dequantized in registers, times activations.

Every matrix kernel here computes acc [N, M] = W · xᵀ, weights on the left and tokens on the right, whatever the number
of tokens. On Hopper the left operand of `wgmma` may come from registers, 64 rows at a time, and the right one from
shared memory with as few as 8 columns: 16 tokens then cost 16 columns, not 64 rows, and no dequantized weight is ever
written to shared memory. Nothing is shuffled either, because the activations are laid out to suit the words:

    A word holds C = 32/bits codes along K. `word >> bits·j & mask` leaves codes j and j + C/2 in its two halves, which
    is a pair of bf16 once the exponent of 128 is put over each: 0x4300 | q is 128 + q. Pairs stay pairs, so in a block
    of four words the codes come out in the order [j < C/2][word < 4][half < 2], and in that order a thread's share of
    four words is its share of the matrix instruction's operand. A sum does not care for order: x has to be in the same.

`arranged` is that order: within blocks of 4·C elements of K (32 for 4 bits, 16 for 8) element [word][half][j] moves to
place [j][word][half]. Kernels that produce activations store them so; `place` says where, and `arrange` is the kernel
for activations that come otherwise.

Values are those of checkpoints/quant.py: code minus zero point is exact in bf16, and one multiplication, or with biases
one fused multiply-add, rounds once. nvfp4: code times its 8-bit scale is exact in bf16; the global scale is applied to
the sum. With biases of 8 bits the definition rounds twice (float32, then bf16) and the multiply-add once: they differ
in less than one weight of a thousand, by one unit in the last place.

Cost for 8 symmetric weights of 4 bits: 3 shifts, 4 three-input logic operations, 4 subtractions and 4 multiplications,
all on pairs: 1.9 instructions a weight. With everything else the loop of `gate_up` takes 401 for 128 rows of 128
weights in 128 threads (nvdisasm, sm_90); docs/cuda.md sets that against the time that reading the weights takes.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ....core.errors import DgemmaError
from ...torch.blocks import Weight
from .configs import Config, card

Tensor = torch.Tensor

MAGIC = 0x43004300
"""The bf16 pair (128, 128). A kernel's argument and no constant, or two operands of each logic operation would be
literals, which the instruction does not take: one instruction would become two."""

_FLOAT_SHIFT = 12
"""The same argument for nvfp4: how far the lowest code's sign is from its place in bf16."""


def activations(x: Tensor) -> Tensor:
    """Return activations [N, K] as the kernels read them, dense.

    Raises:
        DgemmaError: not bfloat16, or not [N, K].
    """
    if x.dtype != torch.bfloat16 or x.ndim != 2:
        raise DgemmaError(f"the CUDA kernels read bfloat16 activations [N, K], not {x.dtype} {list(x.shape)}")
    return x.contiguous()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight as kernels take it: tensors, and the constants that a kernel is compiled for."""

    words: Tensor  # int32 [..., K·bits/32], or bfloat16 [..., K]
    scales: Tensor | None
    biases: Tensor | None
    factor: Tensor | None  # float32: nvfp4's global scale, one or one for each row
    bits: int  # 16 for bf16
    group: int
    per_row: bool  # a factor for each row

    @property
    def width(self) -> int:
        return self.words.shape[-1] * (1 if self.bits == 16 else 32 // self.bits)

    @property
    def rows(self) -> int:
        """Rows of one matrix."""
        return self.words.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], self.width)

    def arguments(self) -> dict[str, Any]:
        """Return this weight under the names the kernels have for them."""
        return {
            "words": self.words, "scales": self.scales, "biases": self.biases, "factor": self.factor,
            "magic": _FLOAT_SHIFT if self.scales is not None and self.scales.dtype == torch.uint8 else MAGIC,
            "BITS": self.bits, "GROUP": self.group, "PER_ROW": self.per_row,
        }  # fmt: skip


def fitted(cut: Config, weight: Stored) -> Config:
    """Return a cut whose turns hold no more than a row's largest power of two."""
    return replace(cut, block=min(cut.block, 1 << (weight.width.bit_length() - 1)))


def supports(weight: Weight) -> bool:
    """Whether the kernels read this weight as it is: bf16, affine of 4 or 8 bits, or nvfp4, in whole blocks."""
    if isinstance(weight, Tensor):
        return weight.dtype == torch.bfloat16 and weight.shape[-1] % 16 == 0
    kind = weight.format
    return (kind.mode == "affine" and kind.bits in (4, 8)) or (kind.mode == "nvfp4" and weight.shape[-1] % 32 == 0)


def order_of(weight: Weight, head: int = 0) -> int:
    """Return the bits that activations are arranged for which this weight reads; 16, as they are, where it reads none.

    `head` is the width of a head where activations come as heads, which have to hold whole blocks.
    """
    if isinstance(weight, Tensor) or not supports(weight) or head % (128 // weight.format.bits):
        return 16
    return weight.format.bits


def stored(weight: Weight) -> Stored:
    """Return a weight as kernels take it.

    Raises:
        DgemmaError: a format they do not read, or tensors that are not contiguous.
    """
    if not supports(weight):
        found = weight.dtype if isinstance(weight, Tensor) else f"{weight.format.bits}-bit {weight.format.mode}"
        raise DgemmaError(f"the CUDA kernels do not read {found} weights of shape {list(weight.shape)}")
    if isinstance(weight, Tensor):
        parts = [weight]
        made = Stored(words=weight, scales=None, biases=None, factor=None, bits=16, group=0, per_row=False)
    else:
        kind, factor = weight.format, weight.global_scale
        parts = [weight.words, weight.scales, *(p for p in (weight.biases, factor) if p is not None)]
        made = Stored(
            words=weight.words,
            scales=weight.scales,
            biases=weight.biases,
            factor=factor,
            bits=kind.bits,
            group=kind.group_size,
            per_row=factor is not None and factor.ndim > 0 and factor.numel() > 1,
        )
    if not all(part.is_contiguous() for part in parts):
        raise DgemmaError("the CUDA kernels read contiguous weights only")
    return made


def arrangement(width: int, bits: int) -> Tensor:
    """Return int64 [K]: the element of K that stands at each place of an arranged row."""
    if bits == 16:
        return torch.arange(width)
    half = 16 // bits
    return torch.arange(width).view(-1, 4, 2, half).permute(0, 3, 1, 2).reshape(-1)


@triton.jit
def wait_turn(EARLY: tl.constexpr):
    """Let the next kernel of the stream come up, then wait until all before this one have ended and written.

    First in every kernel that may be launched early: nothing is read or written before. A kernel behind that does not
    wait is not launched early, so that nothing passes by.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def element(at, BITS: tl.constexpr):
    """Return the element of K that stands at a place of an arranged row."""
    if BITS == 16:
        return at
    HALF: tl.constexpr = 16 // BITS  # 4 or 2 pairs in a word
    inner = at % (8 * HALF)
    return at - inner + (inner % 8 // 2) * (2 * HALF) + (inner % 2) * HALF + inner // 8


@triton.jit
def place(element, BITS: tl.constexpr):
    """Return where in an arranged row an element of K stands: for kernels that produce activations."""
    if BITS == 16:
        return element
    HALF: tl.constexpr = 16 // BITS
    inner = element % (8 * HALF)
    return element - inner + inner % HALF * 8 + inner // (2 * HALF) * 2 + inner // HALF % 2


@triton.jit
def arrange_kernel(x, out, width, BITS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    wait_turn(EARLY)
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row + at, tl.load(x + row + element(at, BITS), mask=at < width), mask=at < width)


def arrange(x: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Lay out activations x [N, K] for weights of so many bits; a copy, or for 16 bits x itself.

    2·N·K·2 bytes, which the cache holds. Exact.
    """
    if bits == 16:
        return x
    out = torch.empty_like(x) if out is None else out
    rows, width = x.shape
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        early = card(x.device).early
        arrange_kernel[(rows, triton.cdiv(width, block))](
            x, out, width, BITS=bits, EARLY=early, BLOCK=block, num_warps=4, launch_pdl=early
        )
    return out


@triton.jit
def _half(half):
    return half.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _weights(
    words, scales, biases, magic, J: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, BIASED: tl.constexpr
):
    """Return codes J and J + C/2 of each word as weights: bf16 [N, words, 2]. Scales and biases are [N, groups, 1]."""
    PER_GROUP: tl.constexpr = words.shape[1] * 2 // scales.shape[1]
    if FLOAT:
        # Sign, and 2 bits of exponent with 1 of mantissa, each to its place in bf16. Left shifts are by an argument,
        # 12: the compiler takes constant ones apart and works on the halves one by one.
        SHIFT: tl.constexpr = 6 - 4 * J
        sign = (words << (magic - 4 * J)) & -0x7FFF8000
        size = words << (magic - 6 - 4 * J) if SHIFT > 0 else words >> -SHIFT
        both = sign | (size & 0x01C001C0)
        pair = tl.join(_half(both), _half(both >> 16)) * 2.0**126
    elif BITS == 4:
        both = ((words >> (4 * J)) & 0x000F000F) | magic
        pair = tl.join(_half(both), _half(both >> 16))
        pair = pair - (128.0 if BIASED else 136.0)
    else:
        # 128 + q fits bf16's 7 bits of mantissa for 7 bits of q; the eighth chooses 128 or 256 to take away.
        both = words >> (8 * J)
        low = (both & 0x007F007F) | magic
        high = (both & 0x00800080) ^ (magic + 0x00800080)
        pair = tl.join(_half(low), _half(low >> 16)) - tl.join(_half(high), _half(high >> 16))
        if BIASED:
            pair = pair + 128.0
    # tl.reshape, not [:, :, None]: the compiler carries the operand's layout back through a reshape, up to the load
    # from shared memory, but not through an expansion, and would then move every weight through shared memory again.
    pair = tl.reshape(pair, (words.shape[0], scales.shape[1], PER_GROUP))
    if scales.dtype == tl.float16:  # bf16 would round such a scale: the product is made wide, and rounded once
        pair = pair.to(tl.float32) * scales.to(tl.float32)
        if BIASED:
            pair = pair + biases.to(tl.float32)
        pair = pair.to(tl.bfloat16)
    elif BIASED:
        pair = tl.fma(pair, tl.broadcast_to(scales, pair.shape), tl.broadcast_to(biases, pair.shape))
    else:
        pair = pair * scales
    return tl.reshape(pair, (words.shape[0], words.shape[1], 2))


@triton.jit
def dequantized(
    words, scales, biases, magic,
    BITS: tl.constexpr, FLOAT: tl.constexpr, BIASED: tl.constexpr,
    N: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return a tile's weights, bf16 [N, WORDS·32/BITS] in arranged order.

    words int32 [N, WORDS], scales [N, GROUPS] bf16, float16 or, FLOAT, the bits of E4M3; biases too, where BIASED.
    """
    HALF: tl.constexpr = 16 // BITS
    scales = tl.reshape(scales, (N, GROUPS, 1))
    biases = tl.reshape(biases, (N, GROUPS, 1))
    if FLOAT:
        bits = scales.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        scales = bits.to(tl.bfloat16, bitcast=True) * 2.0**120
    first = _weights(words, scales, biases, magic, 0, BITS, FLOAT, BIASED)
    second = _weights(words, scales, biases, magic, 1, BITS, FLOAT, BIASED)
    if HALF == 4:
        first = tl.join(first, _weights(words, scales, biases, magic, 2, BITS, FLOAT, BIASED))
        second = tl.join(second, _weights(words, scales, biases, magic, 3, BITS, FLOAT, BIASED))
    tile = tl.reshape(tl.join(first, second), (N, WORDS // 4, 4, 2, HALF))  # [row, block, word, half, j]
    return tl.reshape(tl.permute(tile, (0, 1, 4, 2, 3)), (N, WORDS * 2 * HALF))


@triton.jit
def times(
    x, starts, live, words, scales, biases, matrix, rows, real, magic, first,
    SPAN: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ALL: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return rows of a weight times rows of activations, float32 [N, M], over SPAN elements of K from `first` on.

    x is arranged; `starts` [M] are its rows' first elements, and `live` [M] says whether they are read, or are 0.
    `rows` [N] are the weight's, counted from row `matrix` of a stack (int64; the rest fits 32 bits), and `real` [N]
    says whether they exist (ALL: all do). K is cut in PARTS of SPAN elements, the last of which may be short, or empty.
    A turn holds whole groups, or lies in one. How many there are is a constant, for where the assembler does not know
    that a loop turns at all, it keeps no two products in flight.
    """
    k = tl.arange(0, BLOCK)
    acc = tl.zeros((N, M), tl.float32)
    EVEN: tl.constexpr = SPAN % BLOCK == 0 and SPAN * PARTS == WIDTH
    x_tile = x + starts[:, None] + k[None, :]
    if BITS == 16:
        tile = words + matrix * WIDTH + rows[:, None] * WIDTH + k[None, :]
        for turn in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
            at = first + turn
            inside = k < WIDTH - at
            if ALL and EVEN:
                w = tl.load(tile + at)
            else:
                w = tl.load(tile + at, mask=real[:, None] & inside[None, :], other=0.0)
            x_mask = live[:, None] if EVEN else live[:, None] & inside[None, :]
            acc = tl.dot(w, tl.trans(tl.load(x_tile + at, mask=x_mask, other=0.0)), acc)
    else:
        FLOAT: tl.constexpr = scales.dtype.element_ty == tl.uint8
        BIASED: tl.constexpr = biases is not None
        CODES: tl.constexpr = 32 // BITS
        GROUPS: tl.constexpr = (BLOCK + GROUP - 1) // GROUP
        word = tl.arange(0, BLOCK // CODES)
        group = tl.arange(0, GROUPS)
        tile = words + matrix * (WIDTH // CODES) + rows[:, None] * (WIDTH // CODES) + word[None, :]
        grouped = matrix * (WIDTH // GROUP) + rows[:, None] * (WIDTH // GROUP) + group[None, :]
        for turn in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
            at = first + turn
            g = grouped + at // GROUP
            if ALL and EVEN:
                w = tl.load(tile + at // CODES)
                scale = tl.load(scales + g)
                bias = tl.load(biases + g) if BIASED else scale
            else:
                w_mask = real[:, None] & (word < WIDTH // CODES - at // CODES)[None, :]
                g_mask = real[:, None] & (group < WIDTH // GROUP - at // GROUP)[None, :]
                w = tl.load(tile + at // CODES, mask=w_mask, other=0)
                scale = tl.load(scales + g, mask=g_mask, other=0)
                bias = tl.load(biases + g, mask=g_mask, other=0) if BIASED else scale
            x_mask = live[:, None] if EVEN else live[:, None] & (k < WIDTH - at)[None, :]
            activations = tl.load(x_tile + at, mask=x_mask, other=0.0)
            tall = dequantized(w, scale, bias, magic, BITS, FLOAT, BIASED, N, BLOCK // CODES, GROUPS)
            acc = tl.dot(tall, tl.trans(activations), acc)
    return acc
