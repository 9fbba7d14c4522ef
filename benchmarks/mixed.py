"""Many different requests through one engine, in random order, against each of them alone: are the tokens the same?

    python benchmarks/mixed.py [--backend torch] [--requests 1000] [--seed 0]

Prompts of 1 to 3,000 tokens, every sampler setting, stop strings, canvas lengths, and some that are cancelled after a
random number of events. Prints how many answers were compared, those that differ, and for each of these the first event
that does, how far apart the passes before it were, and how near their decisions: of two runs that round differently,
one may accept a position or find a canvas stable where the other all but does, and a low temperature divides what is
rounded, pass by pass, by itself.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import dgemma
from dgemma import Commit, DiffusionGemma, Draft
from dgemma.backends.numpy import NumpyOps, NumpyPasses
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.handle import Handle
from dgemma.core.row import Request

BOARDS = ("3..2.. 2..5.. 5.216. ..1.5. ...63. .6.425", ".3.1 .2.. .... ...4", "12.. ..1. .1.. ..2.", "hello", "1 + 1 =")


@dataclass(kw_only=True)
class Case:
    """A request, and after how many events it is cancelled."""

    request: Request
    cancelled: int | None


def cases(model: DiffusionGemma, count: int, seed: int) -> list[Case]:
    """Return so many different requests."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        if draw.random() < 0.5:
            prompt = model.prompt_ids(BOARDS[draw.integers(len(BOARDS))])
        else:
            longest = draw.choice([8, 60, 300, 1000, 3000], p=[0.2, 0.4, 0.25, 0.1, 0.05])
            size = int(draw.integers(1, longest + 1))
            prompt = draw.integers(6, model.config.vocab_size, size).tolist()
        steps = int(draw.integers(1, 9))
        heat = float(draw.uniform(0.0, 1.2))
        sampler = SamplerConfig(
            steps=steps,
            schedule_steps=int(draw.integers(1, 17)),
            entropy_bound=float(draw.choice([0.0, 0.05, 0.1, 0.5, 3.0])),
            t_min=heat * 0.5,
            t_max=heat,
            confidence=float(draw.choice([0.0, 0.005, 0.1, 10.0])),
            stability=int(draw.integers(0, 4)),
            greedy=bool(draw.random() < 0.2),
        )
        request = Request(
            prompt=tuple(prompt),
            max_new_tokens=int(draw.integers(1, 130)),
            seed=int(draw.integers(0, 1 << 62)),
            sampler=sampler,
            eos_token_ids=(1, 5) if draw.random() < 0.7 else (),
            stop=("4", "\n2")[: int(draw.integers(0, 3))],
            canvas_length=int(draw.choice([48, 48, 16, 32, 7])),
            fit=bool(draw.random() < 0.2),
        )
        made.append(Case(request=request, cancelled=int(draw.integers(1, 12)) if draw.random() < 0.1 else None))
    return made


