"""Whether a model fits this machine: weights exactly, the cache exactly, working memory about."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..checkpoints import foreign, weights
from ..checkpoints.checkpoint import PACKAGED, Checkpoint, resolve
from ..checkpoints.files import read_json
from ..convert import recipes
from ..core.config import ModelConfig
from ..core.errors import DgemmaError
from ..core.memory import WIDTH, StoredWeights, held_bytes, stays_narrow
from ..core.ops import DType
from ..core.passes import Passes
from ..runtime import auto_dtype
from ..tools.inspect import Inspection, cache_size, inspect_config, inspect_folder

RUNTIME_BYTES = {"torch": 500 << 20, "mlx": 200 << 20, "onnx": 120 << 20, "numpy": 100 << 20}
"""Python, the framework's libraries and their threads, measured after import; only where memory is the CPU's own."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is known of a model without reading its weights."""

    where: Path
    config: ModelConfig
    stored: DType
    """Width of the weights in the files."""
    file_bytes: int | None
    """Weights on disk; None where only a config is at hand."""
    quantized: Inspection | None = None
    """What a quantized checkpoint holds."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in weights.shapes(self.config).values())

    def auto_dtype(self, backend: str, native: Sequence[DType] | None) -> DType:
        return auto_dtype(self.config, self.stored, backend, lambda: native)

    def held(self, backend: str, dtype: DType, *, gpu: bool) -> int:
        """Bytes of weights in a backend's memory."""
        if self.quantized is not None:
            return int(self.quantized.held(backend, dtype, gpu=gpu))
        shapes = weights.shapes(self.config).values()
        narrow = 0 if self.stored == "float32" else sum(math.prod(shape) for shape in shapes if stays_narrow(shape))
        count = self.parameters
        found = StoredWeights(parameters=count, stored=self.stored, floats=count, narrow=narrow)
        return int(held_bytes(found, backend, dtype, gpu=gpu))


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that running a model takes."""

    weights: int
    fixed_cache: int
    """Keys and values of the sliding layers: no more than their window."""
    cache_per_token: int
    """Keys and values of the full layers."""
    working: int

    def total(self, context: int) -> int:
        return self.weights + self.fixed_cache + self.cache_per_token * context + self.working


def describe(name: str, *, revision: str | None = None) -> Described:
    """Find a model's config, and the headers of its weights if they are here; nothing large is downloaded.

    Args:
        name: as `load` takes it, or the path of a config.json.
        revision: of a model on the hub.

    Raises:
        DgemmaError: nothing by that name, or files that are damaged.
    """
    path = Path(os.path.expanduser(name))
    if name in PACKAGED or os.path.isdir(path):  # os's: a name that no file can have is none, and no exception
        path = resolve(name, revision=revision)
    elif not os.path.isfile(path):
        path = from_hub(name, revision)
    if path.is_dir() or path.suffix != ".json":
        foreign.check_folder(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        checkpoint = Checkpoint.open(path)
        checkpoint.check()
        return Described(
            where=path, config=checkpoint.config, stored=checkpoint.stored_dtype, file_bytes=checkpoint.nbytes,
            quantized=inspect_folder(path) if checkpoint.quantization else None,
        )  # fmt: skip
    path = path / "config.json" if path.is_dir() else path
    data = read_json(path)
    text = data.get("text_config")
    said = [data.get("dtype"), data.get("torch_dtype"), *([text.get("dtype")] if isinstance(text, dict) else [])]
    stored = cast("DType", next((one for one in said if one in WIDTH), "bfloat16"))
    return Described(where=path, config=ModelConfig.from_hf(data, where=str(path)), stored=stored, file_bytes=None)


def from_hub(name: str, revision: str | None = None) -> Path:
    """The folder of a hub model that is downloaded, or the config.json of one that is not."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    if name.count("/") != 1:
        return resolve(name, revision=revision)  # which says what is wrong with the name
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except HFValidationError:
        return resolve(name, revision=revision)
    except OSError:  # not downloaded
        pass
    huggingface_hub.logging.set_verbosity_error()  # or every retry is a line on stderr
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # HTTP clients have exceptions of their own, by huggingface_hub's version
        raise DgemmaError(
            f"{name}: no such folder, and no config.json of that name could be downloaded ({type(error).__name__})"
        ) from None


def need(described: Described, *, dtype: DType, gpu: bool, backend: str) -> Need:
    """Count the bytes."""
    config, width = described.config, WIDTH[dtype]
    length, chunk = config.canvas_length, max(Passes.chunk, config.canvas_length)
    # One [L, V] buffer of logits. On the CPU it is worked through in blocks, on a GPU and by ONNX Runtime with float32
    # copies.
    head = length * config.vocab_size * (width + (12 if gpu or backend == "onnx" else 0))
    widest = max(layer.heads * layer.head_dim for layer in config.layers)
    expert = config.experts_per_token * (3 * config.expert_size + 2 * config.hidden_size)
    layer = chunk * 4 * (expert + 3 * config.intermediate_size + 8 * config.hidden_size + 4 * widest)
    cache = cache_size(config, dtype)
    return Need(
        weights=described.held(backend, dtype, gpu=gpu),
        fixed_cache=cache.fixed,
        cache_per_token=cache.per_token,
        working=max(head, layer) + (0 if gpu else RUNTIME_BYTES[backend]),
    )


def judge(described: Described, *, dtype: DType, gpu: bool, backend: str, free: int, context: int) -> dict[str, Any]:
    """Compare what a model needs with what is free.

    Returns:
        Everything counted, in bytes; `fits`; `largest_context`, in tokens; and, where it does not fit, `remedies`.
    """
    config = described.config
    context = min(context, config.max_positions)
    needed = need(described, dtype=dtype, gpu=gpu, backend=backend)
    total = needed.total(context)
    spare = free - needed.total(0)
    largest = min(config.max_positions, spare // max(needed.cache_per_token, 1)) if spare > 0 else 0
    remedies: list[dict[str, Any]] = []
    if total > free:
        if largest > config.canvas_length:
            remedies.append({"what": "a shorter context", "tokens": int(largest)})
        narrow = need(described, dtype="bfloat16", gpu=gpu, backend=backend).total(context)
        if WIDTH[dtype] > 2 and narrow <= free and backend != "onnx":
            remedies.append({"what": "--dtype bfloat16", "bytes": narrow})
        four_bit = inspect_config(config, recipes.find("4bit")).held(backend, dtype, gpu=gpu)
        converted = int(total - needed.weights + four_bit)
        if described.quantized is None and converted <= free:
            remedies.append({"what": "dgemma convert --recipe 4bit", "bytes": converted})
        remedies += [{"what": "a machine with more memory", "bytes": total}] if not remedies else []
    return {
        "path": str(described.where),
        "parameters": described.parameters,
        "stored_dtype": described.stored,
        "bits_per_weight": described.quantized.bits_per_weight if described.quantized else 8 * WIDTH[described.stored],
        "quantized": described.quantized is not None,
        "file_bytes": described.file_bytes,
        "dtype": dtype,
        "context": context,
        "weights_bytes": needed.weights,
        "weights_bytes_by_dtype": {name: described.held(backend, name, gpu=gpu) for name in WIDTH},
        "packed": described.quantized is not None and backend != "numpy",
        "cache_bytes_per_1000_tokens": 1000 * needed.cache_per_token,
        "cache_bytes_fixed": needed.fixed_cache,
        "working_bytes": needed.working,
        "needed_bytes": total,
        "free_bytes": free,
        "fits": total <= free,
        "largest_context": int(largest),
        "remedies": remedies,
    }
