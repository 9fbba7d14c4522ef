"""A denoising pass over packed weights against one over dense ones, on torch: same model, same process, in turn.

    python benchmarks/quant_step.py                       # 110 M parameters, float32, 4bit and 8bit, 2 threads
    python benchmarks/quant_step.py --memory --gb 1.0     # peak memory of a running model against its files

The model is random; each recipe's folder is written by `dgemma convert`, and read back as users read it. A pass is the
whole of it: layers, head, acceptance. Passes alternate, so that a busy machine slows all; a ratio is the median of the
ratios of neighbours. `--cpu --threads 1` measures what a busy machine blurs. Rows are appended to
results/quant_step.jsonl, and the last line is JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import rows

from dgemma.checkpoints import safetensors, weights
from dgemma.convert import convert
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.ops import NUMPY_DTYPES
from dgemma.core.sampler import draws_of, first_canvas
from dgemma.tools.bench import Shape, settings

CANVAS, PROMPT = 256, 128


def write(
    folder: Path, experts: int | None = None, layers: int = 6, dtype: str = "bfloat16", shape: Shape = "110m"
) -> int:
    """Write a random checkpoint of a shape, with so many experts and layers; return its parameters.

    Of "110m" it is the one of vs_transformers.py. It comes in files of 2 GB, so that no more than one is in memory.
    """
    folder.mkdir()
    data = settings(shape) | {"dtype": dtype}
    text = data["text_config"]
    text |= {
        "num_experts": experts or text["num_experts"], "num_hidden_layers": layers,
        "layer_types": text["layer_types"][:6] * (layers // 6),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    draw = np.random.default_rng(0)
    noise = (0.02 * draw.standard_normal(1 << 22, np.float32)).astype(NUMPY_DTYPES[dtype])
    shapes = weights.shapes(ModelConfig.from_hf(data))
    table: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}
    for i, (name, dims) in enumerate(shapes.items()):
        size = math.prod(dims)
        # One block of noise, again and again from another place: fast, and no two tensors are alike.
        flat = np.ones(size, noise.dtype) if len(dims) == 1 else np.resize(np.roll(noise, 997 * i), size)
        held[name] = flat.reshape(dims)
        if i == len(shapes) - 1 or sum(one.nbytes for one in held.values()) > 2e9:
            file = f"model-{len(set(table.values())):05}.safetensors"
            safetensors.write(folder / file, held, {"format": "pt"})
            table |= dict.fromkeys(held, file)
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return sum(math.prod(dims) for dims in shapes.values())


Key = TypeVar("Key")


def passes(
    folders: dict[tuple[Key, str], Path], repeats: int, threads: int, clock: Callable[[], float] = time.perf_counter
) -> dict[tuple[Key, str], list[float]]:
    """Time one denoising pass of each folder's model in turn; seconds by name and width."""
    import torch

    import dgemma

    torch.set_num_threads(threads)
    runs = {}
    for key, folder in folders.items():
        passes = dgemma.load(folder, backend="torch", device="cpu", dtype=key[1]).engine.passes
        vocab, generator = passes.config.vocab_size, np.random.default_rng(0)
        slot = passes.open(PROMPT, CANVAS)
        passes.read([(slot, generator.integers(6, vocab, PROMPT).astype(np.int32))])
        noise = first_canvas(0, 0, CANVAS, vocab)
        draws = draws_of(SamplerConfig(), seed=0, canvas=0, step=0, length=CANVAS, vocab_size=vocab)
        # Every pass is the first of a canvas, so that all of them do the same.
        runs[key] = lambda p=passes, d=draws, s={slot: noise}: p.step(list(s), d, s)()
    times: dict[tuple[Key, str], list[float]] = {key: [] for key in runs}
    for i in range(repeats + 2):
        for key, run in runs.items():
            began = clock()
            run()
            if i > 1:  # the first two warm up
                times[key].append(clock() - began)
    return times


PEAK = """
import json, sys
from pathlib import Path
import numpy as np
import torch

def peak_memory():  # of this program; getrusage's figure is inherited from the process that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
empty = peak_memory()
import dgemma
model = dgemma.load(sys.argv[1], backend="torch", device="cpu", dtype=sys.argv[2])
out = model.generate(list(range(6, 134)), max_new_tokens=256, steps=2, schedule_steps=2, confidence=0.0)
assert out.stats.steps == 2
print(json.dumps([empty, peak_memory()]))
"""


@click.command(help=__doc__)
@click.option("--recipe", "recipes", multiple=True, default=("4bit", "8bit"), show_default=True)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]), show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cpu", is_flag=True, help="Count CPU time, which with one thread a busy machine changes least.")
@click.option("--memory", is_flag=True, help="Peak memory of a running model instead.")
@click.option("--gb", default=1.0, show_default=True, help="With --memory: least size of a converted folder.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; by default a temporary folder.")
def main(
    recipes: tuple[str, ...], dtype: str, repeats: int, threads: int, cpu: bool, memory: bool, gb: float,
    folder: Path | None,
) -> None:  # fmt: skip
    taken: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dgemma-quant-", dir=folder) as work:
        source = Path(work) / "source"
        # An expert of all six layers is 2.36 M parameters, 1.33 MB in 4 bits.
        parameters = write(source, max(32, round(gb * 1e9 / 1.33e6)) if memory else 32)
        folders = {"dense": source}
        for recipe in recipes:
            folders[recipe] = Path(work) / recipe
            convert(source, folders[recipe], recipe)
        if memory:
            taken = [measured(name, folders[name], dtype) for name in recipes]
        else:
            runs = {(name, dtype): folder for name, folder in folders.items()}
            timed = passes(runs, repeats, threads, time.process_time if cpu else time.perf_counter)
            times = {name: taken for (name, _), taken in timed.items()}
            taken = [
                {
                    "recipe": name, "step_s": round(statistics.median(times[name]), 4),
                    "dense_step_s": round(statistics.median(times["dense"]), 4),
                    "ratio": round(statistics.median(map(truediv, times[name], times["dense"])), 3),
                    "least_ratio": round(min(times[name]) / min(times["dense"]), 3), "repeats": repeats,
                    "clock": "CPU time" if cpu else "wall",
                }
                for name in recipes
            ]  # fmt: skip
    common = {"benchmark": "quant_step_memory" if memory else "quant_step", "dtype": dtype, "threads": threads}
    shape = {"parameters": parameters, "canvas": CANVAS, "prompt": PROMPT}
    click.echo(json.dumps([rows.append("quant_step", shape | common | row, "torch") for row in taken]))


def measured(recipe: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Return the peak of a process that loads a folder and denoises a canvas twice, above one with torch alone."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), dtype], stdout=subprocess.PIPE, check=True)
    empty, peak = json.loads(done.stdout.splitlines()[-1])
    return {
        "recipe": recipe, "file_gb": round(size / 1e9, 3), "empty_gb": round(empty / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3), "of_file": round((peak - empty) / size, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
