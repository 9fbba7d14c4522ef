"""Bit patterns under `quant.py`: bfloat16, MLX's packing of codes, values of the small float types. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DgemmaError

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]

# Codes after which a row of them comes out even in 32-bit words, by width.
PERIOD = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 4}

# bfloat16 is float32's upper half, so integers are all it takes. Arrays of it are uint16 here;
# `.view(ml_dtypes.bfloat16)` costs nothing where somebody wants to compute in it.


def to_bf16(x: NDArray[Any]) -> U16:
    """Return the bf16 bits of float32 values, to nearest, ties to even. NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    out = odd.astype(np.uint16)
    nan = np.isnan(x)  # rounding can carry a NaN into infinity, or past it into zero
    if nan.any():
        out[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return out


def from_bf16(bits: NDArray[Any]) -> F32:
    """Return the float32 values of bf16 bits; exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def widen(x: NDArray[Any]) -> F32:
    """Return the float32 values of weights, scales or biases as stored, bf16 bits or any float of up to 32; exact."""
    return from_bf16(x) if x.dtype == np.uint16 else x.astype(np.float32, copy=False)


def row_pieces(w: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    """Yield views [r, N] of w [..., N], in order, of about `count` weights each (at least one row)."""
    if w.dtype.name == "bfloat16":  # ml_dtypes' type, which NumPy computes with one element at a time
        w = w.view(np.uint16)
    step = max(1, count // w.shape[-1])
    if w.ndim < 3 or w.flags.c_contiguous:
        w = w.reshape(-1, w.shape[-1])
        yield from (w[start : start + step] for start in range(0, len(w), step))
    else:
        for part in w:
            yield from row_pieces(part, count)


def bf16_down(x: F32) -> F32:
    """Return the largest bf16 value not above x, as float32."""
    bits = x.view(np.uint32)
    outward = np.where(np.signbit(x), np.uint32(0xFFFF), np.uint32(0))
    return ((bits + outward) & np.uint32(0xFFFF0000)).view(np.float32)


def symmetric_biases(scales: NDArray[Any], bits: int) -> U16 | F16:
    """Return -2^(bits-1)·scale in the scales' width: only sign and exponent change, so it is exact short of overflow.

    float16 overflows early, above 511 for 8 bits and 8188 for 4; the bias is infinite then.
    """
    with np.errstate(over="ignore"):
        wide = widen(scales) * np.float32(-(1 << (bits - 1)))
        return wide.astype(np.float16) if scales.dtype == np.float16 else to_bf16(wide)


def pack_blocks(codes: U32, words: U32, bits: int) -> None:
    """Write codes [blocks, PERIOD, n] into words [blocks, PERIOD·bits/32, n]; n is whatever shares a layout."""
    for i in range(codes.shape[1]):
        word, shift = divmod(i * bits, 32)
        if shift == 0:
            words[:, word] = codes[:, i]
        else:
            words[:, word] |= codes[:, i] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] = codes[:, i] >> np.uint32(32 - shift)


def pack(codes: NDArray[np.integer[Any]], bits: int) -> U32:
    """Return codes [..., N], each below 2^bits, as MLX's little-endian bit stream: uint32 [..., N·bits/32].

    Raises DgemmaError for a code that does not fit or a row that does not fill its words.
    """
    width, period = codes.shape[-1], _period(bits)
    if width % period:
        raise DgemmaError(f"{width} codes of {bits} bits do not fill whole words; a row takes a multiple of {period}")
    if codes.size and (codes.max() >= 1 << bits or codes.min() < 0):
        raise DgemmaError(f"a code outside 0 … {(1 << bits) - 1} does not fit in {bits} bits")
    blocks = codes.astype(np.uint32).reshape(-1, period, 1)
    words = np.empty((len(blocks), period * bits // 32, 1), np.uint32)
    pack_blocks(blocks, words, bits)
    return words.reshape(*codes.shape[:-1], width * bits // 32)


def unpack(words: U32, bits: int) -> U8:
    """Return the codes of a bit stream: uint32 [..., N·bits/32] -> uint8 [..., N]. The inverse of `pack`."""
    period = _period(bits)
    per = period * bits // 32
    if words.shape[-1] % per:
        raise DgemmaError(
            f"a row of {words.shape[-1]} words holds no whole number of {bits}-bit codes ({per} words each)"
        )
    source = words.reshape(-1, per)
    out = np.empty((len(source), period), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = source[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= source[:, word + 1] << np.uint32(32 - shift)
        code &= mask
        out[:, i] = code
    return out.reshape(*words.shape[:-1], words.shape[-1] // per * period)


def _period(bits: int) -> int:
    if bits not in PERIOD:
        raise DgemmaError(f"codes have {', '.join(map(str, PERIOD))} bits, not {bits!r}")
    return PERIOD[bits]


def _e4m3() -> F32:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10)).astype(np.float32)
    value[127] = np.nan
    return np.concatenate([value, -value])


def _e8m0() -> F32:
    with np.errstate(over="ignore"):
        return np.ldexp(np.ones(256, np.float32), np.arange(256) - 127)


E2M1: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3: F32 = _e4m3()
E8M0: F32 = _e8m0()  # 255 is NaN in the OCP specification and infinity in MLX; as in MLX here, and `carry` refuses it
