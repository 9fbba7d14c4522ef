"""Arithmetic with weights that are stored in another form than they are multiplied in.

A weight may be packed, or dense and narrower than x: bfloat16 as the file has it, where this processor multiplies
float32 (`processor.py`). A block of its rows is dequantized or widened into a buffer, used, and forgotten.

That happens once a pass, whatever the rows of x: reading 256 rows of a canvas with a weight costs several times as
much. Blocks are long enough for the matrix product and filled in pieces that stay in a processor's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .packed import QuantizedTensor, Workspace, dequantize_into

Tensor = torch.Tensor
Weight = Tensor | QuantizedTensor

BLOCK = 1 << 21
"""Weights dequantized for one matrix product on the CPU. Rows of 2816 still make blocks of 700, which is where the
product, with 256 rows of x, is as fast as with the whole weight."""

WIDENED = 1 << 19
"""Dense weights widened for one matrix product: the product finds them in a second-level cache."""

PIECE = 1 << 19
"""Weights dequantized at a time on the CPU, 2 MB of float32: the passes over them stay in a second-level cache."""

CUDA_BLOCK = 1 << 25
"""Both, on other devices."""


def ready(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a weight can be multiplied as it is held."""
    return isinstance(weight, Tensor) and weight.dtype == dtype


def blocks(weight: Weight, dtype: torch.dtype, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight [R, N] in order, in a dtype; each block is gone when the next one comes.

    A dense weight of that dtype is one block, as it is.
    """
    count, width = weight.shape
    if isinstance(weight, Tensor):
        if weight.dtype == dtype:
            yield slice(0, count), weight
            return
        for rows in _cut(count, width, WIDENED):
            out = workspace.take("block", (rows.stop - rows.start, width), dtype, weight.device)
            yield rows, out.copy_(weight[rows])
        return
    on_cpu = weight.device.type == "cpu"
    for rows in _cut(count, width, BLOCK if on_cpu else CUDA_BLOCK):
        out = workspace.take("block", (rows.stop - rows.start, width), dtype, weight.device)
        for piece in _cut(len(out), width, PIECE if on_cpu else CUDA_BLOCK):
            part = weight[rows.start + piece.start : rows.start + piece.stop]
            dequantize_into(out[piece], part, workspace)
        yield rows, out


def _cut(count: int, width: int, size: int) -> Iterator[slice]:
    """Cut rows of a width into slices of about equal length, at most `size` weights each."""
    parts = max(1, -(-count * width // size))
    rows = max(1, -(-count // parts))
    return (slice(start, min(count, start + rows)) for start in range(0, count, rows))


def linear(
    x: Tensor, weight: Weight, workspace: Workspace, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return scale · x [..., N] · weightᵀ, weight [F, N] → [..., F], in the width of x; `out` is [R, F]."""
    if out is None:
        out = x.new_empty(x.numel() // x.shape[-1], weight.shape[0])
    flat, nothing = x.reshape(-1, x.shape[-1]), x.new_zeros(1)
    for rows, block in blocks(weight, x.dtype, workspace):
        torch.addmm(nothing, flat, block.T, beta=0, alpha=scale, out=out[:, rows])
    return out.view(*x.shape[:-1], -1)


def mix(shares: Tensor, weight: Weight, workspace: Workspace, *, into: Tensor | None = None) -> Tensor:
    """Return shares [R, V] · weight [V, N], summed over blocks in float32, or float64 → [R, N].

    `into` is what the sum starts from, and where it goes.
    """
    wide = torch.float64 if shares.dtype == torch.float64 else torch.float32
    total = shares.new_zeros(len(shares), weight.shape[1], dtype=wide) if into is None else into
    for rows, block in blocks(weight, shares.dtype, workspace):
        if shares.dtype == total.dtype:
            total.addmm_(shares[:, rows], block)
        else:
            total += shares[:, rows] @ block
    return total


def whole(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return all of a weight [..., N], dequantized in blocks where it is packed."""
    if isinstance(weight, Tensor):
        return weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    target, rows, workspace = out.flatten(0, -2), weight.rows(), Workspace()
    for piece in _cut(len(target), target.shape[1], PIECE if weight.device.type == "cpu" else CUDA_BLOCK):
        dequantize_into(target[piece], rows[piece], workspace)
    return out
