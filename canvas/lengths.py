"""How long an open hole is: each length is looked at once, and that one is taken at which the held text is likeliest.

    prompt  |  noise (k)  held text behind the hole  noise …

One pass over a canvas whose hole is all noise. What is said of the hole is of no use there, and the model's certainty
of a finished filling says as little: one of the wrong length may be sure of itself. But the text behind a hole of the
wrong length stands in the wrong place, and the model finds it less likely. All lengths are looked at in few passes,
since their canvases share them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.canvas import FREE
from ..core.sampler import first_canvas
from .reader import Look, Reader

MOST = 32
"""Lengths that are looked at: what shares a pass."""


def spread(room: int, most: int = MOST) -> list[int]:
    """Return lengths to be looked at: all up to `most`; of more, the first half of them one by one, then further and
    further apart, the largest included."""
    if room <= most:
        return list(range(1, room + 1))
    near = most // 2
    far = np.geomspace(near + 1, room, most - near).round().astype(int)
    return sorted({*range(1, near + 1), *far.tolist()})


def likeliest(
    reader: Reader, prompt: Sequence[int], before: Sequence[int], behind: Sequence[int], lengths: Sequence[int], *,
    size: int, seed: int,
) -> int | None:  # fmt: skip
    """Return the length at which what is behind a hole is likeliest; None where nothing can tell them apart.

    before, behind: what the canvas of `size` positions holds left and right of the hole, `FREE` for noise. Of what is
    behind, as much is looked at as has room with every length.
    """
    lengths = [length for length in lengths if len(before) + length < size]
    if not lengths:
        return None
    behind = behind[: size - len(before) - max(lengths)]
    places = [i for i, token in enumerate(behind) if token != FREE]
    if not places or len(lengths) == 1:
        return lengths[0] if places else None
    noise = first_canvas(seed, 0, size, reader.engine.passes.config.vocab_size)
    tokens = sorted({behind[i] for i in places})
    column = np.searchsorted(tokens, [behind[i] for i in places])
    looks = []
    for length in lengths:
        start = len(before) + length
        given = np.full(size, FREE, np.int32)
        given[: len(before)] = before
        given[start : start + len(behind)] = behind
        canvas = np.where(given == FREE, noise, given).astype(np.int32)
        looks.append(Look(prompt=tuple(prompt), canvas=canvas, at=tuple(start + i for i in places)))
    found = [one.log_p[np.arange(len(places)), column].mean() for one in reader.scores(looks, tokens)]
    return lengths[int(np.argmax(found))]
