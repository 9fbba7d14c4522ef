"""Configs in every published spelling are read alike; anything that the graph does not implement is refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DiffusionGemmaTextConfig

import tiny
from dgemma.checkpoints import weights
from dgemma.checkpoints.files import read_json
from dgemma.core.config import GenerationConfig, ModelConfig, SamplerConfig, ignored_keys
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


REQUIRED = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
OPTIONAL = {
    "vocab_size": [300, 272.0], "hidden_size": [32, None], "intermediate_size": [48], "num_hidden_layers": [1, 7],
    "num_attention_heads": [4, 16], "num_key_value_heads": [2, 1], "head_dim": [8], "global_head_dim": [16],
    "num_global_key_value_heads": [1, None], "sliding_window": [12], "max_position_embeddings": [512, None],
    "final_logit_softcapping": [20.0], "rms_norm_eps": [1e-5], "pad_token_id": [3, None], "eos_token_id": [4, [5, 6]],
    "bos_token_id": [7, None], "use_bidirectional_attention": ["vision", None], "rope_parameters": [None],
    "layer_types": [["sliding_attention"] * 7, ["full_attention", "sliding_attention"] * 3 + ["full_attention"], None],
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in OPTIONAL.items()}))
def test_missing_keys_have_transformers_defaults(text: dict[str, Any]) -> None:
    if text.get("layer_types"):
        text["num_hidden_layers"] = 7
    # What transformers refuses: a null, or 272.0, where it wants an integer. Here they are as good as none, and 272.
    tokens = ("pad_token_id", "bos_token_id")
    given = {key: int(value) if value == 272 else value for key, value in text.items() if value is not None}
    theirs = DiffusionGemmaTextConfig(**REQUIRED, **given, **{key: None for key in tokens if text.get(key, 0) is None})
    theirs.allow_global_per_layer_attribute_access = True
    ours = ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": text | REQUIRED})
    for own, name in {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "softcap": "final_logit_softcapping",
        "bos_token_id": "bos_token_id",
    }.items():  # fmt: skip
        assert getattr(ours, own) == getattr(theirs, name), name
    assert ours.pad_token_id == (theirs.pad_token_id or 0)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert [layer.kind for layer in ours.layers] == theirs.layer_types
    for i, layer in enumerate(ours.layers):
        one, rope = theirs.per_layer_config[i], theirs.rope_parameters[layer.kind]
        assert (layer.heads, layer.kv_heads) == (theirs.num_attention_heads, one.num_key_value_heads)
        assert layer.head_dim == one.head_dim and layer.rope_theta == rope["rope_theta"]
        assert layer.rotary_dims == int(rope.get("partial_rotary_factor", 1.0) * one.head_dim)
        assert layer.window == (theirs.sliding_window if layer.kind == "sliding_attention" else None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "llama", "diffusion_gemma"]),
        ({"sliding_windows": 4}, ["unknown key", "sliding_windows"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings", "false", "set it so"]),
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
        ({f"k{i}": 1 for i in range(100)}, ["unknown key", "k0"]),
        ({"hidden_size": -4}, ["hidden_size", "-4"]),
        ({"hidden_size": True}, ["hidden_size", "true"]),
        ({"hidden_size": 64.5}, ["hidden_size", "64.5"]),
        ({"hidden_size": 10**5000}, ["hidden_size", "bits"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "NaN"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "finite"]),
        ({"final_logit_softcapping": None}, ["final_logit_softcapping", "null"]),
        ({"final_logit_softcapping": 0.0}, ["final_logit_softcapping", "above"]),
        ({"hidden_activation": "silu"}, ["hidden_activation", "silu"]),
        ({"top_k_experts": 5}, ["top_k_experts", "5", "num_experts 4"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "3"]),
        ({"layer_types": [[], [], []]}, ["layer_types"]),
        ({"layer_types": ["sliding_attention"] * 2}, ["layer_types", "full_attention"]),
        ({"head_dim": 7}, ["odd"]),
        ({"num_key_value_heads": 3}, ["divide"]),
        ({"per_layer_config": {"2": {"head_dim": 24}}}, ["per_layer_config", "global_head_dim"]),
        ({"per_layer_config": {"0": {"head_dim": 16}}}, ["per_layer_config", "[2]"]),
        ({"per_layer_config": {"2": {"sliding_window": 16}}}, ["per_layer_config", "sliding_window"]),
        ({"attention_k_eq_v": False}, ["attention_k_eq_v", "false"]),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters", "sliding_attention", "missing"]),
        ({"eos_token_id": 272}, ["eos_token_id", "272"]),
        ({"bos_token_id": [2, 3]}, ["bos_token_id", "one id"]),
        ({"pad_token_id": -2}, ["pad_token_id", "-2"]),
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
        ({"eos_token_id": [1, "x"]}, ["eos_token_id"]),
        ({"repetition_penalty": 1.2}, ["unknown key", "repetition_penalty"]),
        ({"stop_strings": ["x"]}, ["unknown key", "stop_strings"]),
    ],
)
def test_generation_config_refused_by_name(data: dict[str, Any], words: list[str]) -> None:
    with says("generation_config.json", *words):
        GenerationConfig.from_hf(data)


# ---- Keys without effect ----------------------------------------------------------------------------------------

NOTES = {
    "unsloth_version": "2026.9", "unsloth_fixed": True, "use_cache": False, "auto_map": {"AutoConfig": "x.Y"},
    "_attn_implementation": "eager", "_attn_implementation_autoset": True, "weight_format": "mlx", "torch_dtype": None,
    "transformers_version": "5.23.0", "dtype": "bfloat16", "_name_or_path": "x", "architectures": ["X"],
    "attention_dropout": 0.1, "return_dict": True, "id2label": {"0": "a"}, "problem_type": None, "initializer_range": 1,
    "output_attentions": True, "is_encoder_decoder": False, "mlx_vlm_version": "0.7",
}  # fmt: skip
ABSENT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 262144, "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False, "attn_logit_softcapping": None, "rope_scaling": None, "enable_moe_block": True,
    "cross_attention_hidden_size": None, "pruned_heads": {}, "sep_token_id": None, "add_cross_attention": False,
    "suppress_tokens": [], "altup_num_inputs": 0, "sliding_window_pattern": 6, "norm_topk_prob": True,
    "query_pre_attn_scalar": None, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
NEUTRAL = {
    "repetition_penalty": 1.0, "num_beams": 1, "num_beam_groups": 1, "do_sample": True, "top_p": 1.0, "top_k": 50,
    "temperature": 1.0, "typical_p": 1.0, "length_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0,
    "num_return_sequences": 1, "diversity_penalty": 0.0, "bad_words_ids": None, "forced_eos_token_id": None,
    "guidance_scale": None, "early_stopping": False, "renormalize_logits": False, "stop_strings": None, "min_p": 0.0,
    "suppress_tokens": [], "use_cache": True, "transformers_version": "5", "_from_model_config": True,
}  # fmt: skip


def test_keys_that_change_nothing_are_accepted_and_listed() -> None:
    data = small(**NOTES, **ABSENT) | NOTES | {"vision_config": None, "audio_config": None, "generation_config": {}}
    assert ModelConfig.from_hf(data) == ModelConfig.from_hf(small())
    settings = NEUTRAL | {"max_denoising_steps": 48.0, "eos_token_id": [1, None, -1, 5.0], "t_max": None}
    read = GenerationConfig.from_hf(settings)
    assert read == GenerationConfig(eos_token_ids=(1, 5)) and type(read.sampler.steps) is int
    listed = ignored_keys(data, settings)
    expected = {*NOTES, "vision_config", "audio_config", "generation_config"}
    expected |= {f"text_config.{key}" for key in (*NOTES, *ABSENT)}
    assert set(listed) == expected | {f"generation_config.{key}" for key in (*NEUTRAL, "t_max")}
    assert ignored_keys(small(), {}) == ()
    stated = {"quantization": {"bits": 4, "group_size": 32}, "quantization_config": {"bits": 4, "group_size": 32}}
    assert ignored_keys(small() | stated, {}) == (), "they have an effect: weights are read by them"


@pytest.mark.parametrize(
    "changes",
    [{"num_kv_shared_layers": 2}, {"use_double_wide_mlp": True}, {"enable_moe_block": False}, {"norm_topk_prob": False},
     {"hidden_size_per_layer_input": 256}, {"attn_logit_softcapping": 50.0}, {"rope_scaling": {"factor": 8.0}},
     {"hidden_act": "silu"}, {"use_qk_norm": False}, {"scale_embeddings": 0}, {"num_kv_shared_layers": False},
     {"query_pre_attn_scalar": 256}, {"router_jitter": 0.0}, {"mystery": "x"}, {"rotary_scale": 0}],
)  # fmt: skip
def test_keys_that_would_change_the_graph_are_refused(changes: dict[str, Any]) -> None:
    with says("text_config", "unknown key", next(iter(changes))):
        ModelConfig.from_hf(small(**changes))


def test_no_token_and_integral_floats() -> None:
    same = small(pad_token_id=-1, num_experts=4.0, top_k_experts=2.0) | {"eos_token_id": [1, None, -1, 5.0]}
    config = ModelConfig.from_hf(same | {"canvas_length": 48.0})
    assert (config.pad_token_id, config.eos_token_ids, config.canvas_length) == (0, (1, 5), 48)
    assert type(config.experts) is int and type(config.eos_token_ids[1]) is int
    assert ModelConfig.from_hf(small(bos_token_id=None)).bos_token_id is None


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


def test_of_two_tie_word_embeddings_the_outer_one_counts() -> None:
    """As in transformers, whose classes for the text model have nothing to tie."""
    untied = small(tie_word_embeddings=False)
    assert ModelConfig.from_hf(untied) == ModelConfig.from_hf(small())
    with says("tie_word_embeddings is false", "set it so"):
        ModelConfig.from_hf(untied | {"tie_word_embeddings": False})
