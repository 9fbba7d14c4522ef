"""How fast a model of a given shape runs here: random weights of the real sizes and formats, no file, real passes.

A canvas is a fixed number of denoising passes and the pass that reads it into the cache; its 256 tokens over that time
are the emitted tokens per second. Two ways of running them are timed: passes over a plain batch, in which no row joins
or leaves, and the engine with requests that arrive at once. Random weights route to nearly every expert, as the real
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
from ..core.config import ModelConfig, SamplerConfig
from ..core.engine import Engine
from ..core.errors import DgemmaError
from ..core.events import Done, Draft, Stats
from ..core.graph_passes import GraphPasses
from ..core.memory import WIDTH, cache_bytes
from ..core.parts import Attention, Experts, Layer, Mlp, Model, RmsNorm, Router, SelfConditioning
from ..core.passes import Passes, StepResult
from ..core.row import Request
from ..core.sampler import draws_of, first_canvas, stacked

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
    """Through the whole engine, drafts included; one sequence."""
    arriving_tokens_per_second: float | None
    """The same of as many requests as the batch has rows, added at once, without the time that a batch's prompts take;
    None for a batch of one."""
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


Make = Callable[[tuple[int, ...], Format | None, int], Any]
"""Makes a weight of a shape, a format and a seed."""


def weights_of(config: ModelConfig, recipe: str, make: Make | None = None) -> Callable[[str], Any]:
    """Return what makes a random weight by its name; `make` is `random_weight` where nothing else is given."""
    kinds, sizes = formats(config, recipe), shapes(config)
    seeds = {name: i for i, name in enumerate(sizes)}
    return lambda name: (make or random_weight)(sizes[name], kinds[name], seeds[name])


def random_model(ops: Any, config: ModelConfig, recipe: str, make: Make | None = None) -> Model:
    """Return a model of random weights for some ops."""
    weight = weights_of(config, recipe, make)
    return build(config, lambda name: ops.pack(weight(name)))


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


# ---- A plain batch ------------------------------------------------------------------------------------------------


class Batch:
    """A plan's rows in slots of their own, denoised side by side; what has read a random prompt begins it."""

    def __init__(
        self, passes: Passes, plan: Plan, *, room: int, passed: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        """`room` is of tokens behind the prompts; `passed` is called after each pass that has been started."""
        self.passes, self.plan, self._passed = passes, plan, passed
        self.length, self._vocab = passes.config.canvas_length, passes.config.vocab_size
        self._sampler = _sampler(plan)
        tokens = np.random.default_rng(1).integers(3, self._vocab, (plan.batch, plan.context), np.int32)
        self.slots = [passes.open(plan.context + room, self.length) for _ in range(plan.batch)]
        for at in range(0, plan.context, passes.chunk):
            self.read(tokens[:, at : at + passes.chunk])

    def read(self, tokens: np.ndarray) -> None:
        """Read tokens int32 [B, C]."""
        self.passes.read(list(zip(self.slots, tokens, strict=True)))
        self._passed()

    def step(self, index: int, seed: int) -> Callable[[], StepResult]:
        """Run one denoising pass; with the first a canvas begins."""
        draws = [
            draws_of(self._sampler, seed=seed, canvas=row, step=index, length=self.length, vocab_size=self._vocab)
            for row in range(self.plan.batch)
        ]
        starts = {}
        if index == 0:
            starts = {slot: first_canvas(seed, row, self.length, self._vocab) for row, slot in enumerate(self.slots)}
        results = self.passes.step(self.slots, stacked(draws), starts)
        self._passed()
        return results

    def steps(self, seed: int, see: Callable[[np.ndarray], None] = lambda tokens: None) -> np.ndarray:
        """Denoise a canvas and hand every draft to `see`; return the last, int32 [B, L]."""
        pending: list[Callable[[], StepResult]] = []
        last = np.zeros(0, np.int32)
        for index in range(self.plan.steps + self.passes.lookahead):
            if index < self.plan.steps:
                pending.append(self.step(index, seed))
            if index >= self.passes.lookahead:
                see(last := pending.pop(0)().argmax)
        return last

    def close(self) -> None:
        for slot in self.slots:
            self.passes.close(slot)


def _sampler(plan: Plan) -> SamplerConfig:
    return SamplerConfig(steps=plan.steps, schedule_steps=plan.steps, confidence=0.0)


def measure(passes: GraphPasses, plan: Plan, passed: Callable[[], None] = lambda: None) -> Result:
    """Time a plan. What comes first, and compiles, does not count; `passed` is called with every pass.

    Raises:
        DgemmaError: a context that the model does not have room for.
    """
    config = passes.config
    if plan.context + _room(plan, config) > config.max_positions:
        raise DgemmaError(f"a context of {plan.context:,} and {plan.canvases} canvases exceed the model's")
    engine = Engine(passes, None, most_rows=plan.batch, prefix_bytes=0)  # nothing is read that was read before
    canvas, denoise, commit = _times(engine, plan, passed)
    _, alone = arriving(engine, plan, 1, passed)
    rows = arriving(engine, plan, plan.batch, passed)[0] if plan.batch > 1 else None
    prefill = min(_prompt_time(engine, plan, passed) for _ in range(2))
    held, count = weight_bytes(passes.model), plan.batch * plan.canvases * config.canvas_length
    return Result(
        canvas=canvas,
        forward=canvas / (plan.steps + 1),
        denoise=denoise,
        commit=commit,
        prefill=prefill,
        first_draft=alone.first_draft_seconds or math.nan,
        tokens_per_second=plan.batch * config.canvas_length / canvas,
        engine_tokens_per_second=alone.tokens_per_second or math.nan,
        arriving_tokens_per_second=None if rows is None else count / max(rows - prefill, 1e-9),
        weights=held,
        forward_bytes=held + cache_bytes(config, plan.context, WIDTH[passes.dtype], slots=plan.batch),
        peak=passes.peak(),
    )


COMMITS = 5
"""Passes that read a canvas, timed by themselves."""


def _room(plan: Plan, config: ModelConfig) -> int:
    return (plan.canvases + 1 + COMMITS) * config.canvas_length


def timed(engine: Engine, run: Callable[[], Any]) -> float:
    """Return the seconds of work in the engine's thread."""

    def work() -> float:
        began = time.perf_counter()
        run()
        engine.passes.wait()
        return time.perf_counter() - began

    return engine.run("measuring", work)


def _times(engine: Engine, plan: Plan, passed: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds of a canvas, of a denoising pass and of a commit, medians."""
    passes, length = engine.passes, engine.passes.config.canvas_length
    batch = engine.run("measuring", lambda: Batch(passes, plan, room=_room(plan, passes.config), passed=passed))
    canvases = [timed(engine, lambda s=seed: batch.read(batch.steps(s))) for seed in range(plan.canvases + 1)][1:]
    denoise = [timed(engine, lambda: batch.steps(0)) / plan.steps for _ in range(3)]
    tokens = np.stack([first_canvas(0, row, length, passes.config.vocab_size) for row in range(plan.batch)])
    commit = [timed(engine, lambda: batch.read(tokens)) for _ in range(COMMITS)]
    engine.run("measuring", batch.close)
    return statistics.median(canvases), statistics.median(denoise), statistics.median(commit)


def _prompt_time(engine: Engine, plan: Plan, passed: Callable[[], None]) -> float:
    room, made = _room(plan, engine.passes.config), []
    seconds = timed(engine, lambda: made.append(Batch(engine.passes, plan, room=room, passed=passed)))
    engine.run("measuring", made[0].close)
    return seconds


def drafts(passes: Passes, plan: Plan) -> list[np.ndarray]:
    """Return every draft of `plan.canvases` canvases: what captured passes and plain ones must agree on."""
    found: list[np.ndarray] = []
    engine = Engine(passes, None, prefix_bytes=0)

    def run() -> None:
        batch = Batch(passes, plan, room=plan.canvases * passes.config.canvas_length)
        for seed in range(plan.canvases):
            batch.read(batch.steps(seed, found.append))
        batch.close()

    engine.run("comparing", run)
    return found


# ---- The engine ---------------------------------------------------------------------------------------------------


def arriving(
    engine: Engine, plan: Plan, rows: int, passed: Callable[[], None] = lambda: None
) -> tuple[float, Stats]:  # fmt: skip
    """Add so many requests at once and read what comes: the seconds until all are done, and the first one's figures.

    The second of two runs counts.
    """
    config = engine.passes.config
    prompts = np.random.default_rng(2).integers(3, config.vocab_size, (rows, plan.context))
    requests = [
        Request(
            prompt=tuple(prompt.tolist()), max_new_tokens=plan.canvases * config.canvas_length, seed=i,
            eos_token_ids=(), sampler=_sampler(plan),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    stats, seconds = None, math.nan
    for _ in range(2):
        began = time.perf_counter()
        handles = [engine.add(request) for request in requests]
        for event in handles[0].events():
            passed()
            if isinstance(event, Draft):
                assert event.tokens.shape == (config.canvas_length,)
            if isinstance(event, Done):
                stats = event.stats
        for handle in handles[1:]:
            assert isinstance([*handle.events()][-1], Done)
        seconds = time.perf_counter() - began
    assert stats is not None and stats.steps == plan.steps * plan.canvases
    return seconds, stats


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights as they are held, each once; the embedding is also the head."""
    if isinstance(model, tuple):
        return sum(map(weight_bytes, model))
    if isinstance(model, _PARTS):
        names = {field.name for field in fields(model)} - {"config"}
        for whole, parts in _STACKED.items():
            if getattr(model, whole, None) is not None:
                names -= set(parts)  # which are views of it
        return sum(weight_bytes(getattr(model, name)) for name in names)
    return 0 if model is None or isinstance(model, int | float) else int(model.nbytes)


_PARTS = (Model, Layer, Attention, Mlp, Router, Experts, RmsNorm, SelfConditioning)
_STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
