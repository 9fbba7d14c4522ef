"""The public face: load a checkpoint, ask it for text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .checkpoints import weights
from .checkpoints.checkpoint import Checkpoint, resolve
from .core.config import ModelConfig
from .core.engine import MOST_ROWS, Engine
from .core.errors import DgemmaError, quoted
from .core.given import check_call, integer
from .diffusion import DiffusionGemma, Prompt
from .text.tokens import Tokenizer

if TYPE_CHECKING:
    from .core.ops import DType

__all__ = ["DiffusionGemma", "Prompt", "auto_dtype", "load"]

FLOAT32_LIMIT = 2 << 30
"""Bytes of weights in float32; see `auto_dtype`."""

NATIVE_LIMIT = 16 << 20
"""The same where it is known what the processor multiplies. On two cores with AVX512_BF16 a pass in bfloat16 takes 1.15
times float32's time with 2 million parameters, 0.85 with 6, 0.67 with 27 and 0.55 with 108."""


def auto_dtype(
    config: ModelConfig, stored: DType, backend: str = "", native: Callable[[], Sequence[DType] | None] = lambda: None
) -> DType:  # fmt: skip
    """Return what `dtype="auto"` computes in: float32 for a small model, the width it is stored in for a larger one.

    `native` is asked for the low precisions that the processor multiplies faster than float32, `backends.native`; in
    any other the model computes in float32, and its weights stay as they are stored. It returns None where that is not
    known. ONNX Runtime multiplies bfloat16 nowhere but on CUDA: there it is float32 again.
    """
    size = 4 * sum(math.prod(shape) for shape in weights.shapes(config).values())
    if backend == "onnx" and stored == "bfloat16":
        return "float32"
    known = native() if size > NATIVE_LIMIT else None
    if known is not None:
        return stored if stored in known else "float32"
    return "float32" if size <= FLOAT32_LIMIT else stored


def load(
    name: str | Path = "nano",
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    rows: int | None = None,
    prefix_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffusionGemma:
    """Load a checkpoint.

    The model serves any number of generations, in any threads, see `DiffusionGemma`. A forked child cannot go on with
    it, but for the numpy backend, and is told so: it loads its own, or is started by `spawn`.
    Files above 256 MiB stay mapped on torch's CPU, onnx and numpy: leave them as they are while the model is in use
    (replacing one by another of its name is safe). One that was written to is refused by the next generation.

    Args:
        name: `nano` (shipped with the package), a folder, or a Hugging Face hub id.
        backend: `auto`, `mlx`, `torch`, `onnx` or `numpy`; `auto` is mlx on Apple silicon and torch elsewhere.
        device: `auto`, `cpu`, `cuda`, `cuda:N` (torch, onnx) or `gpu` (mlx).
        dtype: `auto`, `float32`, `bfloat16` or `float16`: what weights act as, activations and the cache. `auto` is
            float32 for small models (2 GiB of weights in float32) and the width the checkpoint is stored in for larger
            ones. On torch's CPU it follows the processor: the width that is stored where that is multiplied natively
            and the model is larger than 4 million parameters, else float32. `dgemma doctor` says which.
        revision: branch, tag or commit, of a hub id.
        rows: generations that share its passes, at most; others wait. By default 32, and no more than memory has room
            for.
        prefix_bytes: memory for the caches of prompts and answers, from which one that begins alike goes on; 0 keeps
            none. By default a 32nd of what there is.
        progress: called with bytes done and in all while weights are brought to the device.

    Raises:
        DgemmaError: anything wrong with the name, the files or the options, in one line.
    """
    from . import backends

    for option, value in {"backend": backend, "device": device, "dtype": dtype}.items():
        if not isinstance(value, str):
            raise DgemmaError(f"{option} is {quoted(value)}, expected a name such as 'auto'")
    check_call(progress)
    if rows is not None:
        integer("rows", rows, 1, 1 << 20)
    if prefix_bytes is not None:
        integer("prefix_bytes", prefix_bytes, 0, 1 << 60)
    chosen = backends.choose(backend)
    checkpoint = Checkpoint.open(resolve(name, revision=revision))
    checkpoint.check()
    if dtype == "auto":
        known = partial(backends.native, chosen, device)
        dtype = auto_dtype(checkpoint.config, checkpoint.stored_dtype, chosen, known)
    passes = backends.open(chosen, checkpoint, device=device, dtype=cast("DType", dtype), progress=progress)
    config = checkpoint.config
    tokenizer = None
    if os.path.lexists(checkpoint.path / "tokenizer.json"):
        tokenizer = Tokenizer(
            checkpoint.path,
            vocab_size=config.vocab_size,
            bos_token_id=config.bos_token_id,
            controls=(*config.image_token_ids, *config.eos_token_ids, config.pad_token_id),
            context=config.max_positions,
        )
    engine = Engine(passes, tokenizer, most_rows=rows or MOST_ROWS, prefix_bytes=prefix_bytes)
    return DiffusionGemma(engine, checkpoint.generation, checkpoint.path)
