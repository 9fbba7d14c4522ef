"""How much memory this process has held, and which weights are held as they are stored."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import ModelConfig
from .errors import DgemmaError

WIDENED_ONCE = 1 << 20
"""Weights of a tensor, up to which torch on the CPU widens one when it is loaded; see `stays_narrow`."""


def stays_narrow(shape: Sequence[int]) -> bool:
    """Whether torch on the CPU, computing in float32, holds a weight stored in 16 bits as it is, and widens it in use.

    Small ones cost more in calls, every pass, than they save in memory.
    """
    return len(shape) > 1 and math.prod(shape) > WIDENED_ONCE


def check_room(config: ModelConfig, tokens: int, scratch: int, width: int) -> None:
    """Refuse a cache of so many tokens, elements of `width` bytes, that this machine could never hold.

    Raises:
        DgemmaError: with the numbers.
    """
    import psutil

    needed = cache_bytes(config, tokens, width, scratch=scratch)
    total = psutil.virtual_memory().total
    if needed > total:
        raise DgemmaError(
            f"a cache of {tokens:,} tokens takes {needed / 1e9:.1f} GB and this machine has {total / 1e9:.1f} GB of "
            "memory; give a smaller max_new_tokens, or a shorter prompt"
        )


def peak_memory() -> int:
    """Return the process's peak resident size in bytes."""
    try:
        # getrusage's figure survives exec on Linux: a child would report the peak of whoever started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows has no getrusage; psutil keeps the same figure there
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def cache_bytes(config: ModelConfig, tokens: int, width: int, *, slots: int = 1, scratch: int = 0) -> int:
    """Return what a cache takes: `slots` sequences of so many tokens, elements of `width` bytes.

    Sliding layers hold no more than their window; `scratch` entries more in every layer are for what a pass lays down.
    """
    if not slots:
        return 0
    entries = 0
    for layer in config.layers:
        rows = tokens if layer.window is None else min(tokens, layer.window - 1)
        entries += 2 * layer.kv_heads * layer.head_dim * (rows + scratch)
    return entries * width * slots


def total() -> int:
    """Return the bytes of memory that this machine has."""
    import psutil

    return psutil.virtual_memory().total


def available() -> int:
    """Return the bytes of memory that this machine has free now."""
    import psutil

    return psutil.virtual_memory().available
