"""Launch sizes of the vocabulary head, by card."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Launch sizes of the two products."""

    rows: int
    tokens: int
    """Of a tile: it divides 512, the block of the draw."""
    depth: int
    warps: int
    stages: int
    mean_rows: int
    mean_width: int
    mean_depth: int
    """Tokens at a time: divides `tokens`."""
    mean_warps: int
    mean_stages: int
    programs: int = 132
    """What the list of tiles is split for in `_mean`: programs that run at once on the whole card."""
    chunk: int = 256
    """Rows at a time: bounds the buffer of masses."""


TILINGS: dict[str, Tiling] = {
    "sm_80": Tiling(rows=128, tokens=128, depth=64, warps=8, stages=3,
                    mean_rows=128, mean_width=128, mean_depth=64, mean_warps=8, mean_stages=2, programs=108),
    "sm_89": Tiling(rows=128, tokens=128, depth=64, warps=8, stages=3,
                    mean_rows=128, mean_width=128, mean_depth=32, mean_warps=8, mean_stages=3, programs=128),
    "sm_90": Tiling(rows=256, tokens=128, depth=64, warps=8, stages=3,
                    mean_rows=256, mean_width=128, mean_depth=64, mean_warps=8, mean_stages=3, programs=132),
    "sm_100": Tiling(rows=128, tokens=128, depth=64, warps=8, stages=3,
                     mean_rows=128, mean_width=128, mean_depth=64, mean_warps=8, mean_stages=3, programs=148),
}  # fmt: skip
EXACT = Tiling(rows=32, tokens=128, depth=32, warps=8, stages=1,
               mean_rows=32, mean_width=64, mean_depth=32, mean_warps=8, mean_stages=1, chunk=32)  # fmt: skip
"""float32: without tensor cores, for comparisons and not for speed."""


def tiling(arch: str, dtype: torch.dtype) -> Tiling:
    return EXACT if dtype == torch.float32 else TILINGS[arch]
