"""A denoising pass on ONNX Runtime against one on torch, and packed weights on it against dense: same model, in turn.

    python benchmarks/vs_ort.py                       # 110 M parameters, float32 and 4bit, 2 threads
    python benchmarks/vs_ort.py --context 4096        # behind a longer prompt
    python benchmarks/vs_ort.py --classes 150         # a pass inside a language, against one that is free
    python benchmarks/vs_ort.py --memory --layers 48  # peak memory of a running model against its file
    python benchmarks/vs_ort.py --memory --shape 26b --recipe 4bit   # the released model's, six layers of it

The model is random, float32 in its file; `dgemma convert` writes the recipe's folder, and both backends read the
folders as users' are read. A pass is the whole of it: layers, head, acceptance, and what comes back to the host.
Passes alternate, so that a busy machine slows all; a ratio is the median of the ratios of neighbours. Rows are
appended to results/vs_ort.jsonl, and the last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import click
import numpy as np
import rows
from quant_step import CANVAS, write

from dgemma.convert import convert
from dgemma.core.canvas import Chosen, Classes
from dgemma.core.config import SamplerConfig
from dgemma.core.parts import Masses
from dgemma.core.sampler import draws_of, first_canvas
from dgemma.tools.bench import Shape, settings


def one_pass(folder: Path, backend: str, context: int, classes: int = 0) -> Callable[[], object]:
    """Return what runs one denoising pass behind a prompt, and waits for it; with `classes`, one that looks at so many
    classes of tokens and takes the likeliest, which leaves out what an automaton would do."""
    import dgemma

    passes = dgemma.load(folder, backend=backend, device="cpu", dtype="float32").engine.passes
    vocab = passes.config.vocab_size
    slot = passes.open_behind(np.random.default_rng(0).integers(6, vocab, context).tolist(), CANVAS)
    sampler = SamplerConfig(t_min=0.6, t_max=0.6)
    draws = draws_of(sampler, seed=0, canvas=0, step=0, length=CANVAS, vocab_size=vocab)
    starts = {slot: first_canvas(0, 0, CANVAS, vocab)}
    if not classes:
        return lambda: passes.step([slot], draws, starts)()
    of = np.random.default_rng(1).integers(-1, classes, vocab).astype(np.int32)
    some, calm = Classes(of=of, count=classes, key=str(classes)), np.ones((1, CANVAS), np.float32)

    def choose(masses: Masses) -> Chosen:
        best = np.take_along_axis(masses.best, masses.score.argmax(-1)[..., None], -1)[..., 0]
        return Chosen(token=best, label=0 * best, rest=0 * calm, argmax=best, entropy=calm)

    return lambda: passes.step_within([slot], draws, starts, some, choose)


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, the first two of which warm up and do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if i > 1:
                times[name].append(time.perf_counter() - began)
    return times


def compare(folders: dict[str, Path], context: int, repeats: int, classes: int) -> list[dict[str, Any]]:
    runs = {"torch float32": one_pass(folders["float32"], "torch", context)}
    for name, folder in folders.items():
        runs[f"onnx {name}"] = one_pass(folder, "onnx", context)
    pairs = [("onnx float32", "torch float32"), *((f"onnx {n}", "onnx float32") for n in folders if n != "float32")]
    if classes:
        pairs = [(f"{name}, {classes} classes", name) for name in runs]
        runs |= {f"onnx {n}, {classes} classes": one_pass(f, "onnx", context, classes) for n, f in folders.items()}
        name = f"torch float32, {classes} classes"
        runs[name] = one_pass(folders["float32"], "torch", context, classes)
    times = in_turn(runs, repeats)
    return [
        {
            "benchmark": "vs_ort", "what": what, "against": against, "context": context,
            "step_s": round(statistics.median(times[what]), 4),
            "against_step_s": round(statistics.median(times[against]), 4),
            "ratio": round(statistics.median(map(truediv, times[what], times[against])), 3),
            "least_ratio": round(min(times[what]) / min(times[against]), 3), "repeats": repeats,
        }
        for what, against in pairs
    ]  # fmt: skip


PEAK = """
import sys
import numpy as np, onnxruntime, dgemma
from dgemma.core.memory import peak_memory
if sys.argv[2] == "prepacked":
    inner = onnxruntime.SessionOptions.add_session_config_entry
    def kept(self, key, value):
        if key != "session.disable_prepacking":
            inner(self, key, value)
    onnxruntime.SessionOptions.add_session_config_entry = kept
from dgemma.backends.onnx import passes
empty = peak_memory()
model = dgemma.load(sys.argv[1], backend="onnx", device="cpu", dtype="float32")
out = model.generate(list(range(6, 134)), max_new_tokens=256, steps=2, schedule_steps=2, confidence=0.0)
assert out.stats.steps == 2
print(empty, peak_memory())
"""


def memory(name: str, folder: Path, how: str) -> dict[str, Any]:
    """Return the peak of a process that loads a folder and denoises a canvas twice, above one with imports alone."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), how], stdout=subprocess.PIPE, check=True)
    empty, peak = map(int, done.stdout.split())
    return {
        "benchmark": "vs_ort_memory", "what": f"onnx {name}", "weights": how, "file_gb": round(size / 1e9, 3),
        "empty_gb": round(empty / 1e9, 3), "peak_gb": round(peak / 1e9, 3), "of_file": round((peak - empty) / size, 3),
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--recipe", "recipes", multiple=True, default=("4bit", "8bit"), show_default=True)
@click.option("--context", default=128, show_default=True, help="Tokens in the cache.")
@click.option("--repeats", default=15, show_default=True)
@click.option("--classes", default=0, help="Classes of tokens that passes are to look at.")
@click.option("--memory", "of_memory", is_flag=True, help="Peak memory of a running model instead.")
@click.option("--layers", default=6, show_default=True, help="6 make 108.5 M parameters; a multiple of 6.")
@click.option("--experts", type=int, help="In a layer; by default the shape's, 32 or 128.")
@click.option("--shape", type=click.Choice(["110m", "26b"]), default="110m", show_default=True, help="Of a layer.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; by default a temporary folder.")
def main(
    recipes: tuple[str, ...], context: int, repeats: int, classes: int, of_memory: bool, layers: int,
    experts: int | None, shape: Shape, folder: Path | None,
) -> None:  # fmt: skip
    import torch

    if shape == "26b" and not of_memory:
        raise click.UsageError("--shape 26b is for --memory: its float32 steps need a bigger machine")
    threads = os.cpu_count() or 1  # as many as ONNX Runtime takes
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="dgemma-ort-", dir=folder) as work:
        stored = "bfloat16" if shape == "26b" else "float32"  # six of its layers would be 22 GB in float32
        folders = {stored: Path(work) / stored}
        parameters = write(folders[stored], experts, layers, stored, shape)
        for recipe in recipes:
            folders[recipe] = Path(work) / recipe
            convert(folders[stored], folders[recipe], recipe)
        if of_memory:
            # A bfloat16 file is cast when it is loaded, twice: not what this is about.
            of = {name: one for name, one in folders.items() if name != "bfloat16"}
            taken = [memory(name, one, how) for name, one in of.items() for how in ("mapped", "prepacked")]
        else:
            taken = compare(folders, context, repeats, classes)
    common = {
        "dtype": "float32", "shape": shape, "layers": layers,
        "experts": experts or settings(shape)["text_config"]["num_experts"], "parameters": parameters,
        "canvas": CANVAS, "threads": threads,
    }  # fmt: skip
    click.echo(json.dumps([rows.append("vs_ort", row | common, "onnxruntime", "torch") for row in taken]))


if __name__ == "__main__":
    main()
