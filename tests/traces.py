"""Whole generations, pass by pass: transformers' own `generate` and our `step` in a loop, given the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

import hf
from dgemma.core.config import SamplerConfig
from dgemma.core.model import encode, step
from dgemma.core.ops import Ops
from dgemma.core.parts import Model
from dgemma.core.random import step_noise
from dgemma.core.sampler import draws_of, start
from under_test import on_device

LAST_UNIFORM = 1.0 - 2.0**-24
"""The largest number that `step_noise` draws."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one denoising pass decided; L is the canvas length."""

    accepted: np.ndarray  # bool [L]
    canvas: np.ndarray  # int [L] what the next pass would read
    argmax: np.ndarray  # int [L]
    entropy: np.ndarray  # float [L], nats
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    canvases: list[list[Pass]]
    tokens: np.ndarray  # int [new tokens], whole canvases


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The random numbers that both sides are given."""

    seed: int
    length: int
    vocab_size: int

    def __call__(self, canvas: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return step_noise(seed=self.seed, canvas=canvas, step=step, length=self.length, vocab_size=self.vocab_size)


def inverse_cdf(probabilities: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draw the plain way, in float64: [..., V] and [...] → the first token whose cumulative sum exceeds u."""
    total = np.cumsum(probabilities.astype(np.float64), -1)
    return np.sum(total <= u[..., None].astype(np.float64) * total[..., -1:], -1)


@contextmanager
def _injected(noise: Noise, canvases: list[list[Pass]]) -> Iterator[None]:
    """Give `generate` our random numbers, and write down what it does with them."""
    sampler, mixin = theirs.EntropyBoundSampler, theirs.DiffusionGemmaGenerationMixin
    multinomial, initialize = torch.multinomial, sampler.initialize_canvas
    prepare, denoise = mixin._prepare_denoiser_inputs, mixin._denoising_step
    mark = torch.compiler.cudagraph_mark_step_begin
    at = {"canvas": -1, "step": 0}

    def draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert num_samples == 1
        return torch.from_numpy(inverse_cdf(probabilities.numpy(), noise(at["canvas"], at["step"])[0]))[:, None]

    def tokens(self: Any, batch_size: int, device: torch.device) -> torch.Tensor:
        assert batch_size == 1
        return torch.from_numpy(noise(at["canvas"], at["step"])[1])[None].long()

    def new_canvas(self: Any, **arguments: Any) -> tuple:
        at.update(canvas=at["canvas"] + 1, step=0)
        canvases.append([])
        return prepare(self, **arguments)

    def one_pass(self: Any, *, sampler: Any, **arguments: Any) -> tuple:
        at["step"] += 1
        canvas, argmax, logits, finished = result = denoise(self, sampler=sampler, **arguments)
        canvases[-1].append(
            Pass(
                accepted=sampler.accepted_token_mask[0].numpy().copy(),
                canvas=canvas[0].numpy().copy(),
                argmax=argmax[0].numpy().copy(),
                # Of their logits, but in float64: where a distribution is sharp, log-probabilities computed as
                # logits - logsumexp in float32 leave 4e-6 nats of rounding on an entropy of 1e-2.
                entropy=torch.distributions.Categorical(logits=logits[0].double()).entropy().numpy(),
                stop=bool(finished[0]),
            )
        )
        return result

    torch.multinomial, sampler.initialize_canvas = draw, tokens
    mixin._prepare_denoiser_inputs, mixin._denoising_step = new_canvas, one_pass
    # A hint for CUDA graphs; on a CPU all it does is import torch's compiler: seconds, and deprecation warnings.
    torch.compiler.cudagraph_mark_step_begin = lambda: None
    try:
        yield
    finally:
        torch.multinomial, sampler.initialize_canvas = multinomial, initialize
        mixin._prepare_denoiser_inputs, mixin._denoising_step = prepare, denoise
        torch.compiler.cudagraph_mark_step_begin = mark


def reference(
    model: DiffusionGemmaForBlockDiffusion,
    prompt: np.ndarray,
    sampler: SamplerConfig,
    *,
    seed: int,
    canvases: int,
    eos: int | None = None,
) -> Trace:
    """Run transformers' `generate` with our random numbers. Its schedule is as long as its cap."""
    assert sampler.steps == sampler.schedule_steps
    length = model.config.canvas_length
    passes: list[list[Pass]] = []
    with _injected(Noise(seed=seed, length=length, vocab_size=model.config.text_config.vocab_size), passes):
        out = model.generate(
            torch.from_numpy(prompt)[None].long(),
            generation_config=theirs.DiffusionGemmaGenerationConfig(
                max_new_tokens=canvases * length,
                max_denoising_steps=sampler.steps,
                sampler_config=theirs.EntropyBoundSamplerConfig(entropy_bound=sampler.entropy_bound),
                t_min=sampler.t_min,
                t_max=sampler.t_max,
                stability_threshold=sampler.stability,
                confidence_threshold=sampler.confidence,
                eos_token_id=eos,
                pad_token_id=0,
            ),
        )
    return Trace(canvases=passes, tokens=out.sequences[0, len(prompt) :].numpy())


def ours(
    ops: Ops,
    model: Model,
    prompt: np.ndarray,
    sampler: SamplerConfig,
    *,
    seed: int,
    canvases: int,
    eos: int | None = None,
) -> Trace:
    """Run the graph's own step in the plainest loop there is; the engine's is held to this one elsewhere."""
    config = model.config
    length = config.canvas_length
    noise = Noise(seed=seed, length=length, vocab_size=config.vocab_size)
    cache = hf.encoded(ops, model, [prompt], spare=canvases * length)
    passes: list[list[Pass]] = []
    tokens: list[np.ndarray] = []
    for canvas in range(canvases):
        state = start(ops, ops.asarray(noise(canvas, 0)[1][None]), config.hidden_size)
        passes.append([])
        for n in range(sampler.steps):
            draws = draws_of(sampler, seed=seed, canvas=canvas, step=n, length=length, vocab_size=config.vocab_size)
            state = step(ops, model, cache, state, on_device(ops, draws))
            passes[-1].append(
                Pass(
                    accepted=ops.to_numpy(state.accepted)[0],
                    canvas=ops.to_numpy(state.canvas)[0],
                    argmax=ops.to_numpy(state.argmax)[0],
                    entropy=ops.to_numpy(state.entropy)[0],
                    stop=bool(ops.to_numpy(state.stop)[0]),
                )
            )
            if passes[-1][-1].stop:
                break
        tokens.append(passes[-1][-1].argmax)
        if eos is not None and eos in tokens[-1]:
            ended = np.cumsum(tokens[-1] == eos) - (tokens[-1] == eos) > 0
            tokens[-1] = np.where(ended, 0, tokens[-1])  # transformers pads what follows the first end
            break
        cache = encode(ops, model, cache, state.argmax)
    return Trace(canvases=passes, tokens=np.concatenate(tokens))
