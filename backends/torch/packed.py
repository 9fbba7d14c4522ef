"""Quantized weights as torch holds them: the file's own bytes, and what they mean.

The definition is checkpoints/quant.py's and the result is its, bit for bit: scale·q + bias in float32, rounded once to
the dtype asked for. Nothing here waits for the device, so that CUDA graphs can capture it. How a model computes with
such weights is in `blocks.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...checkpoints.quant import Format, QTensor
from ...checkpoints.quant_bits import PERIOD

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A quantized weight [..., N] on a device, packed as the file has it; `QTensor` in torch's types."""

    words: Tensor  # int32 [..., N·bits/32]: a little-endian bit stream along N. On the CPU a view of the memory map
    scales: Tensor  # [..., N/group_size]: bfloat16 or float16 (affine), uint8 (E8M0: mxfp4 and mxfp8, E4M3: nvfp4)
    biases: Tensor | None  # as wide as the scales; None where symmetric (-2^(bits-1)·scale) and in the float modes
    global_scale: Tensor | None  # nvfp4: float32, 0-d or [..., 1] with one for each row; None for 1
    format: Format

    @classmethod
    def from_host(cls, q: QTensor, device: torch.device | str = "cpu") -> QuantizedTensor:
        """Bring a stored tensor to a device; on the CPU nothing is copied."""
        factor = None if q.global_scale is None else from_numpy(np.asarray(q.global_scale))
        return cls(
            words=from_numpy(q.words).to(device),
            scales=as_scales(from_numpy(q.scales)).to(device),
            biases=None if q.biases is None else as_scales(from_numpy(q.biases)).to(device),
            global_scale=None if factor is None else factor.to(device),
            format=q.format,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [..., N]."""
        return (*self.words.shape[:-1], self.words.shape[-1] * 32 // self.format.bits)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def parts(self) -> list[Tensor | None]:
        """Words, scales, biases and global scale."""
        return [self.words, self.scales, self.biases, self.global_scale]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Index the first axis as torch does: an expert, a slice of rows (views), rows by number (a copy)."""
        factor = self.global_scale
        return QuantizedTensor(
            words=self.words[index],
            scales=self.scales[index],
            biases=None if self.biases is None else self.biases[index],
            global_scale=factor if factor is None or factor.ndim == 0 else factor[index],
            format=self.format,
        )

    def rows(self) -> QuantizedTensor:
        """Return a view with all axes before N as one, [R, N]."""
        factor = self.global_scale
        return QuantizedTensor(
            words=self.words.flatten(0, -2),
            scales=self.scales.flatten(0, -2),
            biases=None if self.biases is None else self.biases.flatten(0, -2),
            global_scale=factor if factor is None or factor.ndim == 0 else factor.flatten(0, -2),
            format=self.format,
        )


def as_scales(tensor: Tensor) -> Tensor:
    """View the bits of bf16 scales or biases, which come as integers, as what they are; others are so already."""
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def from_numpy(array: np.ndarray) -> Tensor:
    """View a stored array, read-only or not; bfloat16 as such, and unsigned words as integers of their width."""
    low = array.dtype.name == "bfloat16"  # torch cannot read ml_dtypes' bfloat16; its bits are the same
    signed = np.int16 if low else {"uint16": np.int16, "uint32": np.int32}.get(array.dtype.name)
    with warnings.catch_warnings():
        # torch has no read-only tensors, and maps of files larger than memory are read-only. Nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        tensor = torch.from_numpy(array if signed is None else array.view(signed))
    return tensor.view(torch.bfloat16) if low else tensor


class Workspace:
    """Buffers by name, kept from call to call: memory fresh from the kernel is cleared page by page, which costs more
    time than most of the arithmetic on it. Where nothing is kept, each is new."""

    def __init__(self, *, keep: bool = True) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] | None = {} if keep else None

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of a shape, with anything in it; valid until the next `take` of that name."""
        if self._kept is None:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        size = math.prod(shape)
        kept = self._kept.get((name, dtype, device))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(tuple(shape))


INLINE = 1 << 15
"""Elements that torch works on in the thread that asks; with more it calls OpenMP's workers."""


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, without a call of OpenMP's workers: they are for the engine's thread alone."""
    if x.dtype == dtype:
        return x
    made = torch.empty(x.shape, dtype=dtype)
    source, target = x.reshape(-1), made.view(-1)
    for start in range(0, len(source), INLINE):
        target[start : start + INLINE] = source[start : start + INLINE]
    return made


def dequantize(part: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [..., N] that a tensor, or a part of one, means; bit for bit those of `quant.dequantize`.

    Computed in float32 and rounded once; see the definition at the top of checkpoints/quant.py.
    """
    out = torch.empty(part.shape, dtype=dtype, device=part.device)
    return dequantize_into(out, part, Workspace(keep=False), exact=True)


