"""What this room needs of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..core.config import GenerationConfig, ModelConfig
from ..core.engine import Engine
from ..core.errors import DgemmaError
from ..core.options import SAID, GenerateOptions
from ..core.row import Request
from ..text.chat import Message
from ..text.tokens import Tokenizer
from .reader import Reader

TAKEN = (
    "max_new_tokens", "seed", "canvas_length", "steps", "schedule_steps", "temperature", "greedy", "t_max", "t_min",
    "entropy_bound", "confidence", "stability", "stop", "eos", "raw", "specials",
)  # fmt: skip
"""Options of a generation that mean something where only holes are written."""

Prompt = str | Sequence[Message] | Sequence[int]


def has_messages(prompt: Any) -> bool:
    """Whether a prompt is a chat's messages."""
    return isinstance(prompt, Sequence) and bool(len(prompt)) and isinstance(prompt[0], Mapping)


def end_of(tokenizer: Tokenizer, ends: Sequence[int]) -> int | None:
    """Return the token that ends an answer: that of a turn, or the first of those that may."""
    turn = tokenizer.id_of("<turn|>")
    return turn if turn in ends else next(iter(ends), None)


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
        self, prompt: Prompt, *, thinking: bool = ..., raw: bool = ..., specials: bool = ..., closed: bool = ...
    ) -> list[int]: ...  # fmt: skip

    def request(self, prompt: Prompt, options: GenerateOptions) -> Request: ...


def options_of(what: str, given: Mapping[str, Any]) -> GenerateOptions:
    """Return options of a fill or an edit.

    Raises:
        DgemmaError: one that generations have and this has not, or a value that cannot be.
    """
    for name, value in given.items():
        if name in SAID and name not in TAKEN and value:
            raise DgemmaError(f"{name} has no place in {what}: only what is missing is written; leave it out")
    return GenerateOptions(**{name: value for name, value in given.items() if name not in SAID or name in TAKEN})
