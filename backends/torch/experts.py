"""The experts of one layer: rows sorted by expert, one matrix product for each expert that is hit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from . import blocks
from .blocks import Weight, whole
from .packed import Workspace

Tensor = torch.Tensor

_ROOM = 16
"""Padded rows per expert are a multiple of this, the width of a vector of float32."""

_PADDING = 2.0
"""In low precision experts run in one batched product where, padded to the busiest, they hold at most so many times the
rows: twice as fast. Otherwise one by one, and only those that are hit; in float32 that is never slower."""

_CURVE = 2 * math.sqrt(2 / math.pi)


def gelu_times(gate: Tensor, up: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return gelu_tanh(gate) · up · scale, computed wide and rounded once."""
    if gate.device.type != "cpu":
        wide = gate.float() if gate.dtype != torch.float64 else gate
        return (F.gelu(wide, approximate="tanh") * up * scale).to(gate.dtype)
    # ½(1 + tanh z) is sigmoid(2z), and in place this is faster than torch's own kernel.
    wide = gate.float() if gate.dtype in (torch.bfloat16, torch.float16) else gate
    curve = (wide * wide).mul_(0.044715 * _CURVE).add_(_CURVE).mul_(wide).sigmoid_()
    curve = curve.mul_(wide).mul_(up)
    return (curve if isinstance(scale, float) else curve.mul_(scale)).to(gate.dtype)


def expert_mlp(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Weight, down: Weight, workspace: Workspace | None = None
) -> Tensor:
    """Run every row through its experts and add up the results.

    x [N, D], index int [N, k], weights wide [N, k], gate_up [E, 2F, D], down [E, D, F] → [N, D].
    """
    if x.device.type == "cuda" and _grouped_fits(x, gate_up, down):
        # Nearly all experts are hit by a canvas, and to ask which would wait for the device.
        return _grouped(x, index, weights, whole(gate_up, x.dtype), whole(down, x.dtype))
    return _sorted_experts(x, index, weights, gate_up, down, workspace or Workspace())


