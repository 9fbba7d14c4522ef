"""Many boards at once: the project's own sampling step, run on a batch. `evaluate.py` checks it against the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import boards
import nano
from dgemma.backends.torch.inference import InferenceOps
from dgemma.checkpoints.weights import build
from dgemma.core import sampler as sampling
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.model import Cache, Model, encode, new_cache, step
from dgemma.core.ops import KV
from dgemma.core.random import step_noise


def inference_model(config: ModelConfig, weights: Mapping[str, Any]) -> tuple[InferenceOps, Model]:
    """The fast torch backend in float32 over float32 weights."""
    ops = InferenceOps("float32")
    return ops, build(ops, config, lambda name: np.asarray(weights[name]))


def _noise(config: ModelConfig, seeds: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    draws = [
        step_noise(seed=int(s), canvas=0, step=index, length=config.canvas_length, vocab_size=config.vocab_size)
        for s in seeds
    ]
    return np.stack([u for u, _ in draws]), np.stack([t for _, t in draws])


@torch.no_grad()
def denoise_batch(
    ops: InferenceOps, model: Model, sampler: SamplerConfig, prompts: np.ndarray, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Denoise the first canvas after each prompt: prompts int32 [B, P], seeds [B] → argmax [B, L], steps taken [B]."""
    config, count, length = model.config, *prompts.shape
    cache = new_cache(ops, config, batch=count, capacity=length, chunk=max(length, config.canvas_length))
    cache = encode(ops, model, cache, ops.asarray(prompts))
    state = sampling.start(ops, ops.asarray(_noise(config, seeds, 0)[1]), config.hidden_size)
    out = np.zeros((count, config.canvas_length), np.int32)
    steps, alive = np.zeros(count, int), np.arange(count)
    for i in range(sampler.steps):
        uniforms, noise = _noise(config, seeds[alive], i + 1)
        temperature = ops.asarray(np.full((len(alive), 1), sampler.temperature(i), np.float32))
        state = step(ops, model, sampler, cache, state, temperature, ops.asarray(uniforms), ops.asarray(noise))
        out[alive], steps[alive] = ops.to_numpy(state.argmax), i + 1
        going = ~state.stop
        if not bool(going.any()):
            break
        if not bool(going.all()):  # finished boards leave the batch
            alive = alive[going.numpy()]
            state = sampling.StepState(*(x[going] for x in state))
            cache = Cache(tuple(KV(*(x[going] for x in kv)) for kv in cache.layers), cache.length)
    return out, steps


def solve_rate(
    ops: InferenceOps, model: Model, sampler: SamplerConfig, tests: np.ndarray, solutions: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Solve boards [N, cells]: which answers are exactly right, bool [N], and the steps they took [N]."""
    right, steps = [], []
    for at in range(0, len(tests), 256):
        chunk = slice(at, at + 256)
        seeds = seed + np.arange(at, at + len(tests[chunk]))
        got, took = denoise_batch(ops, model, sampler, nano.prompts(tests[chunk]), seeds)
        right.append((got == nano.answers(solutions[chunk])).all(1))  # rows, end of turn and fill
        steps.append(took)
    return np.concatenate(right), np.concatenate(steps)


def by_givens(tests: np.ndarray, right: np.ndarray) -> dict[int, tuple[int, int]]:
    """Number of givens → (solved, boards)."""
    givens = (tests > 0).sum(1)
    return {int(g): (int(right[givens == g].sum()), int((givens == g).sum())) for g in np.unique(givens)}


def held_out_set(source: boards.Source, count: int, seed: int = 12345) -> tuple[np.ndarray, np.ndarray]:
    """The same held-out boards every time."""
    return source.batch(np.random.default_rng([seed, source.size.side]), count, test=True)
