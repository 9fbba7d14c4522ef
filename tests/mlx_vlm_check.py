"""Checkpoints to and from mlx-vlm 0.7.10, compared by their logits. Not part of the suite: it needs another venv.

    python -m venv /tmp/mlxvlm && /tmp/mlxvlm/bin/pip install mlx-vlm==0.7.10 'mlx[cpu]'
    python tests/mlx_vlm_check.py /tmp/mlxvlm/bin/python

Every recipe, written with `--mlx`, loads in mlx-vlm through its own `load_model` and gives the same logits in float32;
and what mlx-vlm's own `convert` writes loads here, and does. Prints one line for each, and fails on the first that does
not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"

import numpy as np

PROMPT, CANVAS = list(range(20, 45)), list(range(60, 76))

# mlx-vlm's side. Its layers compute in the width of the scales, which is bf16 as stored: set_dtype makes it float32.
THEIRS = """
import json, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
job = json.loads(sys.argv[1])
if job["convert"]:
    import importlib
    converter = importlib.import_module("mlx_vlm.convert")
    from mlx_vlm.utils import load_config, load_model
    class Processor:
        def save_pretrained(self, *args, **kwargs): pass
        def __getattr__(self, name): raise AttributeError(name)
    converter.fetch_from_hub = lambda path, **kwargs: (load_model(path, lazy=True), load_config(path), Processor())
    converter.convert(job["source"], job["folder"], quantize=True)
from mlx_vlm.utils import load_model
model = load_model(Path(job["folder"]))
model.set_dtype(mx.float32)
canvas = mx.array([job["canvas"]])
cache = model.diffusion_prefill_cache(mx.array([job["prompt"]]))
masks = model.diffusion_decoder_masks(canvas, cache)
logits = model.diffusion_decoder_logits(canvas, cache=cache, decoder_attention_mask=masks)
np.save(job["logits"], np.array(logits[0].astype(mx.float32)))
"""


def theirs(python: str, folder: Path, work: Path, source: Path | None = None) -> np.ndarray:
    """mlx-vlm's logits of a folder, which it converts from `source` first if there is one."""
    result = work / "logits.npy"
    job = {
        "folder": str(folder), "logits": str(result), "prompt": PROMPT, "canvas": CANVAS,
        "convert": source is not None, "source": str(source),
    }  # fmt: skip
    subprocess.run([python, "-c", THEIRS, json.dumps(job)], check=True, cwd=work)
    return np.load(result)


def main() -> None:
    import dgemma
    from dgemma.convert import recipes
    from law import assert_close_f32
    from published import floats
    from tiny import edit_json, rewrite

    python = sys.argv[1]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        source = floats(work, dtype="float32")
        rewrite(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision" in name])
        edit_json(source / "config.json", vision_config=None)  # or mlx-vlm builds an image tower of its default size
        for recipe in recipes.RECIPES:
            out = work / recipe
            dgemma.convert(source, out, recipe, mlx=True)
            want = theirs(python, out, work)
            got = dgemma.load(out, backend="numpy", dtype="float32").logits(PROMPT, CANVAS)
            print(f"{recipe:>9} written here, read by mlx-vlm: NMSE {assert_close_f32(want, got, recipe):.1e}")
        out = work / "theirs"
        want = theirs(python, out, work, source)
        for backend in ("numpy", "torch", "mlx"):
            got = dgemma.load(out, backend=backend, dtype="float32").logits(PROMPT, CANVAS)
            print(f"{backend:>9} reads what mlx-vlm converted:  NMSE {assert_close_f32(got, want, backend):.1e}")
        report = dgemma.convert(out, work / "again", "4bit-mlx", mlx=True, requantize=True)
        print(f"  of it dgemma convert made: {report.counts}")


if __name__ == "__main__":
    main()
