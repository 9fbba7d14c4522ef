"""Generate one canvas with transformers and with dgemma's torch backend: same weights, same work, same process.

    python benchmarks/vs_transformers.py                      # both dtypes, 2 threads
    python benchmarks/vs_transformers.py --context            # prefill memory, and step time over context length
    python benchmarks/vs_transformers.py --device cuda        # the 26B's shapes in bfloat16, on the first card

The model is random, of about 110 M parameters. Both sides read the prompt, take exactly `--steps` denoising passes over
one canvas, sampling included, and never stop early. Runs alternate, so that a busy machine slows both; the speed-up is
the median of the ratios of neighbours. Every row is appended to `benchmarks/results/`, and the last line is JSON.

On a card both sides run the 26B's shapes over the same weights, made there, which are held once; transformers first
with its dynamic cache, then with the static one and its own compilation, which takes minutes.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import ml_dtypes
import numpy as np
import rows
import torch
import transformers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

from dgemma import backends
from dgemma.checkpoints import weights
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Done
from dgemma.core.row import Request
from dgemma.core.sampler import draws_of, first_canvas
from dgemma.tools import bench

VOCAB, CANVAS = 32_768, 256


class Cost(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds, all threads


def their_config(shape: str, **sizes: Any) -> DiffusionGemmaConfig:
    """Return transformers' config of a benchmark's shape, `sizes` changed in it; the image tower is as good as none."""
    text = DiffusionGemmaTextConfig(
        **bench.SIZES[shape] | sizes, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = dict(
        model_type="gemma4_vision", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, boi_token_id=3, eoi_token_id=4, image_token_id=5
    )


def random_model(positions: int) -> Any:
    """Return transformers' model with random float32 weights."""
    torch.manual_seed(0)
    return DiffusionGemmaForBlockDiffusion(their_config("110m", max_position_embeddings=positions)).eval()


