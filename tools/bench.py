"""How fast a model of a given shape runs here: random weights of the real sizes and formats, no file, real passes.

A canvas is a fixed number of denoising passes and the pass that reads it into the cache, as the engine runs them; its
256 tokens over that time are the emitted tokens per second. Random weights route to nearly every expert, as the real
ones do, so speed needs no others. What they cannot show is what depends on the text: how many passes a canvas takes
where stopping is adaptive, and how peaked the vocabulary's distribution is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ..checkpoints.quant import Format, QTensor, pack, to_bf16
from ..checkpoints.quantized import module_of
from ..checkpoints.weights import build, shapes
from ..convert import recipes
from ..convert.plan import wanted_format
from ..core import sampler as sampling
from ..core.config import ModelConfig, SamplerConfig
from ..core.engine import Engine, Request
from ..core.errors import DgemmaError
from ..core.events import Done, Draft
from ..core.memory import WIDTH, cache_bytes
from ..core.model import (
    Attention,
    Cache,
    Experts,
    Layer,
    Mlp,
    Model,
    RmsNorm,
    Router,
    SelfConditioning,
    encode,
    encode_and_step,
    new_cache,
    step,
)  # fmt: skip
from ..core.ops import Array, Ops
from ..core.random import step_noise

Shape = Literal["26b", "110m", "nano-like"]

SIZES: dict[str, dict[str, Any]] = {
    # The released model; its config.json is rebuilt in shared copies and tested against this.
    "26b": dict(
        vocab_size=262_144, hidden_size=2816, intermediate_size=2112, moe_intermediate_size=704, num_experts=128,
        top_k_experts=8, num_hidden_layers=30, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, global_head_dim=512, num_global_key_value_heads=2,
        sliding_window=1024, max_position_embeddings=262_144,
    ),
    "110m": dict(
        vocab_size=32_768, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_experts=32,
        top_k_experts=4, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, global_head_dim=128, num_global_key_value_heads=2,
        sliding_window=1024, max_position_embeddings=65_536,
    ),
    "nano-like": dict(
        vocab_size=272, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_experts=8,
        top_k_experts=2, num_hidden_layers=6, layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, global_head_dim=64, num_global_key_value_heads=1,
        sliding_window=64, max_position_embeddings=65_536,
    ),
}  # fmt: skip
CANVAS = {"26b": 256, "110m": 256, "nano-like": 48}
SPREAD = 0.02
"""Standard deviation of the weights."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    shape: Shape = "26b"
    recipe: str = "4bit"
    steps: int = 16
    context: int = 1024
    """Tokens in the cache before the first canvas."""
    batch: int = 1
    canvases: int = 4
    """Timed, after one that is not."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Times in seconds, sizes in bytes."""

    canvas: float
    """Median of a canvas: its denoising passes and the pass that reads it."""
    forward: float
    """Of one pass: canvas / (steps + 1)."""
    denoise: float
    """Median of a denoising pass by itself."""
    commit: float
    """Median of the pass that reads a canvas."""
    prefill: float
    first_draft: float
    """From the prompt to the first canvas on the host, everything compiled already; one sequence."""
    tokens_per_second: float
    engine_tokens_per_second: float
    """Through the whole engine, drafts and text handling included; one sequence."""
    weights: int
    """As held."""
    forward_bytes: int
    """That a denoising pass has to read: the weights, once each, and the cache."""
    peak: int | None


def settings(shape: str) -> dict[str, Any]:
    """Return the config.json of a shape."""
    text = SIZES[shape] | dict(
        model_type="diffusion_gemma_text", hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0,
        rms_norm_eps=1e-6, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
        use_bidirectional_attention="vision",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
    )  # fmt: skip
    return dict(
        architectures=["DiffusionGemmaForBlockDiffusion"], model_type="diffusion_gemma", canvas_length=CANVAS[shape],
        tie_word_embeddings=True, eos_token_id=[1], text_config=text,
    )  # fmt: skip


def config_of(shape: str) -> ModelConfig:
    return ModelConfig.from_hf(settings(shape), where=shape)


