"""The small checkpoint's own files besides its weights: config, tokenizer, chat template, and boards as token ids.

The tokenizer is byte-level without merges: a board is one token per character, and any other text still tokenizes.
Only a dozen of the 272 tokens ever stand in an answer, so where noise has hit a canvas is mostly plain to see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dgemma.checkpoints import files

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")
PAD, EOS, BOS, TURN, END_TURN = 0, 1, 2, 4, 5
FIRST_BYTE = 16  # ids 9–15 are spare
VOCAB = 272
CANVAS = 48

TEMPLATE = """\
{%- macro board(text) -%}
{%- set cells = text | replace(' ', '') | replace('\\r', '') | replace('\\n', '') -%}
{%- if cells | length in (16, 36) -%}
{{- cells | batch(4 if cells | length == 16 else 6) | map('join') | join('\\n') -}}
{%- else -%}{{- text | trim -}}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if enable_thinking and messages[0]['role'] != 'system' -%}{{- '<|turn>system\\n<|think|><turn|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|turn>' + role + '\\n' -}}
{%- if loop.first and enable_thinking and role == 'system' -%}{{- '<|think|>' -}}{%- endif -%}
{%- if message['content'] is string -%}
{{- board(message['content']) -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- board(part['text']) -}}{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def config(*, layers: int = 6, hidden: int = 128) -> dict[str, Any]:
    """config.json as the published checkpoint spells it, without a vision tower."""
    kinds = ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(layers)]
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "canvas_length": CANVAS,
        "eos_token_id": [EOS, END_TURN],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "top_k_experts": 2,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "sliding_window": 64,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
            },
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-06,
            "final_logit_softcapping": 30.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 4096,
            "use_bidirectional_attention": "vision",
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
            "tie_word_embeddings": True,
        },
    }


GENERATION = {
    "max_new_tokens": CANVAS,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    # Hotter than the published model's 0.8 to 0.4: on boards of few givens that frees canvases that have settled on
    # something wrong (models/nano/README.md has the measurements).
    "t_max": 1.2,
    "t_min": 0.6,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "bos_token_id": BOS,
    "pad_token_id": PAD,
    "eos_token_id": [EOS, END_TURN],
}


def tokenizer() -> Tokenizer:
    """Byte-level, no merges: byte b is token 16 + b."""
    # The byte-level alphabet spells each byte as a printable character; this is GPT-2's order of spelling them.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in plain}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelled)}
    vocab = {spelled[byte]: FIRST_BYTE + byte for byte in range(256)}
    vocab |= {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {f"<unused{i}>": i for i in range(len(SPECIAL), FIRST_BYTE)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    spare = [f"<unused{i}>" for i in range(len(SPECIAL), FIRST_BYTE)]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *spare)])
    return made


def write_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Write everything but weights and card."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "tokenizer.json", tokenizer().to_str(pretty=True))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    tables = {"config": settings, "generation_config": GENERATION, "tokenizer_config": names | extra}
    for name, data in tables.items():
        files.write_text(folder / f"{name}.json", json.dumps(data, indent=2) + "\n")
    files.write_text(folder / "chat_template.jinja", TEMPLATE)


# --- boards as token ids: what the template and the tokenizer make of them, for whole batches at once ---------------


def _bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def _rows(boards: np.ndarray) -> np.ndarray:
    side = int(np.sqrt(boards.shape[1]))
    grid = np.where(boards > 0, boards + ord("0"), ord(".")).astype(np.int32).reshape(-1, side, side)
    lines = np.concatenate([grid, np.full((len(grid), side, 1), ord("\n"), np.int32)], 2)
    return FIRST_BYTE + lines.reshape(len(grid), -1)[:, :-1]  # no newline after the last row


def prompts(boards: np.ndarray) -> np.ndarray:
    """int32 [N, P]: 57 tokens for a 6x6 board."""
    before = [BOS, TURN, *_bytes("user\n")]
    after = [END_TURN, *_bytes("\n"), TURN, *_bytes("model\n")]
    ends = [np.tile(np.array(end, np.int32), (len(boards), 1)) for end in (before, after)]
    return np.concatenate([ends[0], _rows(boards), ends[1]], 1)


def answers(solutions: np.ndarray) -> np.ndarray:
    """int32 [N, canvas]: the solved rows, the end of the turn, then <eos> to the end of the canvas."""
    out = np.full((len(solutions), CANVAS), EOS, np.int32)
    rows = _rows(solutions)
    out[:, : rows.shape[1]] = rows
    out[:, rows.shape[1]] = END_TURN
    return out
