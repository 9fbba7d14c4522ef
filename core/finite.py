"""Numbers that are none: NaN and infinity are looked for where it costs nothing, and refused with what to try."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import DgemmaError, quoted
from .primitives import DType

_REMEDIES = {
    "float32": "the weights are damaged: fetch or convert them again",
    "bfloat16": "try dtype float32; if it is the same there, the weights are damaged",
    "float16": "try dtype bfloat16 or float32, which hold larger numbers; or the weights are damaged",
}  # fmt: skip

FLOAT16_LIMIT = 65504.0


def check_results(results: np.ndarray, dtype: DType) -> None:
    """Refuse a pass that came to NaN or infinity: entropies, which every pass reads back, or logits.

    Raises:
        DgemmaError: with the dtype, and what to try.
    """
    if not np.isfinite(results).all():
        remedy = _REMEDIES.get(dtype, _REMEDIES["float32"])
        raise DgemmaError(f"a pass in {dtype} came to NaN or infinity; {remedy}")


def check_vector(name: str, tensor: Any, dtype: DType) -> None:
    """Refuse a norm's weight or a scalar that is no number.

    Matrices are not read for it, and need not be: what they spoil is NaN by the end of the pass. But infinity in the
    last norm is saturated by the soft cap and looks like certainty.

    Raises:
        DgemmaError: with the tensor's name.
    """
    if not isinstance(tensor, np.ndarray) or tensor.ndim > 1:
        return
    largest = np.abs(tensor.astype(np.float32)).max(initial=0.0)
    if not np.isfinite(largest):
        raise DgemmaError(f"{quoted(name)} holds NaN or infinity: the weights are damaged, fetch or convert them again")
    if dtype == "float16" and largest > FLOAT16_LIMIT:
        raise DgemmaError(
            f"{quoted(name)} holds {largest:.6g}, and float16 ends at 65,504: try dtype bfloat16 or float32"
        )


def scores(given: Any, shape: tuple[int, int], name: str = "previous_logits") -> np.ndarray:
    """Return logits that a caller gives, [L, V], as float32; -inf takes a token out.

    Raises:
        DgemmaError: another shape, no floats, NaN, +inf (as float32), or a position with every token out.
    """
    try:
        array = np.asarray(given)
    except (ValueError, TypeError):  # ragged, or of a framework's that is not on the host
        raise DgemmaError(f"{name} is {quoted(type(given).__name__)}, expected floats of shape {shape}") from None
    if array.shape != shape or (array.dtype.kind != "f" and array.dtype.name != "bfloat16"):
        raise DgemmaError(f"{name} is {array.dtype} {array.shape}, expected floats of shape {shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    # The maximum of a row is NaN where one is in it, and infinite where nothing but -inf is.
    spoilt = ~np.isfinite(array.max(-1))
    if spoilt.any():
        raise DgemmaError(
            f"{name} holds NaN, +inf or nothing but -inf at position {int(spoilt.argmax())} of the canvas"
        )
    return array