# ---- Weights ------------------------------------------------------------------------------------------------------


def formats(config: ModelConfig, recipe: str) -> dict[str, Format | None]:
    """Return what a recipe makes of each weight; None for bf16, and for vectors."""
    found = recipes.find(recipe)
    return {name: wanted_format(module_of(name), shape, found) for name, shape in shapes(config).items()}


def random_model(
    ops: Ops, config: ModelConfig, recipe: str, make: Callable[[tuple[int, ...], Format | None, int], Any] | None = None
) -> Model:
    """Return a model of random weights; `make` takes a shape, a format and a seed, by default `random_weight`."""
    kinds, sizes = formats(config, recipe), shapes(config)
    seeds = {name: i for i, name in enumerate(sizes)}
    return build(ops, config, lambda name: (make or random_weight)(sizes[name], kinds[name], seeds[name]))


def random_weight(shape: tuple[int, ...], kind: Format | None, seed: int) -> QTensor | np.ndarray:
    """Return N(0, 0.02) weights, or ones for a vector; a format's codes are drawn as they are, and fitted to nothing.

    Codes are symmetric about zero: a mean would add up over the layers until every token chose the same experts.
    """
    generator = np.random.default_rng(seed)
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    if kind is None:
        draw = generator.standard_normal(shape, np.float32)
        return (draw * np.float32(SPREAD)).astype(ml_dtypes.bfloat16)
    grouped = (*shape[:-1], shape[-1] // kind.group_size)
    if kind.mode == "affine":
        zero, spread = affine_codes(kind.bits)
        codes = np.rint(generator.standard_normal(shape, np.float32) * spread).clip(1 - zero, zero - 1) + zero
        scale = np.full(grouped, SPREAD / spread, np.float32)
        biases = None if kind.symmetric else to_bf16(-zero * scale)
        return QTensor(words=pack(codes.astype(np.uint8), kind.bits), scales=to_bf16(scale), biases=biases, format=kind)
    codes = generator.integers(0, 1 << kind.bits, shape, np.uint8)
    if kind.bits == 8:
        codes &= 0xBF  # below 2, and never NaN
    scale = np.full(grouped, float_scale(kind.mode), np.uint8)
    return QTensor(words=pack(codes, kind.bits), scales=scale, format=kind)


def affine_codes(bits: int) -> tuple[int, float]:
    """Return the zero point and the codes' standard deviation: clipped at 2.7 of it for 4 bits, 3.6 for 8."""
    zero = 1 << (bits - 1)
    return zero, zero / (2.7 if bits <= 4 else 3.6)


def float_scale(mode: str) -> int:
    """Return a scale's byte that brings random codes to about N(0, 0.02) in size."""
    return {"nvfp4": 3, "mxfp4": 127 - 7, "mxfp8": 127 - 5}[mode]


# ---- The loop -----------------------------------------------------------------------------------------------------


class Loop:
    """The compiled passes over one batch, as the engine compiles them."""

    def __init__(self, ops: Ops, model: Model, plan: Plan, passed: Callable[[], None] = lambda: None) -> None:
        """`passed` is called after each pass that has been started."""
        self.ops, self.model, self.plan, self._passed = ops, model, plan, passed
        baked = SamplerConfig(steps=plan.steps, schedule_steps=plan.steps, confidence=0.0)
        self._step = ops.compile(lambda *arrays: step(ops, model, baked, *arrays))
        self._encode = ops.compile(lambda cache, tokens, fresh: encode(ops, model, cache, tokens, fresh))
        self._joined = ops.compile(lambda *arrays: encode_and_step(ops, model, baked, *arrays))
        self._sampler = baked

    def encode(self, cache: Cache, tokens: Array) -> Cache:
        """Read tokens int32 [B, L], all of them."""
        length = tokens.shape[1]
        self._passed()
        if length not in self.ops.encode_sizes:
            return encode(self.ops, self.model, cache, tokens)
        before = int(cache.length)
        after = self._encode(Cache(cache.layers, self.ops.extent(before)), tokens, self.ops.extent(length))
        return Cache(after.layers, before + length)

    def prompt(self, *, room: int) -> Cache:
        """Read a random prompt into a cache with room for so many tokens more."""
        ops, config, plan = self.ops, self.model.config, self.plan
        chunk = max(ops.prefill_chunk, config.canvas_length, *ops.encode_sizes)
        scratch = max(chunk, 2 * config.canvas_length)  # two canvases are what a joined pass lays down
        cache = new_cache(ops, config, batch=plan.batch, capacity=plan.context + room, chunk=scratch)
        generator = np.random.default_rng(1)
        for at in range(0, plan.context, chunk):
            size = min(chunk, plan.context - at)
            tokens = generator.integers(3, config.vocab_size, (plan.batch, size), np.int32)
            cache = self.encode(cache, ops.asarray(tokens))
        return cache

    def state(self, seed: int) -> sampling.StepState:
        return sampling.start(self.ops, self._noise(seed, 0)[1], self.model.config.hidden_size)

    def step(self, cache: Cache, state: sampling.StepState, index: int, seed: int) -> sampling.StepState:
        """One denoising pass; `cache.length` is what `ops.extent` returned."""
        self._passed()
        return self._step(cache, state, *self._draws(index, seed))

    def join(self, cache: Cache, tokens: Array, seed: int) -> tuple[Cache, sampling.StepState]:
        """Read a canvas in the next one's first pass; return that one's state with the cache."""
        before = int(cache.length)
        inside = Cache(cache.layers, self.ops.extent(before))
        after, state = self._joined(inside, tokens, self.state(seed), *self._draws(0, seed))
        return Cache(after.layers, before + tokens.shape[1]), state

    def canvas(self, cache: Cache, seed: int, read: Callable[[np.ndarray], None] = lambda tokens: None) -> Cache:
        """Denoise a canvas, hand the host every draft, as the engine does, and read the last into the cache."""
        ops, pending = self.ops, []
        inside = Cache(cache.layers, ops.extent(int(cache.length)))
        state = self.state(seed)
        for i in range(self.plan.steps):
            state = self.step(inside, state, i, seed)
            pending.append(ops.fetch(state.argmax, state.accepted, state.entropy, state.stop))
            if len(pending) > ops.lookahead:
                read(pending.pop(0)()[0])
        after = self.encode(cache, state.argmax)
        for rest in pending:
            read(rest()[0])
        return after

    def wait(self, cache: Cache) -> None:
        self.ops.synchronize(*(array for layer in cache.layers for array in layer))

    def _draws(self, index: int, seed: int) -> tuple[Array, Array, Array]:
        heat = self.ops.asarray(np.full((1, 1), self._sampler.temperature(index), np.float32))
        return heat, *self._noise(seed, index + 1)

    def _noise(self, seed: int, index: int) -> tuple[Array, Array]:
        config = self.model.config
        draws = [
            step_noise(seed=seed, canvas=row, step=index, length=config.canvas_length, vocab_size=config.vocab_size)
            for row in range(self.plan.batch)
        ]
        return self.ops.asarray(np.stack([u for u, _ in draws])), self.ops.asarray(np.stack([t for _, t in draws]))


def measure(ops: Ops, model: Model, plan: Plan, passed: Callable[[], None] = lambda: None) -> Result:
    """Time a plan. What comes first, and compiles, does not count; `passed` is called with every pass.

    Raises:
        DgemmaError: a context that the model does not have room for.
    """
    config = model.config
    if plan.context + _room(plan, config) > config.max_positions:
        raise DgemmaError(f"a context of {plan.context:,} and {plan.canvases} canvases exceed the model's")
    passes = Loop(ops, model, plan, passed)
    canvas, denoise, commit = _times(passes)
    engine_rate, first_draft = _through_the_engine(ops, model, plan, passed)
    prefill = min(_timed(passes, lambda: passes.prompt(room=_room(plan, config)))[1] for _ in range(2))
    held = weight_bytes(model)
    return Result(
        canvas=canvas,
        forward=canvas / (plan.steps + 1),
        denoise=denoise,
        commit=commit,
        prefill=prefill,
        first_draft=first_draft,
        tokens_per_second=plan.batch * config.canvas_length / canvas,
        engine_tokens_per_second=engine_rate,
        weights=held,
        forward_bytes=held + cache_bytes(config, plan.context, WIDTH[ops.dtype], slots=plan.batch),
        peak=ops.memory(),
    )


def _room(plan: Plan, config: ModelConfig) -> int:
    return (plan.canvases + 1) * config.canvas_length


def _timed(passes: Loop, run: Callable[[], Cache]) -> tuple[Cache, float]:
    began = time.perf_counter()
    cache = run()
    passes.wait(cache)
    return cache, time.perf_counter() - began


def _times(passes: Loop) -> tuple[float, float, float]:
    """Seconds of a canvas, of a denoising pass and of a commit, medians."""
    ops, plan, length = passes.ops, passes.plan, passes.model.config.canvas_length
    cache = passes.prompt(room=_room(plan, passes.model.config))
    cache, _ = _timed(passes, lambda: passes.canvas(cache, 0))
    canvases = []
    for seed in range(plan.canvases):
        cache, seconds = _timed(passes, lambda c=cache, s=seed: passes.canvas(c, s + 1))
        canvases.append(seconds)
    before = Cache(cache.layers, int(cache.length) - length)
    inside = Cache(cache.layers, ops.extent(int(before.length)))

    def several() -> Cache:
        state = passes.state(0)
        for i in range(plan.steps):
            state = passes.step(inside, state, i, 0)
        ops.fetch(state.stop)()
        return inside

    tokens = passes.state(0).canvas
    denoise = [_timed(passes, several)[1] / plan.steps for _ in range(3)]
    commit = [_timed(passes, lambda: passes.encode(before, tokens))[1] for _ in range(5)]
    return statistics.median(canvases), statistics.median(denoise), statistics.median(commit)


def drafts(ops: Ops, model: Model, plan: Plan) -> list[np.ndarray]:
    """Return every draft of `plan.canvases` canvases: what a compiled loop and a plain one must agree on."""
    passes = Loop(ops, model, plan)
    cache = passes.prompt(room=plan.canvases * model.config.canvas_length)
    found: list[np.ndarray] = []
    for seed in range(plan.canvases):
        cache = passes.canvas(cache, seed, found.append)
    return found


def _through_the_engine(ops: Ops, model: Model, plan: Plan, passed: Callable[[], None]) -> tuple[float, float]:
    """Tokens per second after the prefill, and seconds to the first draft, of one sequence; the second run counts."""
    config = model.config
    generator = np.random.default_rng(2)
    request = Request(
        prompt=tuple(generator.integers(3, config.vocab_size, plan.context).tolist()),
        max_new_tokens=plan.canvases * config.canvas_length, seed=0, eos_token_ids=(),
        sampler=SamplerConfig(steps=plan.steps, schedule_steps=plan.steps, confidence=0.0),
    )  # fmt: skip
    engine = Engine(ops, model, None)
    stats = None
    for _ in range(2):
        for event in engine.generate(request):
            passed()
            if isinstance(event, Draft):
                assert event.tokens.shape == (config.canvas_length,)
            if isinstance(event, Done):
                stats = event.stats
    assert stats is not None and stats.steps == plan.steps * plan.canvases
    return stats.tokens_per_second or math.nan, stats.first_draft_seconds or math.nan


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights as they are held, each once; the embedding is also the head."""
    if isinstance(model, tuple):
        return sum(map(weight_bytes, model))
    if isinstance(model, _PARTS):
        return sum(weight_bytes(getattr(model, field.name)) for field in fields(model) if field.name != "config")
    return 0 if model is None or isinstance(model, int | float) else int(model.nbytes)


_PARTS = (Model, Layer, Attention, Mlp, Router, Experts, RmsNorm, SelfConditioning)
