"""A tokenizer.json from the vocabulary of a GGUF file, or the files of a folder that has the original.

Gemma's tokenizer is a BPE over characters, spaces written as ▁, with bytes `<0x00>` … for what the vocabulary lacks.
GGUF keeps its tokens, their types and, as model `gemma4`, its merges; as model `llama`, scores, from which the merges
follow: the higher a token's score, the earlier it is merged, from every two tokens that it is made of. What GGUF does
not keep are the flags of added tokens: `<unused5>` spelled out in a text is several tokens here, and one originally.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import inside
from ..checkpoints.files import read_bytes
from ..checkpoints.gguf import Array, GgufFile
from ..core.config import GenerationConfig, ModelConfig
from ..core.errors import DgemmaError, quoted, shown
from ..text.chat import LARGEST_TEMPLATE
from ..text.rust import load_tokenizer
from .gguf_config import make_generation, special_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_LONGEST = 1 << 12  # bytes of a token; the longest of this model's has some hundreds
_LARGEST = 1 << 28  # bytes of a tokenizer
_INSTEAD = "give a folder that has its tokenizer.json with --tokenizer DIR"


def companions(file: GgufFile, config: ModelConfig, folder: Path | None) -> dict[str, bytes]:
    """Return the files beside the weights, by name.

    Args:
        file: the first of a split.
        config: the model's.
        folder: where the tokenizer and the template are taken from instead, or None.

    Raises:
        DgemmaError: a tokenizer that is missing, of a kind that cannot be rebuilt, or larger than the vocabulary.
    """
    settings = make_generation(file, config)
    GenerationConfig.from_hf(settings, where=f"{shown(file.path)}: its settings")
    made = {"generation_config.json": _json(settings)}
    return made | (copied(folder, config) if folder is not None else _rebuilt(file, config))


def copied(folder: Path, config: ModelConfig) -> dict[str, bytes]:
    """Read a folder's tokenizer and template."""
    if not folder.is_dir():
        raise DgemmaError(f"{shown(folder)}: no such folder; --tokenizer takes one with tokenizer.json in it")
    found = {
        name: read_bytes(inside(folder, name), _LARGEST)
        for name in COPIED
        if (folder / name).is_file() or name == COPIED[0]
    }
    _check(found["tokenizer.json"], config, shown(folder / "tokenizer.json"))
    return found


def _rebuilt(file: GgufFile, config: ModelConfig) -> dict[str, bytes]:
    where = f"{shown(file.path)}: its tokenizer"
    kind = file.metadata.get("tokenizer.ggml.model")
    stored = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(stored, Array) or not stored.count:
        raise DgemmaError(f"{where} is missing; {_INSTEAD}")
    if kind not in ("gemma4", "llama"):
        raise DgemmaError(f"{where} is of the kind {quoted(kind, 30)}, which cannot be rebuilt here; {_INSTEAD}")
    if stored.count > config.vocab_size:
        raise DgemmaError(f"{where} has {stored.count} tokens, and the model {config.vocab_size}; {_INSTEAD}")
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and len(template.encode()) > LARGEST_TEMPLATE:
        raise DgemmaError(f"{shown(file.path)}: its chat template has {len(template.encode()):,} bytes, expected at "
                          f"most {LARGEST_TEMPLATE:,}; {_INSTEAD}")  # fmt: skip
    tokens = _texts(stored, where)
    types = _numbers(file, "tokenizer.ggml.token_type", len(tokens), where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        again = next(i for i, token in enumerate(tokens) if vocab[token] != i)
        raise DgemmaError(f"{where}: token {again}, {quoted(tokens[again], 40)}, stands twice; {_INSTEAD}")
    merges = file.metadata.get("tokenizer.ggml.merges")
    if isinstance(merges, Array) and merges.count:
        pairs = _pairs(merges, vocab, where)
    elif kind == "llama":
        scores = _numbers(file, "tokenizer.ggml.scores", len(tokens), where)
        pairs = _from_scores(tokens, types, vocab, scores, where)
    else:
        raise DgemmaError(f"{where} has no merges; {_INSTEAD}")
    ids = special_ids(file)
    if odd := [name for name, one in ids.items() if not 0 <= one < len(tokens)]:
        raise DgemmaError(f"{where}: {odd[0]} is token {quoted(ids[odd[0]], 30)} of {len(tokens)}")
    names = {f"{name}_token": tokens[one] for name, one in ids.items()}
    text = _json(_tokenizer(tokens, types, vocab, pairs, names))
    _check(text, config, where)
    made = {"tokenizer.json": text, "tokenizer_config.json": _json(_settings(file, names))}
    return made | ({"chat_template.jinja": template.encode()} if isinstance(template, str) and template else {})


def _settings(file: GgufFile, names: dict[str, str]) -> dict[str, Any]:
    bos = file.metadata.get("tokenizer.ggml.add_bos_token", True)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), "padding_side": "left", **names}


