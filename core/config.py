"""Model and generation settings, read from a checkpoint's JSON files.

Only this module knows Hugging Face's spellings, and `hf_keys.py` those without effect. Every key is either used,
checked against the one value the graph supports, or listed there; anything else is refused by name, because a key that
is dropped in silence is a model that is run wrongly in silence. Keys that are missing have transformers' defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from . import hf_keys
from .errors import DgemmaError
from .hf_layers import read_full_shape, read_ropes
from .reader import Reader, show

LayerKind = Literal["sliding_attention", "full_attention"]

_UNTIED = ": where lm_head and the encoder are copies, set it so; a copy that differs is then named"

COLDEST = 1e-3
"""The lowest temperature: zero would be divided by."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One layer kind: its heads, window and rotary frequencies."""

    kind: LayerKind
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    rope_theta: float
    rotary_dims: int
    """How many of the head's dimensions rotate; the rest have frequency zero ("proportional" RoPE)."""

    def inverse_frequencies(self) -> tuple[float, ...]:
        """Return `head_dim // 2` inverse frequencies in radians per position.

        The exponent's denominator is the whole head even where only a part of it rotates
        (transformers `_compute_proportional_rope_parameters`).
        """
        turning = self.rotary_dims // 2
        rates = [self.rope_theta ** -(2 * i / self.head_dim) for i in range(turning)]
        return tuple(rates + [0.0] * (self.head_dim // 2 - turning))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a DiffusionGemma text model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    expert_size: int
    experts: int
    experts_per_token: int
    layers: tuple[AttentionConfig, ...]
    canvas_length: int
    max_positions: int
    norm_eps: float
    softcap: float
    pad_token_id: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    image_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a `config.json` in any published spelling.

        Both spellings of the full-attention head size are accepted: `global_head_dim` with
        `num_global_key_value_heads`, and the `per_layer_config` that newer transformers write.

        Raises:
            DgemmaError: an unknown key, a missing key, or a value that the graph does not support.
        """
        return _read_config(Reader(data, where))


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a canvas is denoised; the field's names and defaults are the reference's (`generation_config.json`)."""

    steps: int = 48
    """Cap on the denoising passes of one canvas."""
    schedule_steps: int = 48
    """Length of the temperature schedule. Apart from `steps`, so that a lower cap does not heat the canvas."""
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    """Nats. Tokens are accepted in order of rising entropy while the sum of those before them is within it."""
    confidence: float = 0.005
    """Nats. A stable canvas stops when its mean entropy is below it."""
    stability: int = 1
    """How many earlier argmax canvases must equal the newest; 0 asks for confidence alone."""
    greedy: bool = False
    """Accepted positions take their most probable token, not one that is drawn. Entropies, and with them what is
    accepted and when a canvas is finished, stay those of the schedule."""

    def __post_init__(self) -> None:
        for name in ("steps", "schedule_steps"):
            _check(name, getattr(self, name), int, 1, 100_000)
        _check("stability", self.stability, int, 0, 100_000)
        if not isinstance(self.greedy, bool):
            raise DgemmaError(f"greedy is {show(self.greedy)}, expected True or False")
        if self.t_max == 0 and not isinstance(self.t_max, bool):
            raise DgemmaError("t_max is 0, which divides by zero: for the most probable tokens use greedy (--greedy)")
        # A zero temperature divides by zero; the reference allows t_min = 0 because its last step never reaches it.
        floats = {"t_min": (0.0, 100.0), "t_max": (COLDEST, 100.0), "entropy_bound": (0.0, math.inf),
                  "confidence": (0.0, math.inf)}  # fmt: skip
        for name, (low, high) in floats.items():
            value = getattr(self, name)
            _check(name, value, float, low, high)
            # The graph compares in float32, which has infinity but nothing of this size.
            object.__setattr__(self, name, math.inf if value > 1e30 else float(value))
        if self.t_max < self.t_min:
            raise DgemmaError(f"t_max is {self.t_max}, below t_min {self.t_min}: give t_max ≥ t_min")

    def temperature(self, step: int) -> float:
        """Temperature of pass `step` (0 is the first). Passes beyond the schedule keep its last temperature."""
        remaining = max(self.schedule_steps - step, 1)
        return max(self.t_min + (self.t_max - self.t_min) * (remaining / self.schedule_steps), COLDEST)


DEFAULT_BUDGET = 256
"""New tokens at most, where neither the caller nor the checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a checkpoint's `generation_config.json` asks for."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    max_new_tokens: int | None = None
    max_length: int | None = None
    """Tokens of prompt and answer together, where `max_new_tokens` is not given."""
    eos_token_ids: tuple[int, ...] = ()
    """What ends an answer; where there is none, the ids of `config.json` do."""

    def budget(self, prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt by default: `max_new_tokens`, what `max_length` leaves, or 256.

        Raises:
            DgemmaError: `max_length` leaves nothing.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_BUDGET
        if self.max_length <= prompt_tokens:
            raise DgemmaError(
                f"the prompt has {prompt_tokens:,} tokens and generation_config.json's max_length, prompt and answer "
                f"together, is {self.max_length:,}: give max_new_tokens"
            )
        return self.max_length - prompt_tokens

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, where: str = "generation_config.json") -> GenerationConfig:
        """Read a `generation_config.json`; a null means "the default", as in transformers.

        Raises:
            DgemmaError: an unknown key or a value out of range.
        """
        return cls._read(Reader(data, where))

    @classmethod
    def _read(cls, read: Reader) -> GenerationConfig:
        default = SamplerConfig()
        schedule = read.integer("max_denoising_steps", default.schedule_steps, low=1, high=100_000)
        bound = default.entropy_bound
        if (sampler := read.take("sampler_config", None)) is not None:
            inner = read.child("sampler_config", sampler)
            inner.only("_cls_name", "EntropyBoundSamplerConfig")
            bound = inner.number("entropy_bound", bound, low=0.0)
            inner.finish()
        fields = {
            "t_min": read.number("t_min", default.t_min, low=0.0),
            "t_max": read.number("t_max", default.t_max, low=0.0),
            "stability": read.integer("stability_threshold", default.stability, low=0),
            "confidence": read.number("confidence_threshold", default.confidence, low=0.0),
        }
        result = cls(
            sampler=_named(
                read.where,
                lambda: replace(default, steps=schedule, schedule_steps=schedule, entropy_bound=bound, **fields),
            ),
            max_new_tokens=read.integer("max_new_tokens", low=1) if "max_new_tokens" in read.data else None,
            max_length=read.integer("max_length", low=1) if "max_length" in read.data else None,
            eos_token_ids=read.token_ids("eos_token_id"),
        )
        read.ignore(hf_keys.GENERATION)
        read.finish()
        return result


def _check(name: str, value: Any, kind: type, low: float, high: float) -> None:
    good = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # NaN fails every comparison
        noun = "a number" if kind is float else "an integer"
        bound = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise DgemmaError(f"{name} is {show(value)}, expected {noun} {bound}")


def _named(where: str, make: Any) -> Any:
    try:
        return make()
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from None


def ignored_keys(data: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of config.json and generation_config.json that change nothing and were left out.

    Raises:
        DgemmaError: as `from_hf`, of either.
    """
    config, settings = Reader(data, "config.json"), Reader(generation, "generation_config.json")
    _read_config(config)
    GenerationConfig._read(settings)
    # What a quantization says is read with the weights, in quantized.py and layouts.py.
    top = (key for key in config.ignored if key not in ("quantization", "quantization_config"))
    return (*top, *(f"generation_config.{key}" for key in settings.ignored))


def _read_config(read: Reader) -> ModelConfig:
    read.only("model_type", "diffusion_gemma")
    read.only("tie_word_embeddings", True, advice=_UNTIED)
    image = read.token_ids("image_token_id")
    # No softcapping, all layers alike, no such token: these nulls are values, another is as good as no key.
    nulls = ("final_logit_softcapping", "per_layer_config", *(f"{name}_token_id" for name in ("eos", "pad", "bos")))
    text = read.child("text_config", read.take("text_config"), nulls=nulls)
    top = {name: read.token_ids(f"{name}_token_id") for name in ("eos", "pad", "bos")}
    canvas = read.integer("canvas_length", 256, high=1 << 20)
    read.ignore(hf_keys.TOP)
    read.finish()

    text.only("model_type", "diffusion_gemma_text")
    text.only("hidden_activation", "gelu_pytorch_tanh")
    text.only("attention_bias", False)
    text.only("tie_word_embeddings", True, False)  # the key above is the one that counts, in transformers too
    text.only("use_bidirectional_attention", "vision")  # of images; text is the same without
    vocab = text.integer("vocab_size", 262_144)
    ids = {}
    for name, usual in (("eos", 1), ("pad", 0), ("bos", 2)):
        silent = f"{name}_token_id" not in text.data and not top[name] and usual < vocab
        own = text.token_ids(f"{name}_token_id")
        ids[name] = (usual,) if silent else top[name] or own if name == "eos" else own or top[name]
    experts = text.integer("num_experts")
    per_token = text.integer("top_k_experts")
    if per_token > experts:
        raise DgemmaError(f"{text.where}: top_k_experts is {per_token}, more than num_experts {experts}")
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=text.integer("hidden_size", 2304),
        intermediate_size=text.integer("intermediate_size", 9216),
        expert_size=text.integer("moe_intermediate_size"),
        experts=experts,
        experts_per_token=per_token,
        layers=_read_layers(text),
        canvas_length=canvas,
        max_positions=text.integer("max_position_embeddings", 131_072),
        norm_eps=text.number("rms_norm_eps", 1e-6, low=0.0),
        softcap=text.number("final_logit_softcapping", 30.0, low=0.0, above=True),
        pad_token_id=next(iter(ids["pad"]), 0),
        bos_token_id=next(iter(ids["bos"]), None),
        eos_token_ids=ids["eos"],
        image_token_ids=image,
    )
    text.ignore(hf_keys.TEXT)
    text.finish()
    for name, values in ids.items():
        if any(i >= vocab for i in values):
            raise DgemmaError(f"{text.where}: {name}_token_id is {show(values)}, outside the vocabulary of {vocab}")
        if name != "eos" and len(values) > 1:
            raise DgemmaError(f"{text.where}: {name}_token_id is {show(values)}, expected one id")
    return config


def _read_layers(text: Reader) -> tuple[AttentionConfig, ...]:
    count = text.integer("num_hidden_layers", 30, high=10_000)
    kinds: Any = text.take("layer_types", None)
    if kinds is None:  # five sliding layers to each full one
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise DgemmaError(f"{text.where}: layer_types must name {count} layers, each {known[0]} or {known[1]}")
    kinds = [*kinds[:-1], "full_attention"]  # whatever was written: transformers does so too
    heads = text.integer("num_attention_heads", 8, high=1 << 16)
    kv_heads = text.integer("num_key_value_heads", 4, high=1 << 16)
    head_dim = text.integer("head_dim", 256, high=1 << 16)
    window = text.integer("sliding_window", 512, low=2)
    full_dim, full_kv = read_full_shape(text, kinds, head_dim, kv_heads)
    ropes = read_ropes(text)

    def attention(kind: LayerKind) -> AttentionConfig:
        full = kind == "full_attention"
        dim, kv = (full_dim, full_kv) if full else (head_dim, kv_heads)
        theta, share = ropes[kind]
        if heads % kv:
            raise DgemmaError(f"{text.where}: {heads} attention heads do not divide over {kv} key-value heads")
        if dim % 2:
            raise DgemmaError(f"{text.where}: the head dimension {dim} of {kind} is odd; RoPE needs pairs")
        return AttentionConfig(
            kind=kind,
            heads=heads,
            kv_heads=kv,
            head_dim=dim,
            window=None if full else window,
            rope_theta=theta,
            rotary_dims=2 * int(share * dim // 2),
        )

    made = {kind: attention(kind) for kind in dict.fromkeys(kinds)}
    return tuple(made[kind] for kind in kinds)
