"""What config.json says of quantized weights that their tensors do not tell.

Widths, groups and kinds of scales are read from the tensors themselves. Left are the blocks of float8, whether codes
have zero points, and rotations: weights that were stored in another basis than they are multiplied in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import DgemmaError, quoted

_BLOCK = (128, 128)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The part of a `quantization_config` that bears on what codes mean."""

    block: tuple[int, int]
    """Rows and columns that a float8 scale is for."""
    asymmetric: frozenset[int]
    """Widths of integers, in bits, that have zero points wherever they are used."""


def read(data: Mapping[str, Any]) -> Declared:
    """Read a config.json, or what else there is of it; defaults where it says nothing.

    Raises:
        DgemmaError: blocks that are no two sizes, or weights that are rotated while the model runs.
    """
    outer = data.get("quantization_config")
    outer = outer if isinstance(outer, Mapping) else {}
    transforms = outer.get("transform_config")
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups") not in (None, {})):
        raise DgemmaError("config.json: transform_config declares rotated weights, which cannot be read; convert the "
                          "bf16 original, or a copy quantized without it")  # fmt: skip
    groups = list(_groups(outer))
    blocks = (outer.get("weight_block_size"), *(one.get("block_structure") for one in groups))
    block = next((_block(one) for one in blocks if one is not None), _BLOCK)
    integers = [one for one in groups if one.get("type", "int") == "int"]
    signs: dict[Any, set[bool]] = {}
    for one in integers:
        if type(one.get("num_bits")) is int:
            signs.setdefault(one["num_bits"], set()).add(one.get("symmetric") is False)
    return Declared(block=block, asymmetric=frozenset(bits for bits, found in signs.items() if found == {True}))


def _groups(outer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what compressed-tensors' groups of modules say of weights."""
    groups = outer.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _block(block: Any) -> tuple[int, int]:
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in block):
        return block[0], block[1]
    raise DgemmaError(f"config.json: the block of float8 scales is {quoted(block, 40)}, expected two sizes")
