"""Keys of config.json and generation_config.json that change nothing here, as tables to be checked by eye.

The rule: a key is used, or it stands in one of these tables with a value that cannot change the graph or the sampler,
or it says that something is absent (null, false, 0, empty), or the folder is refused by the key's name. A table maps
names, `*` meaning any letters, to the values that are accepted; ANY where no value can matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

ANY = object()
Table = Mapping[str, Any]

# Who wrote the file, of what, for which library; how a library holds, trains or shows a model.
BOOKKEEPING: Table = dict.fromkeys((
    "_name_or_path", "name_or_path", "model_name", "base_model", "_commit_hash", "_from_model_config", "auto_map",
    "architectures", "*_version", "unsloth_*", "transformers.js_config", "weight_format", "license",
    "_attn_implementation*", "attn_implementation", "_experts_implementation*", "custom_pipelines",
    "trust_remote_code", "torch_dtype", "dtype", "torchscript", "use_bfloat16", "use_cache", "cache_implementation",
    "cache_config", "disable_compile", "compile_config", "return_dict", "return_dict_in_generate", "output_*",
    "initializer_range", "*_dropout", "dropout", "gradient_checkpointing", "tokenizer_class", "processor_class",
    "problem_type", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
    "chunk_size_feed_forward", "tie_last_hidden_states", "is_encoder_decoder", "*_tp_plan", "*_pp_plan", "*_ep_plan",
    "_cls_name", "keys_to_ignore_at_inference",
), ANY)  # fmt: skip

# What else stands beside the text model's settings: those of parts that are not run, and files of their own.
TOP: Table = BOOKKEEPING | dict.fromkeys((
    "vision_config", "audio_config", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id*",
    "audio_token_id", "video_token_id", "vision_soft_tokens_per_image", "quantization", "quantization_config",
    "generation_config", "image_token_index", "image_seq_length", "mm_tokens_per_image",
), ANY)  # fmt: skip

# Features of related models, with the values by which they are off, or on as they always are here.
TEXT: Table = BOOKKEEPING | {
    "enable_moe_block": (True,),
    "num_kv_shared_layers": (0,),
    "hidden_size_per_layer_input": (0,),
    "vocab_size_per_layer_input": ANY,  # the size of a table that is there only where the line above is not 0
    "use_double_wide_mlp": (False,),
    "attn_logit_softcapping": (None,),
    "sliding_window_pattern": ANY,  # what layer_types is made of; both are written
    "_sliding_window_pattern": ANY,
    "norm_topk_prob": (True,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "cross_attention_hidden_size": (None,),
}

# On in this model, without a key of their own: to be told that they are off is to be told of another model.
ALWAYS_ON = (
    "norm_topk_prob", "*normalize*", "*qk_norm*", "*scale_embed*", "*self_condition*", "*sandwich*", "*post_norm*",
    "is_causal", "*router*", "*rope*", "*rotary*", "use_sliding_window",
)  # fmt: skip

# Settings of autoregressive sampling, which this sampler has not: accepted where they ask for nothing.
GENERATION: Table = BOOKKEEPING | dict.fromkeys((
    # Written by default, or copied from a Gemma of the other kind; temperature here is a schedule, t_max to t_min.
    "do_sample", "temperature", "top_k", "top_p", "bos_token_id", "pad_token_id", "decoder_start_token_id",
    "num_assistant_tokens*", "assistant_*", "is_assistant", "low_memory", "continuous_batching_config",
), ANY) | {
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "length_penalty": (1,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "renormalize_logits": (False,),
    "target_lookbehind": ANY,  # of assisted decoding, as is the next
    "target_lookahead": ANY,
}  # fmt: skip

# Beside mode, bits, group_size and symmetric in an entry of `quantization`: notes of whoever quantized.
QUANTIZATION: Table = BOOKKEEPING | dict.fromkeys((
    "quant_method", "method", "recipe", "creator", "producer", "tool", "source", "description", "note", "comment",
    "calibration*", "predicate", "quant_predicate",
), ANY)  # fmt: skip


def ineffective(key: str, value: Any, table: Table) -> bool:
    """Whether a key that nothing here reads can be left out."""
    for pattern, accepted in table.items():
        if fnmatchcase(key, pattern):
            return accepted is ANY or any(type(value) in _alike(one) and value == one for one in accepted)
    if value is None:
        return True
    return _empty(value) and not any(fnmatchcase(key, pattern) for pattern in ALWAYS_ON)


def _empty(value: Any) -> bool:
    return value is False or (isinstance(value, int | float | str | list | dict) and not value)


def _alike(one: Any) -> tuple[type, ...]:
    return (type(one),) if isinstance(one, bool | str | None) else (int, float)