def dequantize_into(out: Tensor, part: QuantizedTensor, workspace: Workspace, *, exact: bool = False) -> Tensor:
    """`dequantize` into contiguous [..., N].

    Unless `exact`, symmetric codes are centred before they are scaled, not after: the same values, without a pass over
    floats, but for the signs of zeros, and for weights beyond 2^125, which may be infinite instead of NaN.
    """
    value = out if out.dtype == torch.float32 else workspace.take("float32", out.shape, torch.float32, out.device)
    kind = part.format
    groups = value.unflatten(-1, (-1, kind.group_size))
    if kind.mode == "affine":
        middle = 1 << (kind.bits - 1)
        _integers(workspace, part.words, kind.bits, 0 if exact or part.biases is not None else middle, value)
        scale = part.scales.float()[..., None]
        groups.mul_(scale)  # exact, which leaves one rounding
        if part.biases is not None:
            groups.add_(part.biases.float()[..., None])
        elif exact:
            groups.sub_(scale * middle)
    else:
        (_e4m3 if kind.bits == 8 else _e2m1)(workspace, part.words, value)
        scale = part.scales.view(torch.float8_e4m3fn).float() if kind.mode == "nvfp4" else _e8m0(part.scales)
        if part.global_scale is not None:
            scale = scale * part.global_scale
        groups.mul_(scale[..., None])
    return value if value is out else out.copy_(value)


def _integers(workspace: Workspace, words: Tensor, bits: int, zero_point: int, out: Tensor) -> None:
    """Write codes minus a zero point of 0 or 2^(bits-1) as floats: int32 [..., N·bits/32] → [..., N]."""
    # A pass over bytes costs the least: codes are moved and centred as such, and widened last.
    mask, device = (1 << bits) - 1, words.device
    if bits == 8:
        codes = words.view(torch.uint8)
        if zero_point:
            codes = torch.bitwise_xor(codes, 0x80, out=workspace.take("codes", codes.shape, torch.uint8, device))
        out.copy_(codes.view(torch.int8) if zero_point else codes)
    elif bits == 4:
        pairs = words.view(torch.uint8)
        wide, other = (workspace.take(name, pairs.shape, torch.int16, device) for name in ("pairs", "codes"))
        wide.copy_(pairs)
        torch.bitwise_left_shift(wide, 4, out=other)
        codes = other.bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.int8)
        out.copy_(codes.sub_(zero_point) if zero_point else codes)
    elif bits == 2:
        several = words.view(torch.int8)
        one = workspace.take("codes", several.shape, torch.int8, device)
        for i in range(4):
            torch.bitwise_right_shift(several, 2 * i, out=one)
            out[..., i::4].copy_(one.bitwise_and_(mask).sub_(zero_point))
    else:
        period, words = PERIOD[bits], words.reshape(-1, PERIOD[bits] * bits // 32)
        planes = workspace.take("planes", words.shape[::-1], torch.int32, device).copy_(words.T)
        codes = workspace.take("codes", (period, len(words)), torch.int32, device)
        for i, code in enumerate(codes):
            word, shift = divmod(i * bits, 32)
            torch.bitwise_right_shift(planes[word], shift, out=code)
            if over := max(0, shift + bits - 32):  # it crosses into the next word; >> has copied the sign
                code.bitwise_and_(mask >> over).bitwise_or_(planes[word + 1] << (bits - over))
            code.bitwise_and_(mask).sub_(zero_point)
        out.view(-1, period).copy_(codes.T)


# Small floats are float16 with an exponent field cut short: shifted into place they are too small by a power of two,
# and exact, subnormals included. torch's own conversions are slower by far on the CPU, or do not exist.


def _e2m1(workspace: Workspace, words: Tensor, out: Tensor) -> None:
    """Write 4-bit floats, 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives: int32 [..., N/8] → [..., N]."""
    pairs = words.view(torch.int8)
    half = workspace.take("codes", pairs.shape, torch.int16, words.device)
    for i in range(2):
        half.copy_(pairs)
        if i == 0:
            half.bitwise_left_shift_(4)
        # S EE M of float16's S EEEEE M…: the sign, copied into the empty bits between, is cleared there.
        half.bitwise_left_shift_(8).bitwise_right_shift_(3).bitwise_and_(-0x8000 | 0x0E00)
        out[..., i::2].copy_(half.view(torch.float16))
    out.mul_(2.0**14)


def _e4m3(workspace: Workspace, words: Tensor, out: Tensor) -> None:
    """Write 8-bit floats: int32 [..., N/4] → [..., N]."""
    if words.device.type != "cpu":
        out.copy_(words.view(torch.float8_e4m3fn))
        return
    half = workspace.take("codes", out.shape, torch.int16, words.device)
    half.copy_(words.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(-0x8000 | 0x3FFF)
    # All ones are NaN. In float16 the exponent's top bit, so far empty, makes them so: one more carries there.
    half.bitwise_or_((half + 0x80).bitwise_and_(0x4000))
    out.copy_(half.view(torch.float16)).mul_(2.0**8)


def _e8m0(scales: Tensor) -> Tensor:
    """Return 2^(scale-127) as float32; 255 is infinity, as in MLX."""
    # A float32's exponent field as it stands, but for 2^-127, which is subnormal.
    wide = scales.to(torch.int32)
    return ((wide << 23) + (wide == 0).int() * (1 << 22)).view(torch.float32)
