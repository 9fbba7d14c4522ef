"""Host random numbers: what a denoising pass needs, as data.

No backend has a random generator. Each pass gets its uniforms and its renoise tokens from Philox (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), keyed by seed, canvas and step, so that the same seed gives the same
tokens on every backend whatever else runs beside it. Raw words are turned into numbers here, because NumPy promises
to keep Philox's bits but not its `Generator` methods.
"""

from __future__ import annotations

import numpy as np

from .errors import DgemmaError


def step_noise(*, seed: int, canvas: int, step: int, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one pass's random numbers.

    Step 0's tokens are the canvas that denoising starts from; step n's follow the n-th pass.

    Returns:
        uniforms float32 [length] in [0, 1), and tokens int32 [length] in [0, vocab_size).
    """
    if not 0 <= seed < 1 << 64:
        raise DgemmaError(f"seed is {seed}, expected an integer from 0 to 2^64 - 1")
    key = np.array([seed, (canvas << 32) | step], np.uint64)  # a list with a seed of 2^63 or more would pass by float64
    words = np.random.Philox(key=key).random_raw(2 * length)
    uniforms = (words[:length] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)  # 24 bits: exact in float32
    # Multiply-shift instead of a remainder; its bias is below vocab_size / 2^32.
    tokens = ((words[length:] >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)
    return uniforms, tokens.astype(np.int32)
