"""What a pass inside a language costs beside a plain one: the vocabulary head that reduces classes of tokens, and the
pass around it, against the head that draws. Interleaved medians of processor time, a JSON line each.

    python benchmarks/class_head.py                          # torch, float32; 3, 31 and 150 classes; 32 k and 262 k
    python benchmarks/class_head.py --backend mlx --vocab 32768

The pass is of the 110M shape with random weights: one canvas of 256 behind 256 tokens. Its classes are uneven in size,
as those of a schema: half of the tokens in the largest, a tenth in none. The host chooses at no cost here; what a real
choice costs is the lattice's alone. Rows are appended to results/class_head.jsonl with `--keep`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from rows import append

from dgemma.core.canvas import Chosen, Classes
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.parts import Masses
from dgemma.core.sampler import draws_of, first_canvas
from dgemma.tools.bench import CANVAS, random_model, settings

CONTEXT, LENGTH = 256, CANVAS["110m"]


def classes_of(vocab: int, count: int) -> Classes:
    draw = np.random.default_rng(count)
    odds = (
        0.5 ** np.arange(1, count + 1) if count < 8 else np.concatenate([[0.5], draw.dirichlet(np.ones(count - 1)) / 2])
    )
    of = draw.choice(count, vocab, p=odds / odds.sum())
    return Classes(of=np.where(draw.random(vocab) < 0.1, -1, of).astype(np.int32), count=count, key=f"{vocab} {count}")


def passes_of(backend: str, vocab: int, dtype: str) -> GraphPasses:
    text = settings("110m")
    text["text_config"]["vocab_size"] = vocab
    config = ModelConfig.from_hf(text)
    if backend == "mlx":
        from dgemma.backends.mlx.ops import MlxOps
        from dgemma.backends.mlx.passes import MlxPasses

        ops = MlxOps(dtype, compile=True)  # type: ignore[arg-type]
        return MlxPasses(ops, random_model(ops, config, "bf16"))
    if backend == "numpy":
        from dgemma.backends.numpy import NumpyOps, NumpyPasses

        ops = NumpyOps(dtype)  # type: ignore[arg-type]
        return NumpyPasses(ops, random_model(ops, config, "bf16"))
    from dgemma.backends.torch.inference import InferenceOps
    from dgemma.backends.torch.passes import TorchPasses

    ops = InferenceOps(dtype)  # type: ignore[arg-type]
    return TorchPasses(ops, random_model(ops, config, "bf16"))


def medians(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each one's median seconds of the processor, all threads, one after the other in every round: on a machine
    that others use the clock says little."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, run in work.items():
            began = time.process_time()
            run()
            if i:
                times[name].append(time.process_time() - began)
    return {name: statistics.median(one) for name, one in times.items()}


def measure(passes: GraphPasses, classes: Classes, rounds: int) -> dict[str, Any]:
    ops, model, vocab = passes.ops, passes.model, passes.config.vocab_size
    draw = np.random.default_rng(0)
    x = ops.asarray(draw.standard_normal((1, LENGTH, passes.config.hidden_size), np.float32), ops.dtype)
    heat, u = (ops.cast(ops.asarray(one), ops.wide) for one in (np.full((1, 1), 0.6), np.full((1, LENGTH), 0.5)))
    of, table, softcap = ops.asarray(classes.of), model.embed_tokens, model.config.softcap
    slot = passes.open(CONTEXT, LENGTH)
    passes.read([(slot, draw.integers(3, vocab, CONTEXT, np.int32))])
    draws = draws_of(SamplerConfig(), seed=0, canvas=0, step=0, length=LENGTH, vocab_size=vocab)
    noise = {slot: first_canvas(0, 0, LENGTH, vocab)}

    def choose(masses: Masses) -> Chosen:
        best = masses.score.argmax(-1).astype(np.int32)
        token = np.take_along_axis(masses.best, best[..., None], -1)[..., 0]
        return Chosen(token, best, np.zeros(best.shape, np.float32), token, np.ones(best.shape, np.float32))

    def opened(masses: Masses) -> Chosen:
        chosen = choose(masses)
        token = chosen.token.copy()
        token[:, :16] = -1
        return chosen._replace(token=token)

    def head(run: Callable[[], Any]) -> Callable[[], Any]:
        def whole() -> None:
            first, *_ = run()
            passes.fetch(first)()

        return whole

    found = medians(
        {
            "vocab_head": head(lambda: ops.vocab_head(x, table, softcap, heat, u)),
            "class_head": head(lambda: ops.class_head(x, table, softcap, heat, of, classes.count)),
            "plain_pass": lambda: passes.step([slot], draws, noise)(),
            "class_pass": lambda: passes.step_within([slot], draws, noise, classes, choose),
            "class_pass_16_drawn": lambda: passes.step_within([slot], draws, noise, classes, opened),
        },
        rounds,
    )
    passes.close(slot)
    return {
        "backend": passes.name, "dtype": passes.dtype, "vocab": vocab, "classes": classes.count,
        **{f"{name}_ms": round(seconds * 1e3, 1) for name, seconds in found.items()},
        "head_ratio": round(found["class_head"] / found["vocab_head"], 3),
        "pass_ratio": round(found["class_pass"] / found["plain_pass"], 3),
        "pass_ratio_16_drawn": round(found["class_pass_16_drawn"] / found["plain_pass"], 3),
    }  # fmt: skip


@click.command()
@click.option("--backend", default="torch", type=click.Choice(["numpy", "torch", "mlx"]))
@click.option("--dtype", default="float32")
@click.option("--classes", type=int, multiple=True, default=(3, 31, 150))
@click.option("--vocab", type=int, multiple=True, default=(32_768, 262_144))
@click.option("--rounds", default=7)
@click.option("--keep", is_flag=True)
def main(
    backend: str, dtype: str, classes: tuple[int, ...], vocab: tuple[int, ...], rounds: int, keep: bool
) -> None:  # fmt: skip
    for size in vocab:
        passes = passes_of(backend, size, dtype)
        with passes.home():
            for count in classes:
                row = measure(passes, classes_of(size, count), rounds)
                print(json.dumps(append("class_head", row, "numpy") if keep else row), flush=True)


if __name__ == "__main__":
    main()
