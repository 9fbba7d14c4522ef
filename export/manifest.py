"""The JSON beside the graphs: what a host that is not dgemma has to know to run the loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.checkpoint import inside
from ..core.config import GenerationConfig, ModelConfig
from ..core.errors import DgemmaError, quoted, shown

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "dgemma-onnx.json"
VERSION = 1


def describe(
    config: ModelConfig, generation: GenerationConfig, graphs: dict[str, ir.Model], weights: list[str],
    tokenizer: list[str], dtype: str,
) -> dict[str, Any]:  # fmt: skip
    sampler = generation.sampler
    return {
        "format": "dgemma-onnx",
        "version": VERSION,
        "graphs": {name: f"{name}.onnx" for name in graphs},
        "weights": weights,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "canvas_length": config.canvas_length,
        "max_positions": config.max_positions,
        "layers": [
            {
                "past": [f"past_key_values.{i}.{part}" for part in ("key", "value")],
                "present": [f"present.{i}.{part}" for part in ("key", "value")],
                "kv_heads": layer.kv_heads, "head_dim": layer.head_dim, "window": layer.window,
            }
            for i, layer in enumerate(config.layers)
        ],
        "tokens": {
            "bos": config.bos_token_id, "pad": config.pad_token_id, "images": list(config.image_token_ids),
            "eos": list(generation.eos_token_ids or config.eos_token_ids),
        },
        "sampler": {
            "steps": sampler.steps, "schedule_steps": sampler.schedule_steps, "t_min": sampler.t_min,
            "t_max": sampler.t_max, "entropy_bound": sampler.entropy_bound, "confidence": sampler.confidence,
            "stability": sampler.stability,
        },
        "inputs": {name: _signature(model.graph.inputs) for name, model in graphs.items()},
        "outputs": {name: _signature(model.graph.outputs) for name, model in graphs.items()},
    }  # fmt: skip


def _signature(values: Any) -> dict[str, Any]:
    kinds = {"INT64": "int64", "FLOAT": "float32", "FLOAT16": "float16", "BOOL": "bool"}
    return {
        one.name: {
            "dtype": kinds[one.dtype.name],
            "shape": [size if isinstance(size, int) else str(size.value) for size in one.shape],
        }
        for one in values
    }


def read(where: Path, data: dict[str, Any], config: ModelConfig, dtype: str) -> dict[str, Path]:
    """Return the graphs that a manifest names, by their names; none where they are in another width than `dtype`.

    Raises:
        DgemmaError: not a manifest of ours, of a later version, or of another model; or a graph is missing.
    """
    if data.get("format") != "dgemma-onnx" or data.get("version") != VERSION:
        raise DgemmaError(f"{shown(where)}: not a dgemma-onnx manifest of version {VERSION}; export again")
    mine = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "canvas_length": config.canvas_length}
    if other := [key for key, value in mine.items() if data.get(key) != value]:
        raise DgemmaError(
            f"{shown(where)}: {other[0]} is {quoted(data.get(other[0]), 30)}, not as in config.json; export again"
        )
    if data.get("dtype") != dtype:
        return {}
    graphs = data.get("graphs")
    if not isinstance(graphs, dict) or not {"encode", "denoise"} <= graphs.keys():
        return {}  # a unified graph: two that are written on the spot take no more memory
    found = {name: inside(where.parent, str(graphs[name])) for name in ("encode", "denoise")}
    return found
