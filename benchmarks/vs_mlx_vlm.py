"""Generate one canvas with mlx-vlm 0.7.10 and with dgemma's mlx backend, and count the primitives of one pass of each.

mlx-vlm wants an environment of its own; where this one has it too, leave the option out:

    python -m venv /tmp/mlxvlm && /tmp/mlxvlm/bin/pip install mlx-vlm==0.7.10 'mlx[cpu]'
    python benchmarks/vs_mlx_vlm.py --mlx-vlm-python /tmp/mlxvlm/bin/python --count-only    # seconds
    python benchmarks/vs_mlx_vlm.py --mlx-vlm-python /tmp/mlxvlm/bin/python                 # minutes on a CPU

The same random weights (about 110 M parameters) and prompt on both sides; with `--recipe`, one folder that `dgemma
convert --mlx` made of them, and that both keep packed. Each side runs in a process of its own, one after the other:
read the prompt, take exactly `--steps` passes over one canvas, never stop early. mlx-vlm runs its own loop with its
entropy-bound sampler at temperature 1; its default sampler is another, and cheaper. It skips sampling and conditioning
on the last pass, which is to its favour here. Each side first runs two passes, untimed.

A pass's primitives are the nodes of MLX's lazy graph from one canvas to the next, fused kernels as one: on this device,
and, `metal`, with each `mx.fast` function as the one primitive that it is on Metal. `kernels` leaves out views.
On a CPU only float32 is worth timing: in bfloat16 MLX's own products with packed weights take ten times as long there,
which dgemma goes round and mlx-vlm does not.
Rows go to `benchmarks/results/`, and the last line is JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
import rows
from mlx_graph import count, stand_in_for_metal
from safetensors.numpy import save_file

import dgemma
from dgemma.backends.mlx import packed
from dgemma.backends.mlx.caches import RowCaches
from dgemma.backends.mlx.compiling import compiled
from dgemma.backends.mlx.ops import MLX_DTYPES, MlxOps
from dgemma.backends.mlx.passes import MlxPasses
from dgemma.checkpoints import weights
from dgemma.convert import recipes
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine, Request
from dgemma.core.events import Done
from dgemma.core.model import encode, step
from dgemma.core.parts import Cache, Draws
from dgemma.core.sampler import draws_of, start

HERE = Path(__file__).parent
LAYERS = 6


def config(vocab: int, canvas: int) -> dict[str, Any]:
    """Return a config.json in the spelling that both sides read."""
    text = dict(
        model_type="diffusion_gemma_text", vocab_size=vocab, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=LAYERS, layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, global_head_dim=128, num_global_key_value_heads=2,
        sliding_window=1024, num_experts=32, top_k_experts=4, moe_intermediate_size=256, max_position_embeddings=4096,
        rms_norm_eps=1e-6, final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh", pad_token_id=0,
        eos_token_id=1, bos_token_id=2, use_bidirectional_attention="vision", tie_word_embeddings=True,
    )  # fmt: skip
    return dict(text_config=text, vision_config=None, canvas_length=canvas, model_type="diffusion_gemma")


def write(place: Path, settings: dict[str, Any], recipe: str | None) -> str:
    """Write a checkpoint of random weights, quantized if there is a recipe, and return its folder."""
    source = place / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(settings))
    save_file(weights.random_weights(ModelConfig.from_hf(settings)), source / "model.safetensors", {"format": "pt"})
    if recipe is None:
        return str(source)
    dgemma.convert(source, place / recipe, recipe, mlx=True)
    return str(place / recipe)


def our_side(job: dict[str, Any]) -> dict[str, Any]:
    """What `mlx_vlm_side.py` does, with dgemma."""
    if job["metal"]:
        stand_in_for_metal()
        packed.wide_on_cpu = lambda x: x
    engine = dgemma.load(job["folder"], backend="mlx", dtype=job["dtype"]).engine
    if job["task"] == "count":
        return our_count(engine, job["prompt"])
    our_run(engine, job["prompt"], 2)
    began, cpu = time.perf_counter(), time.process_time()
    our_run(engine, job["prompt"], job["steps"])
    return {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def our_run(engine: Engine, prompt: list[int], steps: int) -> None:
    canvas = engine.passes.config.canvas_length
    request = Request(
        prompt=tuple(prompt), max_new_tokens=canvas, seed=0, eos_token_ids=(),
        sampler=SamplerConfig(steps=steps, schedule_steps=steps, confidence=0.0),
    )  # fmt: skip
    done = [event for event in engine.add(request).events() if isinstance(event, Done)]
    assert done[0].stats.steps == steps and done[0].stats.emitted_tokens == canvas, done


def our_count(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    """Count the pass that the engine runs: every array of the next state, from an evaluated one."""
    passes = engine.passes
    assert isinstance(passes, MlxPasses) and isinstance(passes.ops, MlxOps)
    ops, weights, config, size = passes.ops, passes.model, passes.config, len(prompt)
    length = config.canvas_length
    caches, none = RowCaches(config, MLX_DTYPES[ops.dtype]), mx.zeros((1,), mx.int32)
    caches.put(0, encode(ops, weights, Cache(caches[0], none), mx.array([prompt])).layers, 0, size)
    cache = Cache(caches.batch([0], size), none + size)
    state = start(ops, mx.zeros((1, length), mx.int32), config.hidden_size)
    rows = draws_of(SamplerConfig(), seed=0, canvas=0, step=1, length=length, vocab_size=config.vocab_size)
    draws = Draws(*(mx.array(x.astype(np.float32) if x.dtype == np.float64 else x) for x in rows))
    mx.eval(cache, state, draws)
    return count(*compiled(lambda *given: step(ops, weights, *given))(cache, state, draws))


def ask(python: str, script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [python, str(HERE / script), *(["--ours"] if script == Path(__file__).name else []), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MLX_ENABLE_TF32": "0"})
    if done.returncode:
        raise click.ClickException(f"{script} failed under {python}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@click.command(help=__doc__)
@click.option("--mlx-vlm-python", default=sys.executable, help="Python of an environment with mlx-vlm; else this one.")
@click.option("--steps", default=8, show_default=True, help="Denoising passes.")
@click.option("--vocab", default=32_768, show_default=True)
@click.option("--canvas", default=256, show_default=True)
@click.option("--prompt", default=128, show_default=True, help="Prompt tokens.")
@click.option("--recipe", type=click.Choice(list(recipes.RECIPES)), help="Quantize both sides alike.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Timed pairs.")
@click.option("--count-only", is_flag=True, help="Count primitives and time nothing.")
def main(
    mlx_vlm_python: str, steps: int, vocab: int, canvas: int, prompt: int, recipe: str | None, dtype: str, repeats: int,
    count_only: bool,
) -> None:  # fmt: skip
    job: dict[str, Any] = {"config": config(vocab, canvas), "steps": steps, "dtype": dtype, "metal": False}
    job["prompt"] = np.random.default_rng(0).integers(6, vocab, prompt).tolist()
    sides = {"mlx_vlm": (mlx_vlm_python, "mlx_vlm_side.py"), "dgemma": (sys.executable, Path(__file__).name)}
    row: dict[str, Any] = {"benchmark": "vs_mlx_vlm", "vocab": vocab, "canvas": canvas, "prompt": prompt}
    row["recipe"] = recipe
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = write(Path(folder), job["config"], recipe)
        for metal in (False, True):
            counts = {name: ask(*side, job | {"task": "count", "metal": metal}) for name, side in sides.items()}
            where = "_metal" if metal else ""
            for kind in ("primitives", "kernels"):
                row |= {f"{name}_{kind}{where}": found[kind] for name, found in counts.items()}
                row[f"{kind}{where}_ratio"] = round(counts["dgemma"][kind] / counts["mlx_vlm"][kind], 3)
            click.echo(json.dumps(counts), err=True)
        if not count_only:
            row |= {"steps": steps, "repeats": repeats, "load": os.getloadavg()[0]}
            pairs = [{n: ask(*s, job | {"task": "time"}) for n, s in sides.items()} for _ in range(repeats)]
            best = {name: min((pair[name] for pair in pairs), key=lambda one: one["s"]) for name in sides}
            row |= {f"{name}_{key}": round(value, 2) for name, one in best.items() for key, value in one.items()}
            row["speedup"] = round(best["mlx_vlm"]["s"] / best["dgemma"]["s"], 3)
            row["cpu_speedup"] = round(best["mlx_vlm"]["cpu_s"] / best["dgemma"]["cpu_s"], 3)
    row |= {"dtype": dtype, "device": str(mx.default_device()), "steps": steps}
    click.echo(json.dumps(rows.append("vs_mlx_vlm", row, "mlx")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(our_side(json.loads(sys.argv[2]))))
    else:
        main()
