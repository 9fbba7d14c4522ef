"""What a checkpoint's weights take, counted from headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..core.config import ModelConfig
from ..core.memory import StoredWeights, stays_narrow
from ..core.ops import DType
from . import weights
from .quant import Format

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Size = tuple[Format | None, float, str]
"""How a weight is quantized, if it is; its bytes; and what a safetensors header calls its numbers."""

_WIDTHS: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def count(config: ModelConfig, sizes: Mapping[str, Size]) -> StoredWeights:
    """Add a model's weights up."""
    shapes = weights.shapes(config)
    plain = {name: math.prod(shape) for name, shape in shapes.items() if sizes[name][0] is None}
    widths = Counter[DType]()
    packed = derived = 0.0
    narrow = 0
    for name, shape in shapes.items():
        kind, size, dtype = sizes[name]
        if kind is None:
            widths[_WIDTHS.get(dtype, "bfloat16")] += plain[name]  # fp8 is converted to bfloat16
            narrow += plain[name] if dtype != "F32" and stays_narrow(shape) else 0
        else:
            packed += size
            derived += 2 * math.prod(shape) / kind.group_size if kind.symmetric else 0
    (stored, _), *_ = widths.most_common(1)
    return StoredWeights(
        parameters=sum(map(math.prod, shapes.values())), stored=stored, floats=sum(plain.values()), narrow=narrow,
        packed=packed, derived=derived,
    )  # fmt: skip


def of_checkpoint(checkpoint: Checkpoint) -> StoredWeights:
    """Add the weights of a folder up that a backend can load."""
    sizes: dict[str, Size] = {}
    for name in checkpoint.names:
        parts = {part: file.entries[stored] for part, (file, stored) in checkpoint.parts(name).items()}
        sizes[name] = checkpoint.format(name), sum(one.nbytes for one in parts.values()), parts["weight"].dtype
    return count(checkpoint.config, sizes)
