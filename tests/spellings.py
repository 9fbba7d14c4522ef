"""Tokenizers that read and spell text in the ways of the published ones, trained on a little of it."""

from __future__ import annotations

import inspect
import json
import textwrap
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tiny import SPECIAL, tiny_checkpoint

SIZE = 900
"""Ids of each."""

KINDS = ("bytes", "gemma", "llama", "metaspace", "composed")


@cache
def spelled(kind: str) -> str:
    """Return a tokenizer.json.

    bytes: byte-level with merges. gemma: spaces as ▁, other characters by their bytes. llama: a space before every text
    besides, which the decoder takes away. metaspace: the same by a pre-tokenizer. composed: byte-level, and composes
    characters first.
    """
    backend = Tokenizer(models.BPE())
    level = kind in ("bytes", "composed", "lower")
    if level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if kind != "bytes":
            backend.normalizer = normalizers.NFC() if kind == "composed" else normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if level else [*(chr(i) for i in range(32, 127)), "\n", "▁"]
    if kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=False)]
        )
    size = SIZE - len(SPECIAL) - (0 if level else 256)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    corpus = [inspect.getsource(module) for module in (json, textwrap, inspect)]
    backend.train_from_iterator([line for text in corpus for line in text[:20_000].split("\n")], trainer)
    data = json.loads(backend.to_str())
    words = [*SPECIAL, *([] if level else [f"<0x{i:02X}>" for i in range(256)]), *data["model"]["vocab"]]
    data["model"] |= {"vocab": {word: i for i, word in enumerate(words)}, "byte_fallback": not level}
    result = Tokenizer.from_str(json.dumps(data))
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return result.to_str()


def checkpoint(tmp_path: Path, kind: str, *, canvas_length: int = 32, **more: object) -> Path:
    """Write a tiny checkpoint that spells in one of these ways, with a context of 4,096."""
    size = json.loads(spelled(kind))["model"]["vocab"]
    folder = tiny_checkpoint(
        tmp_path, name=kind, canvas_length=canvas_length, vocab_size=max(len(size), SIZE),
        max_position_embeddings=4096, **more,
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(spelled(kind))
    return folder
