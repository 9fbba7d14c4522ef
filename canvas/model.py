"""What this room needs of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.config import GenerationConfig, ModelConfig
from ..core.engine import Engine
from ..core.options import GenerateOptions
from ..core.row import Request
from ..text.chat import Message
from ..text.tokens import Tokenizer
from .reader import Reader

Prompt = str | Sequence[Message] | Sequence[int]


class Model(Protocol):
    """A loaded model, `DiffusionGemma`."""

    engine: Engine
    reader: Reader
    generation: GenerationConfig

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def prompt_ids(
        self, prompt: Prompt, *, thinking: bool = False, raw: bool = False, specials: bool = False
    ) -> list[int]: ...  # fmt: skip

    def request(self, prompt: Prompt, options: GenerateOptions) -> Request: ...