def model_on_card(shape: str) -> Any:
    """Return transformers' model with random bfloat16 weights of a benchmark's shape, made on the card."""
    config = their_config(shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return DiffusionGemmaForBlockDiffusion(config).eval()
    finally:
        torch.set_default_dtype(before)


def compare_on_card(shape: str, *, prompt_length: int, steps: int, canvases: int, repeats: int) -> Iterator[dict]:
    """Yield a row against transformers as it is by default, and one against its static cache, compiled."""
    reference = model_on_card(shape)
    tensors = reference.state_dict()
    config = ModelConfig.from_hf(reference.config.to_dict())
    where = backends.device_of("torch", "cuda")
    held = sum(2 * math.prod(size) for size in weights.shapes(config).values())
    passes = backends.passes_of(
        "torch", config, lambda name: tensors[name].detach(), device=where, dtype="bfloat16", nbytes=held
    )
    engine = Engine(passes, None, prefix_bytes=0)
    prompt = np.random.default_rng(0).integers(6, config.vocab_size, prompt_length)
    ids = torch.tensor(prompt, device="cuda")[None]
    count = canvases * CANVAS

    def theirs(**options: Any) -> None:
        out = reference.generate(
            ids, max_new_tokens=count, max_denoising_steps=steps, confidence_threshold=1e-30, eos_token_id=None,
            **options,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert out.sequences.shape[1] == prompt_length + count

    def ours() -> None:
        our_run(engine, prompt, steps, canvases=canvases)
        torch.cuda.synchronize()

    for name, options in {"dynamic": {}, "static": dict(cache_implementation="static")}.items():
        began = time.perf_counter()
        for run in (lambda o=options: theirs(**o), ours) * 2:
            run()  # compiles
        warm = time.perf_counter() - began
        pairs = [(timed(lambda o=options: theirs(**o)), timed(ours)) for _ in range(repeats)]
        their_seconds, our_seconds = (statistics.median(pair[i].wall for pair in pairs) for i in (0, 1))
        yield {
            "benchmark": "vs_transformers", "device_kind": "cuda", "shape": shape, "dtype": "bfloat16",
            "prompt": prompt_length, "canvases": canvases, "steps": steps, "repeats": repeats, "transformers": name,
            "transformers_s": round(their_seconds, 4), "dgemma_s": round(our_seconds, 4),
            "transformers_tokens_per_second": round(count / their_seconds, 1),
            "dgemma_tokens_per_second": round(count / our_seconds, 1),
            "speedup": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
            "warmup_s": round(warm, 1), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }  # fmt: skip


def our_engine(reference: Any, dtype: Any) -> Engine:
    """Return our engine over the reference's own weights: nothing is copied, and no prompt is kept."""
    config = ModelConfig.from_hf(reference.config.to_dict())
    tensors = reference.state_dict()

    def get(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Engine(backends.passes_of("torch", config, get, device="cpu", dtype=dtype), None, prefix_bytes=0)


def our_run(engine: Engine, prompt: np.ndarray, steps: int, *, canvases: int = 1) -> None:
    request = Request(
        prompt=tuple(prompt.tolist()), max_new_tokens=canvases * CANVAS, seed=0, eos_token_ids=(),
        sampler=SamplerConfig(steps=steps, schedule_steps=steps, confidence=0.0),
    )  # fmt: skip
    done = [event for event in engine.add(request).events() if isinstance(event, Done)]
    assert done[0].stats.steps == steps * canvases and done[0].stats.emitted_tokens == CANVAS * canvases, done


def their_run(model: Any, prompt: np.ndarray, steps: int) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.model.decoder.register_forward_hook(count)
    out = model.generate(
        torch.tensor(prompt)[None].long(), max_new_tokens=CANVAS, max_denoising_steps=steps,
        confidence_threshold=1e-30,  # nats of mean entropy: never reached, so it never stops early
        eos_token_id=None,
    )  # fmt: skip
    hook.remove()
    assert passes == steps and out.sequences.shape[1] == len(prompt) + CANVAS, (passes, out.sequences.shape)


def timed(run: Callable[[], None]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def compare(dtype: Any, *, prompt_length: int, steps: int, repeats: int) -> dict[str, Any]:
    """Time both sides in turn; return one row."""
    reference = random_model(4096).to(getattr(torch, dtype))
    engine = our_engine(reference, dtype)
    prompt = np.random.default_rng(0).integers(6, VOCAB, prompt_length)
    pairs = []
    for i in range(repeats + 1):
        # In one thread: with OpenMP's workers for a second one, both sides would wait for theirs to wake.
        theirs = engine.run("comparing", lambda: timed(lambda: their_run(reference, prompt, steps)))
        ours = timed(lambda: our_run(engine, prompt, steps))
        click.echo(f"{dtype} transformers {theirs.wall:.2f} s, dgemma {ours.wall:.2f} s", err=True)
        if i:  # the first pair warms up
            pairs.append((theirs, ours))

    def middle(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    count = sum(p.numel() for p in reference.model.decoder.parameters())
    return {
        "benchmark": "vs_transformers", "dtype": dtype, "prompt": prompt_length, "canvas": CANVAS, "steps": steps,
        "repeats": repeats, "parameters": count,
        "transformers_s": middle([a.wall for a, _ in pairs]), "dgemma_s": middle([b.wall for _, b in pairs]),
        "speedup": middle([a.wall / b.wall for a, b in pairs]),
        "transformers_cpu_s": middle([a.cpu for a, _ in pairs]), "dgemma_cpu_s": middle([b.cpu for _, b in pairs]),
        "cpu_speedup": middle([a.cpu / b.cpu for a, b in pairs]),
    }  # fmt: skip


def long_context(dtype: Any, *, steps: int, length: int = 16_384, short: int = 1_024) -> dict[str, Any]:
    """Measure the peak of a long prompt's prefill, and a denoising pass behind it against one behind a short prompt."""
    reference = random_model(2 * length).to(getattr(torch, dtype))
    engine = our_engine(reference, dtype)
    generator = np.random.default_rng(0)
    our_run(engine, generator.integers(6, VOCAB, 64), 1)  # whatever is loaded on first use is not prefill's
    loaded = _resident()
    row: dict[str, Any] = {"benchmark": "context", "dtype": dtype, "length": length, "short": short, "steps": steps}
    slots: dict[str, int] = {}
    for name, count in (("short", short), ("long", length)):
        prompt = generator.integers(6, VOCAB, count).tolist()
        cost = timed(lambda p=prompt, n=name: slots.__setitem__(n, _behind(engine, p)))
        row[f"{name}_prefill_s"] = round(cost.wall, 3)
    row["prefill_peak_above_weights_gb"] = round((_peak() - loaded) / 1e9, 3)
    for name, cost in _passes(engine, slots, steps).items():
        row[f"{name}_step_s"], row[f"{name}_step_cpu_s"] = round(cost.wall, 4), round(cost.cpu, 4)
    row["step_ratio"] = round(row["long_step_s"] / row["short_step_s"], 3)
    row["step_cpu_ratio"] = round(row["long_step_cpu_s"] / row["short_step_cpu_s"], 3)
    return row


def _behind(engine: Engine, prompt: list[int]) -> int:
    """Return a slot that has read a prompt."""
    return engine.run("reading", lambda: engine.passes.open_behind(prompt, CANVAS))


def _passes(engine: Engine, slots: dict[str, int], repeats: int) -> dict[str, Cost]:
    """Median cost of one denoising pass in each slot, in turn."""
    passes, costs = engine.passes, {name: [] for name in slots}
    for i in range(repeats + 1):
        given = {"seed": 0, "canvas": 0, "length": CANVAS, "vocab_size": VOCAB}
        draws = draws_of(SamplerConfig(), step=i, **given)
        for name, slot in slots.items():
            starts = {} if i else {slot: first_canvas(0, 0, CANVAS, VOCAB)}
            work = lambda s=slot, n=starts: passes.step([s], draws, n)()  # noqa: B023, E731
            cost = timed(lambda w=work: engine.run("denoising", w))
            if i:
                costs[name].append(cost)
    return {name: Cost(*map(statistics.median, zip(*several, strict=True))) for name, several in costs.items()}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command(help=__doc__)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--prompt", default=128, show_default=True, help="Prompt tokens.")
@click.option("--steps", default=8, show_default=True, help="Denoising passes.")
@click.option("--repeats", default=5, show_default=True, help="Timed pairs.")
@click.option("--threads", default=2, show_default=True)
@click.option("--context", is_flag=True, help="Prefill memory and step time at 16,384 tokens instead.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--shape", type=click.Choice(["26b", "110m"]), default="26b", show_default=True, help="On a card.")
@click.option("--canvases", default=2, show_default=True, help="On a card.")
def main(
    dtypes: tuple[str, ...], prompt: int, steps: int, repeats: int, threads: int, context: bool,
    device: str, shape: str, canvases: int,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    if device == "cuda":
        from dgemma.tools.bench_card import describe

        where = describe(torch.device("cuda")) | {"transformers_version": transformers.__version__}
        for row in compare_on_card(shape, prompt_length=prompt, steps=steps, canvases=canvases, repeats=repeats):
            click.echo(json.dumps(rows.append("gpu", row | where)))
        return
    taken = []
    for dtype in dtypes or ("float32", "bfloat16"):
        if context:
            row = long_context(dtype, steps=steps)
        else:
            row = compare(dtype, prompt_length=prompt, steps=steps, repeats=repeats)
        taken.append(rows.append("vs_transformers", row | {"threads": threads}, "torch", "transformers"))
    click.echo(json.dumps(taken if len(taken) > 1 else taken[0]))


if __name__ == "__main__":
    main()