def together(engine: Engine, asked: list[Case], seed: int) -> tuple[list[list[Any]], int]:
    """Run all in random order, arriving and cancelled between rounds; return each one's events and the most at once."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(asked)).tolist()
    seen: list[list[Any]] = [[] for _ in asked]
    open_: dict[int, Handle] = {}
    most = 0
    while order or open_:
        for _ in range(min(len(order), int(draw.integers(0, 6)))):
            i = order.pop()
            open_[i] = engine.add(asked[i].request)
        engine.step()
        most = max(most, len(engine._rows))
        for i, handle in list(open_.items()):
            seen[i] += handle.ready()
            limit = asked[i].cancelled
            if limit is not None and len(seen[i]) >= limit:
                handle.cancel()
                del open_[i]
            elif seen[i] and isinstance(seen[i][-1], dgemma.Done):
                del open_[i]
    return seen, most


def tokens(events: list[Any]) -> list[int]:
    return [token for event in events if isinstance(event, Commit) for token in event.tokens]


def first_difference(alone: list[Any], shared: list[Any]) -> str:
    """Say where two runs of one request part, and how far apart the passes before it were."""
    a, b = ([event for event in events if isinstance(event, Draft)] for events in (alone, shared))
    apart: list[str] = []
    for one, other in zip(a, b, strict=False):
        where = f"canvas {one.canvas} pass {one.step}"
        apart.append(f"{np.abs(one.entropy - other.entropy).max():.1e}")
        for what in ("accepted", "tokens", "following"):
            x, y = getattr(one, what), getattr(other, what)
            if not np.array_equal(x, y):
                return f"{where}: {what} differ at {np.flatnonzero(x != y)[:5]}; entropies by {', '.join(apart)} nats"
    return f"drafts {len(a)} and {len(b)}"


class Watching(NumpyOps):
    """The float64 oracle, noting of each pass how near its closest decision was to another."""

    def __init__(self) -> None:
        super().__init__("float64")
        self.seen: list[dict[str, float]] = []

    def vocab_head(self, x: Any, table: Any, softcap: float, temperature: Any, u: Any) -> Any:
        scores = self.logits(x, table, softcap) / temperature[..., None]
        mass = np.exp(scores - scores.max(-1, keepdims=True))
        ends = np.cumsum(mass / mass.sum(-1, keepdims=True), -1)
        top = np.sort(scores, -1)
        gap = float((top[..., -1] - top[..., -2]).min())
        self.seen.append({"the draw": float(np.abs(ends - u[..., None]).min()), "the argmax": gap})
        return super().vocab_head(x, table, softcap, temperature, u)

    def advance(self, draws: Any, state: Any, token: Any, argmax: Any, entropy: Any, soft: Any) -> Any:
        order = np.sort(entropy, -1)
        before = np.cumsum(order, -1) - order
        self.seen[-1] |= {
            "the entropy bound": float(np.abs(before - draws.entropy_bound).min()),
            "confidence": float(np.abs(entropy.mean(-1) - draws.confidence).min()),
        }
        return super().advance(draws, state, token, argmax, entropy, soft)


def margins(folder: Any, request: Request) -> list[dict[str, float]]:
    """Return how near each pass's decisions were, by the oracle: probabilities, logits, nats."""
    ops, checkpoint = Watching(), Checkpoint.open(folder)
    passes = NumpyPasses(ops, weights.build(checkpoint.config, lambda name: ops.pack(checkpoint.tensor(name))))
    for _ in Engine(passes, None, prefix_bytes=0).add(replace(request, stop=())).events():
        pass
    return ops.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    model = dgemma.load("nano", backend=options.backend, dtype="float32")
    passes, tokenizer = model.engine.passes, model.engine.tokenizer
    asked = cases(model, options.requests, options.seed)
    began = time.perf_counter()
    seen, most = together(Engine(passes, tokenizer, most_rows=options.rows), asked, options.seed)
    shared = time.perf_counter() - began
    one = Engine(passes, tokenizer, most_rows=1, prefix_bytes=0)
    differing = compared = 0
    began = time.perf_counter()
    for i, (case, events) in enumerate(zip(asked, seen, strict=True)):
        alone = list(one.add(replace(case.request)).events())
        finished = isinstance(events[-1], dgemma.Done)
        want, got = tokens(alone), tokens(events)
        compared += finished
        if got != (want if finished else want[: len(got)]):
            differing += 1
            print(f"request {i} ({'finished' if finished else 'cancelled'}): {first_difference(alone, events)}")
            for step, found in enumerate(margins(model.path, case.request)):
                print(f"    pass {step}:", ", ".join(f"{what} by {how:.1e}" for what, how in found.items()))
    print(
        f"{options.backend}: {compared} finished and {len(asked) - compared} cancelled requests, up to {most} at once; "
        f"{differing} differ from the same alone; {shared:.0f} s together, {time.perf_counter() - began:.0f} s alone"
    )


if __name__ == "__main__":
    main()
