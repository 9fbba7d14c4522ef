"""A model that writes a given text in given passes: what the runner's tests draw and read instead of weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dgemma.core.config import GenerationConfig
from dgemma.core.events import Commit, Done, Draft, Event, Prefill, Stats

EOS = 0
STATS = Stats(
    prompt_tokens=5, emitted_tokens=7, canvases=1, steps=4, encode_passes=1, seconds=0.5, prefill_seconds=0.1,
    first_draft_seconds=0.2, first_text_seconds=0.4, peak_memory_bytes=3 << 20,
)  # fmt: skip


class Words:
    """A tokenizer of whole words; token 0 is the end."""

    has_template = True

    def __init__(self, words: Sequence[str]) -> None:
        self.words = ["<eos>", *words]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(self.words[i] for i in ids if i != EOS or special)


class ScriptedModel:
    """Knows one token more on every pass over a canvas, from the left; commits canvas by canvas, then takes a pause."""

    path = Path("scripted")
    backend, device, dtype = "numpy", "cpu", "float32"
    config = SimpleNamespace(eos_token_ids=(EOS,))
    generation = GenerationConfig(eos_token_ids=(EOS,))

    def __init__(self, words: Sequence[str], *, canvas: int = 0, thinking: str = "", pause: float = 0.0) -> None:
        self.tokenizer = Words(words)
        self.canvas = canvas or len(words) + 1
        self.thinking = thinking
        self.pause = pause
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def stream(self, prompt: Any, **options: Any) -> Iterator[Event]:
        self.asked.append((prompt, options))
        yield Prefill(done=0, total=5)
        yield Prefill(done=5, total=5)
        ids = [*range(1, len(self.tokenizer.words)), EOS]
        for index, start in enumerate(range(0, len(ids), self.canvas)):
            final = np.full(self.canvas, EOS, np.int32)
            final[: len(ids[start : start + self.canvas])] = ids[start : start + self.canvas]
            for known in range(1, self.canvas + 1):
                yield draft(final, known, canvas=index)
            tokens = tuple(int(i) for i in final if i != EOS)
            thinking = self.thinking if index == 0 else ""
            yield Commit(canvas=index, tokens=tokens, text=self.tokenizer.decode(tokens), thinking=thinking)
            time.sleep(self.pause)
        yield Done(finish_reason="stop", stats=STATS)


def draft(final: np.ndarray, known: int, *, canvas: int = 0) -> Draft:
    """The pass that is sure of the first `known` tokens and has token 1 everywhere else."""
    sure = np.arange(len(final)) < known
    return Draft(
        canvas=canvas, step=known - 1, steps=len(final), tokens=np.where(sure, final, 1).astype(np.int32),
        accepted=sure, entropy=np.where(sure, 0.0, 2.0).astype(np.float32),
    )  # fmt: skip