def _grouped_fits(x: Tensor, gate_up: Weight, down: Weight) -> bool:
    """Whether CUDA's grouped matmul takes these: bfloat16, rows of whole 16 bytes, and a card that has it."""
    whole_rows = all(size % 8 == 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
    return x.dtype == torch.bfloat16 and whole_rows and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _grouped(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All on the device: group ends are a tensor, and nothing is read back."""
    rows, k = index.shape
    chosen, order = index.reshape(-1).sort(stable=True)
    experts = torch.arange(gate_up.shape[0], device=x.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, experts, right=True).int()
    gate, up = F.grouped_mm(x[order // k], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    hidden = gelu_times(gate, up, weights.reshape(-1)[order, None])
    out = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    return in_order(out, order, rows, weights.dtype).to(x.dtype)


def in_order(out: Tensor, order: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Sum each row's results in the order of its choices; index_add_ on CUDA would add in any.

    out [N·k, D], of the pairs row·k + choice that `order` int64 [N·k] names → [N, D] in a dtype.
    """
    back = torch.empty_like(out).index_copy_(0, order, out)
    return back.view(rows, -1, out.shape[1]).sum(1, dtype=dtype)


def _sorted_experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Weight, down: Weight, workspace: Workspace
) -> Tensor:  # fmt: skip
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    token, shares = order // index.shape[1], weights.reshape(-1).index_select(0, order)
    counts = torch.bincount(chosen, minlength=gate_up.shape[0])
    rows = x.index_select(0, token)
    room = -(-int(counts.max()) // _ROOM) * _ROOM
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dtype == down.dtype == x.dtype):
        out = _block_by_block(rows, shares, counts.tolist(), gate_up, down, workspace)
    elif x.element_size() == 2 and room * len(counts) <= _PADDING * len(token):
        first = torch.arange(len(counts), device=x.device) * room - (counts.cumsum(0) - counts)
        place = torch.arange(len(token), device=x.device) + first.index_select(0, chosen.index_select(0, order))
        out = _together(rows, shares, place, room, gate_up, down)
    else:
        out = _one_by_one(rows, shares, counts.tolist(), gate_up, down)
    if x.device.type != "cpu":
        return in_order(out, order, len(x), weights.dtype).to(x.dtype)
    result = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    return result.index_add_(0, token, out.to(weights.dtype)).to(x.dtype)


# In all three, the matrix stands on the left and rows are columns: with few rows, BLAS libraries are up to twice as
# fast so.


def _together(rows: Tensor, shares: Tensor, place: Tensor, room: int, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two batched products, each expert's rows padded to `room`; place int [N·k] is where each row goes."""
    count, width = gate_up.shape[0], rows.shape[1]
    padded = rows.new_zeros(count * room, width).index_copy_(0, place, rows).view(count, room, width)
    gate, up = torch.bmm(gate_up, padded.transpose(1, 2)).chunk(2, 1)  # [E, F, room]
    scale = shares.new_zeros(count * room).index_copy_(0, place, shares).view(count, 1, room)
    out = torch.bmm(down, gelu_times(gate, up, scale))  # [E, D, room]
    return out.transpose(1, 2).reshape(-1, width).index_select(0, place)


def _one_by_one(rows: Tensor, shares: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
    """Two products for each expert that is hit; counts are rows per expert."""
    hit = [expert for expert, count in enumerate(counts) if count]
    runs = [count for count in counts if count]
    both = rows.new_empty(gate_up.shape[1], len(rows))  # [2F, N·k]
    for expert, run, out in zip(hit, rows.split(runs), both.split(runs, 1), strict=True):
        torch.mm(gate_up[expert], run.T, out=out)
    gate, up = both.chunk(2)
    hidden = gelu_times(gate, up, shares)
    result = rows.new_empty(len(rows), down.shape[1])  # written in place: a transposed copy would cost a tenth
    for expert, run, out in zip(hit, hidden.split(runs, 1), result.split(runs), strict=True):
        torch.mm(run.T, down[expert].T, out=out)
    return result


def _block_by_block(
    rows: Tensor, shares: Tensor, counts: list[int], gate_up: Weight, down: Weight, workspace: Workspace
) -> Tensor:  # fmt: skip
    """`_one_by_one` of experts that are packed, or narrower than x: those that are hit are dequantized or widened in
    turn, in one buffer."""
    both = rows.new_empty(gate_up.shape[1], len(rows))  # [2F, N·k]
    for matrix, part, run in _blocks_and_runs(gate_up, rows.dtype, counts, workspace):
        torch.mm(matrix, rows[run].T, out=both[part, run])
    gate, up = both.chunk(2)
    hidden = gelu_times(gate, up, shares)
    out = rows.new_empty(down.shape[1], len(rows))  # [D, N·k]
    for matrix, part, run in _blocks_and_runs(down, rows.dtype, counts, workspace):
        torch.mm(matrix, hidden[:, run], out=out[part, run])
    return out.T.contiguous()


def _blocks_and_runs(
    weight: Weight, dtype: torch.dtype, counts: list[int], workspace: Workspace
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yield blocks [r, N] of the experts' matrices [E, R, N]: which of the R rows, and which columns of x it meets."""
    height, width = weight.shape[1:]
    room = blocks.WIDENED if isinstance(weight, Tensor) else blocks.BLOCK
    together = max(1, room // (height * width))  # small experts, neighbours that are all hit
    start, expert = 0, 0
    while expert < len(counts):
        stop = expert + 1
        if not counts[expert]:
            expert = stop
            continue
        while stop < min(expert + together, len(counts)) and counts[stop]:
            stop += 1
        if stop == expert + 1:
            run = slice(start, start + counts[expert])
            for part, matrix in blocks.blocks(weight[expert], dtype, workspace):
                yield matrix, part, run
            start = run.stop
        else:
            several = weight[expert:stop]
            flat = several.flatten(0, 1) if isinstance(several, Tensor) else several.rows()
            ((_, matrices),) = blocks.blocks(flat, dtype, workspace)
            for i, matrix in enumerate(matrices.split(height)):
                run = slice(start, start + counts[expert + i])
                yield matrix, slice(0, height), run
                start = run.stop
        expert = stop
