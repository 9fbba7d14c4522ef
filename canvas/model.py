"""What this room needs of a loaded model, and passes behind a prompt by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..core.config import GenerationConfig, ModelConfig
from ..core.engine import Engine
from ..core.options import GenerateOptions
from ..core.row import Request
from ..text.chat import Message
from ..text.tokens import Tokenizer

Prompt = str | Sequence[Message] | Sequence[int]


class Model(Protocol):
    """A loaded model, `DiffusionGemma`."""

    engine: Engine
    generation: GenerationConfig

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def prompt_ids(
        self, prompt: Prompt, *, thinking: bool = False, raw: bool = False, specials: bool = False
    ) -> list[int]: ...  # fmt: skip

    def request(self, prompt: Prompt, options: GenerateOptions) -> Request: ...


def open_behind(engine: Engine, prompt: Sequence[int], canvas: int) -> int:
    """Take a slot behind a prompt, from what the engine has kept of it; in the engine's thread, which closes it.

    Raises:
        DgemmaError: as `Passes.fits`.
    """
    passes, snapshot = engine.passes, engine.prefixes.find(tuple(prompt))
    if snapshot is None:
        return passes.open_behind(prompt, canvas)
    passes.fits(len(prompt), canvas)
    slot = passes.open(len(prompt), canvas, snapshot)
    try:
        for at in range(snapshot.length, len(prompt), passes.chunk):
            passes.read([(slot, np.asarray(prompt[at : at + passes.chunk], np.int32))])
    except BaseException:
        passes.close(slot)
        raise
    return slot
