"""What an export has made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was made."""

    path: Path
    graphs: dict[str, int]
    """Nodes of each graph, those of functions counted once."""
    weight_bytes: int
    """Bytes of the weight files, which are the checkpoint's own unless they were copied."""
    copied: bool
    graph_bytes: int
    lacking: tuple[str, ...]
    """Operators that the onnxruntime installed here does not have for the CPU."""
    fused_experts: bool
    """Whether it has a fused operator for gated experts with tanh-GELU, which `dgemma::GegluMoE` could be."""
    errors: dict[str, float] = field(default_factory=dict)
    """With `verify`, the largest error of each output; see `tools/verify_onnx.py`."""
    seconds: float
