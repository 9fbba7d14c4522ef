"""Text to tokens and back: tokenizer, chat template, channels, and decoding a canvas at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .config import read_json
from .errors import DgemmaError

Message = Mapping[str, Any]

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
_UNFINISHED = "\ufffd"  # what a cut UTF-8 sequence decodes to


class Tokenizer:
    """A checkpoint's `tokenizer.json` and chat template.

    Args:
        folder: the checkpoint; its template is `chat_template.jinja` or `chat_template` in `tokenizer_config.json`.
        vocab_size: ids from it on do not exist in the model.
        bos_token_id: what raw text begins with, if anything.

    Raises:
        DgemmaError: no tokenizer, one that cannot be read, or one with more tokens than the model.
    """

    def __init__(self, folder: Path, *, vocab_size: int, bos_token_id: int | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DgemmaError(f"{path}: no such file; a checkpoint needs its tokenizer.json")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception for every kind of bad file
            raise DgemmaError(f"{path}: not a tokenizer: {str(error).splitlines()[0]}") from None
        highest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= vocab_size:
            raise DgemmaError(f"{path}: token id {highest} is beyond the model's vocabulary of {vocab_size}")
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self._settings = read_json(settings) if (settings := folder / "tokenizer_config.json").is_file() else {}
        self._template = _find_template(folder, self._settings)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def id_of(self, token: str) -> int | None:
        """Return the id of a token spelled in full, such as `<|channel>`, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Return token ids; special tokens spelled out in the text become those tokens."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise DgemmaError(f"the prompt is not valid text: {str(error).splitlines()[0]}") from None
        if bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return text; special tokens are left out unless asked for, ids without a token are skipped."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)

    def render(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """Lay chat messages out by the checkpoint's template, ready for the model's turn → token ids."""
        messages = [_check_message(i, message) for i, message in enumerate(messages)]
        if not messages:
            raise DgemmaError("the chat has no messages")
        if self._template is None:
            raise DgemmaError("this checkpoint has no chat template; give text or token ids instead of messages")
        return self.encode(self._render(self._template, messages, thinking))

    def _render(self, template: str, messages: Sequence[Message], thinking: bool) -> str:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The environment that templates are written for; the sandbox is because they arrive with the weights.
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        env.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda layout: datetime.now().astimezone().strftime(layout),
        }
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _token_text(self._settings.get(name)) for name in names}
        if not tokens["bos_token"] and self.bos_token_id is not None:
            tokens["bos_token"] = self._backend.id_to_token(self.bos_token_id) or ""
        try:
            return env.from_string(template).render(
                messages=messages, add_generation_prompt=True, enable_thinking=thinking, tools=None, **tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise DgemmaError(f"the chat template refused the messages: {str(error).splitlines()[0]}") from None


def _token_text(value: Any) -> str:
    return value.get("content", "") if isinstance(value, dict) else value if isinstance(value, str) else ""


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DgemmaError(f"{path}: not readable: {error}") from None
    found = settings.get("chat_template")
    if isinstance(found, list):  # named templates; "default" is the chat
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _check_message(index: int, message: Any) -> Message:
    where = f"message {index}"
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DgemmaError(f"{where}: expected an object with role and content")
    content = message["content"]
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise DgemmaError(f"{where}: content of type {kind!r} is not supported; this version reads text only")
    elif not isinstance(content, str):
        raise DgemmaError(f"{where}: content must be text, found {type(content).__name__}")
    return message


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What newly final tokens add."""

    tokens: tuple[int, ...]
    text: str
    thinking: str
    stopped: bool
    """A stop string was found: nothing may follow."""


class Decoder:
    """Turns committed tokens into text, canvas by canvas.

    Keeps the thinking channel apart, cuts at stop strings exactly, and holds back what a later canvas may still
    change: a character whose bytes are not all there, and text that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.released = 0  # how many tokens have been given out
        self._tokens: list[int] = []
        self._text = self._thinking = ""  # what has been given out
        self._open = tokenizer.id_of(CHANNEL_OPEN) if tokenizer else None
        self._close = tokenizer.id_of(CHANNEL_CLOSE) if tokenizer else None

    def push(self, tokens: Sequence[int], *, last: bool) -> Piece:
        """Add final tokens; `last` gives out what was held back."""
        self._tokens += [int(token) for token in tokens]
        answer, thinking = self._decode(len(self._tokens))
        count = len(self._tokens)
        cut = min((at for stop in self.stop if (at := answer.find(stop)) >= 0), default=None)
        if cut is None and not last:
            answer, thinking = answer.rstrip(_UNFINISHED), thinking.rstrip(_UNFINISHED)
            held = self._held(answer)
            end = len(answer) - held if held else None
        else:
            end = cut
        if end is not None:
            answer, count = answer[:end], self._fewest(end)
        # What was given out stays: a decoder that cleans spaces up may rewrite it, and then nothing is added.
        piece = Piece(
            tokens=tuple(self._tokens[self.released : count]),
            text=answer[len(self._text) :],
            thinking=thinking[len(self._thinking) :],
            stopped=cut is not None,
        )
        self.released = count
        self._text += piece.text
        self._thinking += piece.thinking
        return piece

    def _held(self, answer: str) -> int:
        """Length of the longest tail that some stop string begins with."""
        longest = max((len(stop) for stop in self.stop), default=0)
        sizes = range(min(longest - 1, len(answer)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(answer[-n:]) for stop in self.stop)), 0)

    def _fewest(self, length: int) -> int:
        """Return how few tokens say `length` characters of the answer."""
        low, high = self.released, len(self._tokens)
        while low < high:
            middle = (low + high) // 2
            if len(self._decode(middle)[0].rstrip(_UNFINISHED)) >= length:
                high = middle
            else:
                low = middle + 1
        return low

    def _decode(self, count: int) -> tuple[str, str]:
        """Answer and thinking that the first `count` tokens say."""
        if self.tokenizer is None:
            return "", ""
        parts: dict[bool, list[str]] = {False: [], True: []}
        run: list[int] = []
        inside = False

        def close() -> None:
            text = self.tokenizer.decode(run) if self.tokenizer else ""
            # A channel begins with its name on a line of its own.
            parts[inside].append(text.partition("\n")[2] if inside else text)
            run.clear()

        for token in self._tokens[:count]:
            if self._open is not None and token in (self._open, self._close):
                close()
                inside = token == self._open
            else:
                run.append(token)
        close()
        return "".join(parts[False]), "".join(parts[True])


def split_at_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Cut tokens before the first end-of-sequence token → tokens, whether there was one."""
    for i, token in enumerate(tokens):
        if token in ends:
            return [int(t) for t in tokens[:i]], True
    return [int(t) for t in tokens], False