def _tokenizer(
    tokens: list[str], types: list[Any], vocab: dict[str, int], merges: list[list[str]], names: dict[str, str]
) -> dict[str, Any]:
    """Return tokenizer.json, in the form of the library's own."""
    special = {
        i for i, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and _is_marker(tokens[i]))
    }  # fmt: skip
    plain = [i for i, kind in enumerate(types) if kind == USER_DEFINED and not _is_marker(tokens[i])]
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": i in special}
        for i in sorted([*special, *plain])
    ]  # fmt: skip
    bos = names.get("bos_token")
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    processor = {
        "type": "TemplateProcessing", "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}} if bos else {},
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": processor,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": names.get("unk_token"), "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def _is_marker(token: str) -> bool:
    """Whether a token looks like `<|x>`, `<x|>` or `<|x|>`: converters call some of them text, so that they show."""
    return len(token) > 3 and ((token.startswith("<|") and token.endswith(">")) or
                               (token.startswith("<") and token.endswith("|>")))  # fmt: skip


def _texts(stored: Array, where: str) -> list[str]:
    found = []
    for i, one in enumerate(stored.strings()):
        if len(one) > _LONGEST:  # every way to cut it is tried below
            raise DgemmaError(f"{where}: token {i} has {len(one):,} bytes, expected at most {_LONGEST:,}; {_INSTEAD}")
        try:
            found.append(one.decode())
        except UnicodeDecodeError:
            raise DgemmaError(f"{where}: token {i} is not UTF-8; {_INSTEAD}") from None
    return found


def _numbers(file: GgufFile, key: str, count: int, where: str) -> list[Any]:
    found = file.metadata.get(key)
    numbers = found.numbers() if isinstance(found, Array) else []
    if len(numbers) != count:
        raise DgemmaError(f"{where}: {key} has {len(numbers)} values for {count} tokens; {_INSTEAD}")
    return numbers


def _pairs(merges: Array, vocab: dict[str, int], where: str) -> list[list[str]]:
    found = []
    for i, one in enumerate(merges.strings()):
        pair = one.decode(errors="replace").split(" ")
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or "".join(pair) not in vocab:
            raise DgemmaError(
                f"{where}: merge {i}, {quoted(one[:40], 60)}, is not two tokens that make a third; {_INSTEAD}"
            )
        found.append(pair)
    return found


def _from_scores(
    tokens: list[str], types: list[Any], vocab: dict[str, int], scores: list[Any], where: str
) -> list[list[str]]:
    """Return the merges that a vocabulary with scores stands for, the likeliest first."""

    if odd := [i for i, score in enumerate(scores) if score != score]:
        raise DgemmaError(f"{where}: the score of token {odd[0]} is NaN; {_INSTEAD}")

    def splits() -> Iterator[tuple[float, int, str, str]]:
        for i, token in enumerate(tokens):
            if types[i] != NORMAL:
                continue
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocab and right in vocab:
                    yield -scores[i], -cut, left, right

    return [[left, right] for _, _, left, right in sorted(splits())]


def _check(text: bytes, config: ModelConfig, where: str) -> None:
    """Let the library read a tokenizer, and compare its size with the model's."""
    made = load_tokenizer(text, where)
    highest = max(made.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < config.vocab_size:
        raise DgemmaError(f"{where}: token id {highest} is outside the model's vocabulary of {config.vocab_size}")


def _json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode() + b"\n"
