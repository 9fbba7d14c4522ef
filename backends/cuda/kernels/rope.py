"""Norms of q, k and v, rotation, and the write of k and v into the cache: one launch behind the projections.

    q [B, L, H·A], k and v [B, L, K·A] → q [B, H, L, A]; k, v into entries `held` … `held` + L − 1 of slots [N, K, S, A]

A program takes a few heads of one position. On a full layer there is no v: the value is the raw k without its weight,
so the program that norms k writes both from one read, and the root mean square is computed once. Proportional RoPE
needs no case of its own: its zero frequencies come in as cos = 1, sin = 0.

    256 positions       reads + writes in bf16           at 3.35 TB/s
    sliding, 32 heads   4.2 + 4.2 MB, cos and sin 0.1    2.5 µs
    full, 18 heads      4.7 + 5.2 MB, cos and sin 0.3    3.1 µs

Arithmetic: about 10 operations for each element, 0.04 GFLOP. Computed in float32 and rounded once. Tolerance: the law;
in bf16 the error is below the oracle's, which rounds after the norm and in the rotation.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

HEADS = {256: 4, 512: 2}
"""Head width → heads in a program: 1,024 elements. Narrower heads take as many as 256."""

WARPS = 4


@triton.jit
def _halves(source, at, inside, half):
    """Load both halves of some heads, [HEADS, BLOCK] each: rotation pairs (i, i + A/2)."""
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(source + at + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed(a, b, half, eps):
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
    return a * scale, b * scale


@triton.jit
def _rotated(a, b, weight, cos, sin, column, inside, half):
    """Multiply by the norm's weight and rotate."""
    w_a = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    w_b = tl.load(weight + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    a, b = a * w_a, b * w_b
    return a * c - b * s, b * c + a * s


@triton.jit
def _keep(target, a, b, at, inside, half):
    tl.store(target + at, a.to(target.dtype.element_ty), mask=inside)
    tl.store(target + at + half, b.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _qkv(
    q, k, v, q_weight, k_weight, cos, sin, held_of, slots, q_out, k_out, v_out,
    length, heads, kv_heads, capacity, half, eps,
    q_stride, k_stride, v_stride, angle_batch, out_batch, out_head, out_row, kv_slot, kv_head, kv_row,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, place = token // length, token % length
    column = tl.arange(0, BLOCK)
    in_half = column < half
    cos += batch * angle_batch + place * half
    sin += batch * angle_batch + place * half
    q_parts, kv_parts = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & in_half[None, :]
        a, b = _halves(q, token * q_stride + (head * 2 * half)[:, None] + column[None, :], inside, half)
        a, b = _normed(a, b, half, eps)
        a, b = _rotated(a, b, q_weight, cos, sin, column, in_half, half)
        at = batch * out_batch + place * out_row + (head * out_head)[:, None] + column[None, :]
        _keep(q_out, a, b, at, inside, half)
    else:
        part -= q_parts
        entry, slot = place, batch
        if held_of is not None:
            entry += tl.load(held_of + batch)
        if slots is not None:
            slot = tl.load(slots + batch).to(tl.int64)
        head = (part % kv_parts) * HEADS + tl.arange(0, HEADS)
        inside = (head < kv_heads)[:, None] & in_half[None, :]
        # An entry beyond the slot is a caller's mistake; it must not become a write to other memory.
        held = inside & (entry < capacity)
        at = slot * kv_slot + entry * kv_row + (head * kv_head)[:, None] + column[None, :]
        if part < kv_parts:
            a, b = _halves(k, token * k_stride + (head * 2 * half)[:, None] + column[None, :], inside, half)
            a, b = _normed(a, b, half, eps)
            if v is None:
                _keep(v_out, a, b, at, held, half)
            a, b = _rotated(a, b, k_weight, cos, sin, column, in_half, half)
            _keep(k_out, a, b, at, held, half)
        elif v is not None:
            a, b = _halves(v, token * v_stride + (head * 2 * half)[:, None] + column[None, :], inside, half)
            a, b = _normed(a, b, half, eps)
            _keep(v_out, a, b, at, held, half)


def norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, held: Tensor | None, slots: Tensor | None = None, *, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """Norm and rotate projections, and write keys and values where they are to stand.

    Args:
        q, k, v: raw projections [B, L, H·A] and [B, L, K·A], each with its last axis dense (views of one product are
            welcome); v is None on full layers, whose value is the raw k.
        q_weight, k_weight: [A].
        cos, sin: [B or 1, 1, L, A/2], as in `core.parts.Rope`.
        keys, values: [N, K, S, A] of the same strides, last axis dense: the cache, or fresh tensors with S = L.
        held: int32 [B], the first entry to write in each row's slot; None for 0.
        slots: int32 [B], each row's slot; None where row b has slot b.
        heads: H.

    Returns:
        q [B, H, L, A], a view whose memory is [B, L, H, A].
    """
    batch, length, _ = q.shape
    kv_heads, capacity, width = keys.shape[1:]
    if keys.stride() != values.stride():
        raise ValueError(f"keys and values have different strides, {keys.stride()} and {values.stride()}")
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    per = HEADS.get(width, max(1, 256 // triton.next_power_of_2(width)))
    q_parts, kv_parts = triton.cdiv(heads, per), triton.cdiv(kv_heads, per)
    q, k, v = _dense(q), _dense(k), None if v is None else _dense(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    _qkv[(batch * length, q_parts + kv_parts * (1 if v is None else 2))](
        q, k, v, q_weight, k_weight, cos, sin, held if held is None else held.contiguous(), slots, out, keys, values,
        length, heads, kv_heads, capacity, width // 2, eps,
        q.stride(1), k.stride(1), k.stride(1) if v is None else v.stride(1),
        0 if cos.shape[0] == 1 else length * (width // 2),
        *out.stride()[:3], *keys.stride()[:3],
        HEADS=per, BLOCK=triton.next_power_of_2(width // 2), num_warps=WARPS,
    )  # fmt: skip
    return out


def _dense(x: Tensor) -> Tensor:
    """Return x [B, L, N] with its positions at one stride, whatever the sequence."""
    fits = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if fits and x.stride(2) == 1 else x.contiguous()
