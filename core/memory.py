"""The account of bytes: of weights as they are held, of keys and values, and of this process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DgemmaError

if TYPE_CHECKING:
    from .config import AttentionConfig, ModelConfig
    from .ops import DType

WIDTH: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

WIDENED_ONCE = 1 << 20
"""Weights of a tensor, up to which torch on the CPU widens one when it is loaded; see `stays_narrow`."""


def stays_narrow(shape: Sequence[int]) -> bool:
    """Whether torch on the CPU, computing in float32, holds a weight stored in 16 bits as it is, and widens it in use.

    Small ones cost more in calls, every pass, than they save in memory.
    """
    return len(shape) > 1 and math.prod(shape) > WIDENED_ONCE


# ---- Weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What a model's weights are as they are stored."""

    parameters: int
    stored: DType
    """Width of most of what is not quantized."""
    floats: int
    """Parameters that are not quantized."""
    narrow: int
    """Of these, the ones in 16 bits whose width torch on the CPU leaves to the pass; see `stays_narrow`."""
    packed: float = 0.0
    """Bytes of those that are."""
    derived: float = 0.0
    """Bytes of the biases that MLX derives from symmetric scales, and holds."""


def held_bytes(weights: StoredWeights, backend: str, dtype: DType, *, gpu: bool = False) -> float:
    """Return the bytes of weights that a backend holds when it computes in a dtype.

    Quantized weights stay packed, as they are stored, and torch on the CPU leaves 16-bit ones as they are when it
    computes in float32; NumPy, the oracle, unpacks them. ONNX Runtime's sessions, one for each kind of pass, share what
    they map from a file; of weights in another width each makes a copy.
    """
    if backend == "numpy":
        return weights.parameters * WIDTH[dtype]
    if backend == "onnx" and weights.floats == weights.parameters and dtype != weights.stored:
        return 2 * weights.parameters * WIDTH[dtype]
    narrow = weights.narrow if backend == "torch" and dtype == "float32" and not gpu else 0
    derived = weights.derived if backend == "mlx" else 0
    return weights.floats * WIDTH[dtype] - 2 * narrow + weights.packed + derived


# ---- Keys and values ------------------------------------------------------------------------------------------


def cache_bytes(
    config: ModelConfig,
    tokens: int,
    width: int,
    *,
    slots: int = 1,
    scratch: int = 0,
    bucket: Callable[[int], int] = int,
) -> int:
    """Return the bytes of a cache of so many tokens, as `model.new_cache` makes it.

    Args:
        config: the model's sizes; a sliding layer has no more rows than its window.
        tokens: that are held.
        width: bytes of an element.
        slots: sequences side by side.
        scratch: rows behind those that are held, for what is being read or denoised.
        bucket: the length that a backend makes of a number of rows.
    """
    rows = (tokens if layer.window is None else min(tokens, layer.window - 1) for layer in config.layers)
    return sum(
        _row(layer, width) * slots * bucket(count + scratch) for layer, count in zip(config.layers, rows, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class CacheGrowth:
    """Bytes of a cache whose sliding layers are full: `fixed + per_token * tokens`."""

    fixed: int
    """Of the sliding layers, and of the full layers' scratch."""
    per_token: int
    """Of the full layers."""


def cache_growth(
    config: ModelConfig, width: int, *, slots: int = 1, scratch: int = 0, bucket: Callable[[int], int] = int
) -> CacheGrowth:
    """Return what a cache takes for each token, and without any; arguments as `cache_bytes`.

    `bucket` is of the sliding layers alone: rows of the full ones are the caller's to round.
    """
    fixed = per_token = 0
    for layer in config.layers:
        row = _row(layer, width) * slots
        if layer.window is None:
            fixed += row * scratch
            per_token += row
        else:
            fixed += row * bucket(layer.window - 1 + scratch)
    return CacheGrowth(fixed=fixed, per_token=per_token)


def _row(layer: AttentionConfig, width: int) -> int:
    """Bytes of one token's keys and values in a layer."""
    return 2 * width * layer.kv_heads * layer.head_dim


def check_room(config: ModelConfig, tokens: int, scratch: int, width: int) -> None:
    """Refuse a cache of so many tokens, elements of `width` bytes, that this machine could never hold.

    Raises:
        DgemmaError: with the numbers.
    """
    needed, there = cache_bytes(config, tokens, width, scratch=scratch), total()
    if needed > there:
        raise DgemmaError(
            f"a cache of {tokens:,} tokens takes {needed / 1e9:.1f} GB and this machine has {there / 1e9:.1f} GB of "
            "memory; give a smaller max_new_tokens, or a shorter prompt"
        )


def check_canvas(config: ModelConfig, length: int) -> None:
    """Refuse a canvas that the context has no room for, or whose acceptance, which weighs all pairs of positions, would
    take more than this machine has.

    Raises:
        DgemmaError: with the numbers.
    """
    if length > config.max_positions:
        raise DgemmaError(
            f"canvas_length is {length:,} and the model's context is {config.max_positions:,} tokens; give fewer"
        )
    if (needed := 8 * length * length) > total():
        raise DgemmaError(
            f"a canvas of {length:,} positions takes {needed / 1e9:.1f} GB to denoise and this machine has "
            f"{total() / 1e9:.1f} GB of memory; give a smaller canvas_length"
        )


# ---- Machine and process ----------------------------------------------------------------------------------------


def total() -> int:
    """Return the bytes of memory that this machine has."""
    import psutil

    return psutil.virtual_memory().total


def available() -> int:
    """Return the bytes of memory that this machine has free now."""
    import psutil

    return psutil.virtual_memory().available


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
