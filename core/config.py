"""Model and generation settings, read from a checkpoint's JSON files.

Only this module knows Hugging Face's spellings. Every key is either used, checked against the one value the graph
supports, or listed as having no effect on inference; anything else is refused by name, because a key that is dropped
in silence is a model that is run wrongly in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .errors import DgemmaError

LayerKind = Literal["sliding_attention", "full_attention"]

_MAX_SIZE = 1 << 31  # any dimension beyond this is a corrupt file, not a model


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
        return _read_config(_Reader(data, where))


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

    def __post_init__(self) -> None:
        for name in ("steps", "schedule_steps"):
            _check(name, getattr(self, name), int, 1, 100_000)
        _check("stability", self.stability, int, 0, 100_000)
        # A zero temperature divides by zero; the reference allows t_min = 0 because its last step never reaches it.
        _check("t_min", self.t_min, float, 0.0, 100.0)
        _check("t_max", self.t_max, float, 1e-3, 100.0)
        _check("entropy_bound", self.entropy_bound, float, 0.0, math.inf)
        _check("confidence", self.confidence, float, 0.0, math.inf)
        if self.t_max < self.t_min:
            raise DgemmaError(f"t_max is {self.t_max}, below t_min {self.t_min}: give t_max ≥ t_min")

    def temperature(self, step: int) -> float:
        """Temperature of pass `step` (0 is the first). Passes beyond the schedule keep its last temperature."""
        remaining = max(self.schedule_steps - step, 1)
        return max(self.t_min + (self.t_max - self.t_min) * (remaining / self.schedule_steps), 1e-3)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a checkpoint's `generation_config.json` asks for."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    max_new_tokens: int = 256
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, where: str = "generation_config.json") -> GenerationConfig:
        """Read a `generation_config.json`; a null means "the default", as in transformers.

        Raises:
            DgemmaError: an unknown key or a value out of range.
        """
        read = _Reader({key: value for key, value in data.items() if value is not None}, where)
        read.ignore(
            "_from_model_config", "transformers_version", "return_dict_in_generate", "cache_implementation",
            "cache_config", "disable_compile", "bos_token_id", "pad_token_id", "max_length", "do_sample", "temperature",
            "top_k", "top_p", "_commit_hash", "trust_remote_code", "use_cache",
        )  # fmt: skip
        default = SamplerConfig()
        schedule = read.integer("max_denoising_steps", default.schedule_steps, low=1, high=100_000)
        bound = default.entropy_bound
        if (sampler := read.take("sampler_config", None)) is not None:
            inner = read.child("sampler_config", sampler)
            name = inner.take("_cls_name", "EntropyBoundSamplerConfig")
            if name != "EntropyBoundSamplerConfig":
                raise DgemmaError(f"{inner.where}: _cls_name is {name!r}; only EntropyBoundSamplerConfig is supported")
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
            max_new_tokens=read.integer("max_new_tokens", 256, low=1),
            eos_token_ids=read.token_ids("eos_token_id"),
        )
        read.finish()
        return result


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, refusing duplicate keys and anything that is not an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise DgemmaError(f"{path}: the key {double!r} stands twice")
        return result

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise DgemmaError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DgemmaError(f"{path}: not readable as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise DgemmaError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class _Reader:
    """A JSON object whose keys are taken one by one, so that what is left over can be refused."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise DgemmaError(f"{where}: expected an object, found {_show(data)}")
        self.data = dict(data)
        self.where = where

    def child(self, key: str, data: Any) -> _Reader:
        return _Reader(data, f"{self.where}: {key}")

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.data and not default:
            raise DgemmaError(f"{self.where}: the key {key!r} is missing")
        return self.data.pop(key, *default)

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self.data.pop(key, None)

    def integer(self, key: str, *default: int, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.take(key, *default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise DgemmaError(f"{self.where}: {key} is {_show(value)}, expected an integer from {low} to {high}")
        return value

    def number(self, key: str, *default: float, low: float = -math.inf, above: bool = False) -> float:
        value = self.take(key, *default)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < low or (above and value == low):
            bound = "" if low == -math.inf else f" {'above' if above else 'from'} {low}"
            raise DgemmaError(f"{self.where}: {key} is {_show(value)}, expected a finite number{bound}")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.take(key, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < _MAX_SIZE for i in ids):
            raise DgemmaError(f"{self.where}: {key} is {_show(value)}, expected a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def only(self, key: str, *supported: Any) -> None:
        """Accept a key only with a value that the graph implements; a missing key has the first."""
        value = self.take(key, supported[0])
        if not any(type(value) is type(one) and value == one for one in supported):
            expected = " or ".join(json.dumps(one) for one in supported)
            raise DgemmaError(f"{self.where}: {key} is {_show(value)}; this runtime supports {expected}")

    def finish(self) -> None:
        if self.data:
            keys = ", ".join(repr(key) for key in sorted(self.data, key=str))
            raise DgemmaError(f"{self.where}: unknown key {keys}; a newer format needs a newer dgemma")


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(name: str, value: Any, kind: type, low: float, high: float) -> None:
    good = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not good or math.isnan(value) or not low <= value <= high:
        noun = "a number" if kind is float else "an integer"
        bound = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise DgemmaError(f"{name} is {value!r}, expected {noun} {bound}")


def _named(where: str, make: Any) -> Any:
    try:
        return make()
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from None


# Settings of training, of the image tower, or of how transformers itself runs: none changes the text graph.
_NO_EFFECT_TOP = (
    "architectures", "transformers_version", "initializer_range", "vision_config", "boi_token_id",
    "eoi_token_id", "vision_soft_tokens_per_image", "_name_or_path", "torch_dtype", "dtype", "quantization",
    "quantization_config", "return_dict", "output_hidden_states", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "chunk_size_feed_forward", "output_attentions", "audio_config", "name_or_path",
)  # fmt: skip
_NO_EFFECT_TEXT = (
    "initializer_range", "attention_dropout", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_hidden_states", "output_attentions", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "_name_or_path", "transformers_version", "architectures",
)  # fmt: skip


def _read_config(read: _Reader) -> ModelConfig:
    read.only("model_type", "diffusion_gemma")
    read.only("tie_word_embeddings", True)
    image = read.take("image_token_id", None)
    read.ignore(*_NO_EFFECT_TOP)
    text = read.child("text_config", read.take("text_config"))
    top_eos, top_pad, top_bos = read.token_ids("eos_token_id"), read.take("pad_token_id", None), None
    top_bos = read.take("bos_token_id", None)
    canvas = read.integer("canvas_length", 256, high=1 << 20)
    read.finish()

    text.only("model_type", "diffusion_gemma_text")
    text.only("hidden_activation", "gelu_pytorch_tanh")
    text.only("attention_bias", False)
    text.only("tie_word_embeddings", True)
    text.only("use_bidirectional_attention", "vision", None)
    text.ignore(*_NO_EFFECT_TEXT)
    vocab = text.integer("vocab_size")
    pad = text.take("pad_token_id", None)
    bos = text.take("bos_token_id", None)
    text_eos = text.token_ids("eos_token_id")
    experts = text.integer("num_experts")
    per_token = text.integer("top_k_experts")
    if per_token > experts:
        raise DgemmaError(f"{text.where}: top_k_experts is {per_token}, more than num_experts {experts}")
    if canvas < 1:
        raise DgemmaError(f"{read.where}: canvas_length is {canvas}, expected at least 1")
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        expert_size=text.integer("moe_intermediate_size"),
        experts=experts,
        experts_per_token=per_token,
        layers=_read_layers(text),
        canvas_length=canvas,
        max_positions=text.integer("max_position_embeddings", 262_144),
        norm_eps=text.number("rms_norm_eps", 1e-6, low=0.0),
        softcap=text.number("final_logit_softcapping", 30.0, low=0.0, above=True),
        pad_token_id=next((i for i in (pad, top_pad) if i is not None), 0),
        bos_token_id=bos if bos is not None else top_bos,
        eos_token_ids=top_eos or text_eos,
        image_token_ids=() if image is None else (image,),
    )
    text.finish()
    ids = {"pad_token_id": [config.pad_token_id], "eos_token_id": config.eos_token_ids}
    for name, values in ids.items():
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab for i in values):
            raise DgemmaError(f"{text.where}: {name} is {_show(list(values))}, outside the vocabulary of {vocab}")
    return config


def _read_layers(text: _Reader) -> tuple[AttentionConfig, ...]:
    count = text.integer("num_hidden_layers", high=10_000)
    kinds = text.take("layer_types", None)
    if kinds is None:  # five sliding layers to each full one
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise DgemmaError(f"{text.where}: layer_types must name {count} layers, each {known[0]} or {known[1]}")
    if kinds[-1] != "full_attention":
        raise DgemmaError(f"{text.where}: the last of layer_types is {kinds[-1]}; the model ends in full_attention")
    heads = text.integer("num_attention_heads", high=1 << 16)
    kv_heads = text.integer("num_key_value_heads", high=1 << 16)
    head_dim = text.integer("head_dim", high=1 << 16)
    window = text.integer("sliding_window", low=2)
    full_dim, full_kv = _read_full_shape(text, kinds, kv_heads)
    ropes = _read_ropes(text)

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


def _read_full_shape(text: _Reader, kinds: list[LayerKind], kv_heads: int) -> tuple[int, int]:
    """Head size and key-value heads of the full-attention layers, from either spelling."""
    dim = text.take("global_head_dim", None)
    kv = text.take("num_global_key_value_heads", None)
    text.only("attention_k_eq_v", True, None)
    per_layer = text.take("per_layer_config", None)
    found = {"head_dim": 512 if dim is None else dim, "num_key_value_heads": kv_heads if kv is None else kv}
    if per_layer is not None:
        table = text.child("per_layer_config", per_layer)
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        entries = {key: value for key, value in table.data.items() if value not in (None, {})}
        if sorted(map(str, full)) != sorted(map(str, entries)):
            raise DgemmaError(f"{table.where}: expected entries for exactly the full-attention layers {full}")
        shapes = []
        for key, value in entries.items():
            entry = table.child(str(key), value)
            shapes.append((entry.integer("head_dim", found["head_dim"]),
                           entry.integer("num_key_value_heads", found["num_key_value_heads"])))  # fmt: skip
            entry.finish()
        if len(set(shapes)) > 1:
            raise DgemmaError(f"{table.where}: the full-attention layers differ in shape; they must be alike")
        found["head_dim"], found["num_key_value_heads"] = shapes[0]
    check = _Reader(found, text.where)
    return check.integer("head_dim", high=1 << 16), check.integer("num_key_value_heads", high=1 << 16)


def _read_ropes(text: _Reader) -> dict[str, tuple[float, float]]:
    """Base and rotating share of each layer kind's RoPE."""
    default = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    given = text.take("rope_parameters", None)
    table = text.child("rope_parameters", default if given is None else given)
    result = {}
    for kind, usual in default.items():
        entry = table.child(kind, table.take(kind))
        entry.only("rope_type", usual["rope_type"])
        theta = entry.number("rope_theta", usual["rope_theta"], low=1.0, above=True)
        # "default" RoPE with a share would rotate a shorter head: a different formula, never published.
        if kind == "sliding_attention":
            entry.only("partial_rotary_factor", 1.0, 1)
            share = 1.0
        else:
            share = entry.number("partial_rotary_factor", 0.25, low=0.0)
            if share > 1:
                raise DgemmaError(f"{entry.where}: partial_rotary_factor is {share}, expected at most 1")
        entry.finish()
        result[kind] = (theta, share)
    table.finish()
    return result
