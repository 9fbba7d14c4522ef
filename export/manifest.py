"""The JSON beside the graphs: what a host that is not dgemma has to know to run the loop, and what binds graphs to it.

A graph holds places in the weight files, not weights, and constants made of the config: beside other weights, or
another config, it would answer wrongly without a word. So `bound` has what a graph depends on (the config's numbers,
each weight file's size and header, every tensor's place) and the graph files' own hashes, and `read` compares all of it
with what is there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import read_json
from ..checkpoints.links import inside
from ..checkpoints.safetensors import SafetensorsFile
from ..core.errors import DgemmaError, quoted, shown

if TYPE_CHECKING:
    import onnx_ir as ir

    from .graphs import Options

NAME = "dgemma-onnx.json"
FORMAT = "dgemma-onnx"
VERSION = 3
AGAIN = "export again, with --force"
_FREE = ("max_positions", "pad_token_id", "bos_token_id", "eos_token_ids", "image_token_ids")
"""Fields of the config that no graph depends on: the loop around it reads them where it runs."""


def describe(
    checkpoint: Checkpoint, graphs: dict[str, ir.Model], written: dict[str, bytes], tokenizer: list[str],
    options: Options,
) -> dict[str, Any]:  # fmt: skip
    """Return the manifest of graphs: `written` are their files' bytes, by the same names."""
    config, generation = checkpoint.config, checkpoint.generation
    sampler = generation.sampler
    return {
        "format": FORMAT,
        "version": VERSION,
        "graphs": {name: f"{name}.onnx" for name in graphs},
        "weights": [file.path.name for file in checkpoint.files],
        "tokenizer": tokenizer,
        "dtype": options.dtype,
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
        "bound": {
            "options": asdict(options), "graphs": {name: stamp(data) for name, data in written.items()},
            **bound(checkpoint),
        },
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


def stamp(data: bytes) -> dict[str, Any]:
    """What a small file is known by."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def same(path: Path, stamped: Any) -> bool:
    """Whether a file is the one that was stamped."""
    try:
        if path.stat().st_size != stamped["bytes"]:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == stamped["sha256"]
    except (OSError, TypeError, KeyError):
        return False


def bound(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a graph of this checkpoint depends on, weights' values apart.

    config   every number of the parsed config but `_FREE`
    weights  each weight file's size, and a hash of its tensors' names, dtypes, shapes and places
    tensors  a hash over the tensors that graphs name: which file, where, and how they are quantized
    """
    tensors = [
        [
            name, str(checkpoint.format(name)),
            [[part, file.path.name, stored, *_place(file, stored)] for part, (file, stored) in places.items()],
        ]
        for name in checkpoint.names
        for places in (checkpoint.parts(name),)
    ]  # fmt: skip
    config = {key: value for key, value in asdict(checkpoint.config).items() if key not in _FREE}
    return {
        "config": json.loads(json.dumps(config)),  # tuples as the lists that they will be read back as
        "weights": {
            file.path.name: {
                "bytes": file.size, "header": _digest([[name, *_place(file, name)] for name in sorted(file.entries)])
            }
            for file in checkpoint.files
        },
        "tensors": _digest(tensors),
    }  # fmt: skip


def _place(file: SafetensorsFile, name: str) -> tuple[Any, ...]:
    entry = file.entries[name]
    return entry.dtype, entry.shape, entry.start, entry.nbytes


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def load(where: Path) -> dict[str, Any]:
    """Read a manifest of this version.

    Raises:
        DgemmaError: not a manifest of ours, or of another version.
    """
    data = read_json(inside(where.parent, where.name))
    if data.get("format") != FORMAT or type(data.get("version")) is not int:
        raise DgemmaError(f"{shown(where)}: not a dgemma-onnx manifest; {AGAIN}, or remove it")
    if data["version"] != VERSION:
        raise DgemmaError(
            f"{shown(where)}: its graphs are of manifest version {quoted(data['version'], 12)}, this dgemma reads "
            f"{VERSION}; {AGAIN}, or remove it"
        )
    return data


def read(where: Path, checkpoint: Checkpoint, dtype: str) -> dict[str, Path]:
    """Return the graphs that a manifest names, by their names; none where they are in another width than `dtype`.

    Raises:
        DgemmaError: not a manifest of this version; or it, a graph, the config or the weights are not what they were
            when the graphs were written.
    """
    data = load(where)
    was, now = data.get("bound"), bound(checkpoint)
    parts = ("options", "graphs", "config", "weights")
    if not isinstance(was, dict) or not all(isinstance(was.get(part), dict) for part in parts):
        raise DgemmaError(f"{shown(where)}: does not say what its graphs belong to; {AGAIN}")
    mine = {key: now["config"][key] for key in ("vocab_size", "hidden_size", "canvas_length")}
    for kept, wanted in ((data, mine), (was["config"], now["config"])):
        if other := [key for key, value in wanted.items() if kept.get(key) != value]:
            said = "layers are" if other[0] == "layers" else f"{other[0]} is {quoted(kept.get(other[0]), 30)},"
            raise DgemmaError(f"{shown(where)}: {said} not as in config.json; {AGAIN}")
    for name, one in now["weights"].items():
        if was["weights"].get(name) != one:
            raise DgemmaError(f"{shown(where)}: {quoted(name)} is not laid out as when it was exported; {AGAIN}")
    if was.get("tensors") != now["tensors"]:
        raise DgemmaError(f"{shown(where)}: the weights are not what was exported; {AGAIN}")
    if data.get("dtype") != was["options"].get("dtype"):
        raise DgemmaError(f"{shown(where)}: dtype is not what its graphs were written in; {AGAIN}")
    if data.get("dtype") != dtype:
        return {}
    names = data.get("graphs")
    if not isinstance(names, dict) or not {"encode", "denoise"} <= names.keys():
        return {}  # a unified graph: two that are written on the spot take no more memory
    found = {}
    for name in ("encode", "denoise"):
        found[name] = inside(where.parent, f"{name}.onnx")
        if not same(found[name], was["graphs"].get(name)):
            raise DgemmaError(f"{shown(found[name])}: not the graph that {NAME} was written with; {AGAIN}")
    return found
