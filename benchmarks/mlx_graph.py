"""Count what MLX would run: the primitives of a lazy graph, before it is evaluated.

Imported by both sides of `vs_mlx_vlm.py`, and so by nothing but MLX itself.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

import mlx.core as mx

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Primitives that as a rule move no data."""


def count(*arrays: mx.array) -> dict[str, Any]:
    """Count the primitives that arrays wait for; a fused kernel, whatever it fuses, is one.

    Returns:
        `primitives`: all of them; `kernels`: all but views; `by_name`, with fused ones as "Compiled".
    """
    file = io.StringIO()
    mx.export_to_dot(file, *arrays)
    names = Counter(
        "Compiled" if name.startswith("Compiled") else name
        for name in re.findall(r'label ="(\w+)", shape=rectangle', file.getvalue())
    )
    return {
        "primitives": names.total(),
        "kernels": sum(n for name, n in names.items() if name not in VIEWS),
        "by_name": dict(names.most_common()),
    }


def stand_in_for_metal() -> None:
    """Make each function of `mx.fast` that the model calls one opaque primitive, as it is on Metal (and a view).

    On the CPU they fall back to plain primitives at once, so that Metal's graph cannot be seen there. A running sum
    takes their place: one primitive of the right shape that no compiler fuses. Only the count means anything then.
    """

    def norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return mx.cumsum(x, -1)

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.cumsum(x, -1)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
        inputs = [k, v, mask] if isinstance(mask, mx.array) else [k, v]
        return mx.depends([mx.cumsum(q, -1)], inputs)[0]

    mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention = norm, rope, attention
