"""Configs in every published spelling are read alike; anything that the graph does not implement is refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny
from dgemma.core import weights
from dgemma.core.config import GenerationConfig, ModelConfig, SamplerConfig, read_json
from said import says

DATA = Path(__file__).parent / "data"


def published() -> dict[str, Any]:
    return json.loads((DATA / "config_26b.json").read_text())


def small(**text: Any) -> dict[str, Any]:
    return {"model_type": "diffusion_gemma", "text_config": tiny.TEXT_CONFIG | text}


def test_the_published_config_is_the_26b_model() -> None:
    config = ModelConfig.from_hf(published())
    sliding, full = config.layers[0], config.layers[5]
    assert [i for i, layer in enumerate(config.layers) if layer.kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert (sliding.heads, sliding.kv_heads, sliding.head_dim, sliding.window) == (16, 8, 256, 1024)
    assert (full.heads, full.kv_heads, full.head_dim, full.window) == (16, 2, 512, None)
    assert (config.eos_token_ids, config.pad_token_id, config.bos_token_id) == ((1, 106), 0, 2)
    assert config.image_token_ids == (258880,)
    assert len(sliding.inverse_frequencies()) == 128 and all(sliding.inverse_frequencies())
    # A quarter of the pairs turn, by the exponents of the whole head.
    rates = full.inverse_frequencies()
    assert rates[64:] == (0.0,) * 192 and rates[63] == pytest.approx(1e6 ** -(126 / 512), rel=1e-12)
    size = 2 * sum(math.prod(shape) for shape in weights.shapes(config).values())
    assert 50.4e9 < size < 50.6e9  # 51.6 GB in bf16, of which 1.11 are vision


def test_the_published_sampling_defaults() -> None:
    generation = GenerationConfig.from_hf(json.loads((DATA / "generation_config_26b.json").read_text()))
    assert generation.sampler == SamplerConfig() and generation.eos_token_ids == (1, 106, 50)


def test_both_spellings_of_the_full_attention_shape_are_one_config() -> None:
    old = published()
    new = copy.deepcopy(old)
    del new["text_config"]["global_head_dim"], new["text_config"]["num_global_key_value_heads"]
    entry = {"head_dim": 512, "num_key_value_heads": 2}
    new["text_config"]["per_layer_config"] = {str(i): entry for i in (5, 11, 17, 23, 29)}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


@pytest.mark.parametrize(
    ("full", "written"),
    [
        # What transformers 5.23 writes for these: it leaves out what the sliding layers (8 wide, 2 heads) share.
        ((16, 1), {"2": {"head_dim": 16, "num_key_value_heads": 1}}),
        ((8, 1), {"2": {"num_key_value_heads": 1}}),
        ((16, 2), {"2": {"head_dim": 16}}),
        ((8, 2), {}),
        ((8, 2), None),
    ],
)
def test_what_per_layer_config_leaves_out_is_as_in_the_sliding_layers(full: tuple[int, int], written: Any) -> None:
    data = small(per_layer_config=written)
    for key in ("global_head_dim", "num_global_key_value_heads"):
        del data["text_config"][key]
    layer = ModelConfig.from_hf(data).layers[-1]
    assert (layer.head_dim, layer.kv_heads) == full


def test_missing_defaults_are_the_reference_s() -> None:
    data = small()
    for key in ("global_head_dim", "num_global_key_value_heads", "rms_norm_eps", "final_logit_softcapping"):
        del data["text_config"][key]
    config = ModelConfig.from_hf(data)
    assert (config.layers[-1].head_dim, config.layers[-1].kv_heads) == (512, 2)
    assert (config.canvas_length, config.norm_eps, config.softcap) == (256, 1e-6, 30.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "llama", "diffusion_gemma"]),
        ({"sliding_windows": 4}, ["unknown key", "sliding_windows"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings", "false"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
        ({"canvas_length": 0}, ["canvas_length", "0"]),
        ({"image_token_id": "x"}, ["image_token_id"]),
        ({"text_config": 3}, ["text_config", "object"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with says(*words):
        ModelConfig.from_hf(small() | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_sizes": 4}, ["text_config", "unknown key", "hidden_sizes"]),
        ({f"k{i}": 0 for i in range(100)}, ["unknown key", "k0"]),
        ({"hidden_size": -4}, ["hidden_size", "-4"]),
        ({"hidden_size": True}, ["hidden_size", "true"]),
        ({"hidden_size": 64.0}, ["hidden_size", "64.0"]),
        ({"hidden_size": 10**5000}, ["hidden_size", "bits"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "NaN"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "finite"]),
        ({"final_logit_softcapping": None}, ["final_logit_softcapping", "null"]),
        ({"final_logit_softcapping": 0.0}, ["final_logit_softcapping", "above"]),
        ({"hidden_activation": "silu"}, ["hidden_activation", "silu"]),
        ({"top_k_experts": 5}, ["top_k_experts", "5", "num_experts 4"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "3"]),
        ({"layer_types": [[], [], []]}, ["layer_types"]),
        ({"layer_types": ["sliding_attention"] * 3}, ["layer_types", "full_attention"]),
        ({"head_dim": 7}, ["odd"]),
        ({"num_key_value_heads": 3}, ["divide"]),
        ({"per_layer_config": {"2": {"head_dim": 24}}}, ["per_layer_config", "global_head_dim"]),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, ["per_layer_config", "[2]"]),
        ({"per_layer_config": {"2": {"sliding_window": 16}}}, ["per_layer_config", "sliding_window"]),
        ({"attention_k_eq_v": False}, ["attention_k_eq_v", "false"]),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters", "sliding_attention", "missing"]),
        ({"eos_token_id": 272}, ["eos_token_id", "272"]),
        ({"bos_token_id": [2, 3]}, ["bos_token_id", "one id"]),
        ({"pad_token_id": -1}, ["pad_token_id", "-1"]),
        ({"vocab_size": 1 << 60}, ["vocab_size"]),
    ],
)
def test_text_config_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with says(*words):
        ModelConfig.from_hf(small(**changes))


def test_a_missing_key_is_named() -> None:
    data = small()
    del data["text_config"]["num_experts"]
    with says("text_config", "num_experts", "missing"):
        ModelConfig.from_hf(data)


def test_nulls_in_generation_config_are_the_defaults() -> None:
    names = (
        "confidence_threshold", "max_denoising_steps", "sampler_config", "stability_threshold", "t_max", "t_min",
        "eos_token_id", "max_new_tokens",
    )  # fmt: skip
    data = dict.fromkeys(names) | {"return_dict_in_generate": True, "transformers_version": "5.23.0"}
    assert GenerationConfig.from_hf(data) == GenerationConfig()
    assert GenerationConfig.from_hf({"sampler_config": {"entropy_bound": 0.5}}).sampler.entropy_bound == 0.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"num_beams": 4}, ["unknown key", "num_beams"]),
        ({"sampler_config": {"_cls_name": "Other"}}, ["sampler_config", "_cls_name", "Other"]),
        ({"sampler_config": {"bound": 1}}, ["sampler_config", "bound"]),
        ({"sampler_config": []}, ["sampler_config"]),
        ({"t_min": 0.9}, ["t_max", "0.8", "0.9"]),
        ({"t_max": "hot"}, ["t_max", "hot"]),
        ({"max_denoising_steps": 0}, ["max_denoising_steps"]),
        ({"eos_token_id": [1, None]}, ["eos_token_id"]),
    ],
)
def test_generation_config_refused_by_name(data: dict[str, Any], words: list[str]) -> None:
    with says("generation_config.json", *words):
        GenerationConfig.from_hf(data)


def test_a_cap_on_steps_does_not_heat_the_canvas() -> None:
    full, capped = SamplerConfig(), SamplerConfig(steps=12)
    assert [capped.temperature(i) for i in range(12)] == [full.temperature(i) for i in range(12)]
    assert full.temperature(0) == 0.8 and full.temperature(47) == pytest.approx(0.4 + 0.4 / 48)
    assert full.temperature(48) == full.temperature(1000) == full.temperature(47)


def test_bounds_beyond_float32_mean_no_bound() -> None:
    config = SamplerConfig(entropy_bound=10**400, confidence=1e300, t_max=1)
    assert config.entropy_bound == config.confidence == math.inf and type(config.t_max) is float


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 3.0}, "steps"),
        ({"t_max": 10**400}, "t_max"),
        ({"t_min": 10**5000}, "bits"),
        ({"t_min": math.nan}, "t_min"),
        ({"entropy_bound": -1}, "entropy_bound"),
        ({"confidence": "low"}, "confidence"),
        ({"stability": True}, "stability"),
    ],
)
def test_sampler_options_refused_by_name(options: dict[str, Any], word: str) -> None:
    with says(word):
        SamplerConfig(**options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', ["'a'", "twice"]),
        ("[1]", ["object", "list"]),
        ("{", ["JSON"]),
        ("", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ('{"a": ' + "9" * 5000 + "}", ["JSON"]),
        (b"\xff\xfe{}", ["JSON"]),
    ],
)
def test_bad_json_is_named(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with says("config.json", *words):
        read_json(path)
    with says("nothing.json", "no such file"):
        read_json(tmp_path / "nothing.json")
    with says("regular"):
        read_json(tmp_path)
