"""Text to tokens and back: the tokenizer of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import inside
from ..checkpoints.files import read_bytes, read_json
from ..core.errors import DgemmaError, quoted, shown
from ..core.tokens import CHANNEL_CLOSE, CHANNEL_OPEN
from .chat import Message, check_messages, find_template, token_variables
from .rendering import Rendered, Renderer, hidden
from .rust import call, first_line, load_tokenizer
from .spelling import Spelling, spelling_of

LARGEST_TOKENIZER = 1 << 28
"""Bytes of a tokenizer.json; Gemma's has 33 million."""

LONG = 1 << 20
"""Characters that are tokenized without asking whether they can fit: in at most some seconds."""

_NOBODYS = "\U0010fffd"  # a private character, which is in no vocabulary
_ORDINARY = frozenset("_\"'\\")  # characters of tokens' spellings that words, quotes and escapes are written with


class Tokenizer:
    """A checkpoint's `tokenizer.json` and chat template.

    What is said in messages never becomes a control token, however it is spelled and whatever the template makes of it:
    it is encoded as the text that it is. Control tokens are those that the tokenizer calls special, those that the
    template writes, those that `tokenizer_config.json` names, and the channel's.

    Args:
        folder: the checkpoint; where its template may be is told at `chat.find_template`.
        vocab_size: ids from it on do not exist in the model. A tokenizer may have such ids among its added tokens;
            text that holds one is refused.
        bos_token_id: what raw text begins with, if anything.
        controls: ids that the model's config gives a meaning; they are control tokens too.
        context: how many tokens the model can read. Text that is longer however it is tokenized is not tokenized.

    Raises:
        DgemmaError: no tokenizer, one that cannot be read, or one whose ordinary tokens are more than the model has.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        bos_token_id: int | None = None,
        controls: Sequence[int] = (),
        context: int | None = None,
    ) -> None:
        path = folder / "tokenizer.json"
        self._where = shown(path)
        self._backend = load_tokenizer(read_bytes(inside(folder, path.name), LARGEST_TOKENIZER), self._where)
        # A folder that was saved after training has them, and then every prompt is cut or filled up to one length.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = dict(self._backend.get_added_tokens_decoder())
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        ordinary = max((i for i in ids if i not in self._added), default=0)
        if ordinary >= vocab_size:
            raise DgemmaError(f"{self._where}: token id {ordinary} is beyond the model's vocabulary of {vocab_size}")
        self._complete = max(ids, default=0) < vocab_size
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self._meant = frozenset(controls)
        self._context = context
        settings = folder / "tokenizer_config.json"
        data = read_json(inside(folder, settings.name)) if os.path.lexists(settings) else {}
        self._names = token_variables(folder, data)
        self._template = find_template(folder, data)
        self._renderer = Renderer()

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template; without one, text is given to the model as it stands."""
        return self._template is not None

    def id_of(self, token: str) -> int | None:
        """Return the id of a token spelled in full, such as `<|channel>`, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def text_ids(self) -> np.ndarray:
        """Tokens that text is made of, int32, rising: no control tokens, and not the one for what is unknown."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        others = {*self._controls, self._unknown}
        found = sorted(i for text, i in vocab.items() if text and i < self.vocab_size and i not in others)
        return np.array(found, np.int32)

    @property
    def closed_thought(self) -> list[int]:
        """A thinking channel without a thought, as it stands before an answer; none where the template knows of none.

        In front of a canvas it keeps the model from opening one inside. Templates that write none leave that to it.
        """
        channel = self.id_of(CHANNEL_OPEN), self.id_of(CHANNEL_CLOSE)
        if self._template is None or CHANNEL_OPEN not in self._template.source or None in channel:
            return []
        return self.encode(f"{CHANNEL_OPEN}thought\n{CHANNEL_CLOSE}")

    def encode(self, text: str, *, bos: bool = False, specials: bool = True) -> list[int]:
        """Return token ids.

        Args:
            text: as it stands; line ends too.
            bos: begin with the beginning-of-sequence token, if the model has one.
            specials: special tokens spelled out in the text become those tokens; else they are encoded as text.

        Raises:
            DgemmaError: not text, text that the tokenizer fails on, or a token that the model does not have.
        """
        if not isinstance(text, str):
            raise DgemmaError(f"the prompt is a {type(text).__name__}, expected text")
        ids = self._ids(hidden(text, "" if specials else self._guarded))
        if bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return text; special tokens are left out unless asked for, ids without a token are skipped."""
        decode = self._backend.decode
        return self._call("decode these token ids", lambda: decode(list(ids), skip_special_tokens=not special))

    @cached_property
    def spelling(self) -> Spelling:
        """What each token says, in bytes; control tokens say nothing.

        Raises:
            DgemmaError: a decoder that makes of a token what other tokens decide.
        """
        decoder = self._backend.decoder
        return spelling_of(
            {i: piece for piece, i in self._backend.get_vocab(with_added_tokens=True).items()},
            None if decoder is None else json.loads(decoder.__getstate__()),
            vocab_size=self.vocab_size,
            controls=frozenset(self._controls),
            where=self._where,
        )

    def render(self, messages: Sequence[Message], *, thinking: bool = False, specials: bool = False) -> list[int]:
        """Lay chat messages out by the checkpoint's template, ready for the model's turn → token ids.

        Args:
            messages: as `chat.check_messages` says.
            thinking: ask the template for a thinking channel.
            specials: special tokens spelled out in messages become those tokens. Whoever writes the messages can then
                end their turn and speak as the model, or as the system.

        Raises:
            DgemmaError: what is wrong with which message, or with the template.
        """
        checked = check_messages(messages)
        if self._template is None:
            raise DgemmaError("this checkpoint has no chat template; give text or token ids instead of messages")
        trusted: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": bool(thinking), "tools": None}
        trusted |= {"documents": None} | self._names
        if not trusted.get("bos_token") and self.bos_token_id is not None:
            trusted["bos_token"] = self._backend.id_to_token(self.bos_token_id) or ""
        rendered = self._renderer.render(
            self._template.source,
            trusted=trusted,
            said={"messages": checked},
            guarded="" if specials else self._guarded,
            where=self._template.where,
        )
        return self._ids(rendered)

    def _ids(self, rendered: Rendered) -> list[int]:
        """Encode text; control tokens with a hidden character in them are a user's, and become text."""
        text, plain = rendered.text, rendered.plain
        encoding = self._run(plain)
        if text == plain:
            return self._checked(encoding.ids)
        ids: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelled = self._controls.get(token)
            at = -1 if spelled is None else plain.find(spelled, start, end)
            if spelled is None or (text.startswith(spelled, at) if at >= 0 else token == self._unknown):
                ids.append(token)
            else:  # where it is not spelled there as it stands, the normalizer made it of other characters
                ids += self._as_text(plain[start:end])
        return self._checked(ids)

    def _as_text(self, text: str) -> list[int]:
        """Encode the spelling of a control token as if it were none: through all of the tokenizer but added tokens."""

        def run() -> list[int]:
            whole = text if (normalizer := self._backend.normalizer) is None else normalizer.normalize_str(text)
            parts = [whole]
            if (splitter := self._backend.pre_tokenizer) is not None:
                parts = [part for part, _ in splitter.pre_tokenize_str(whole)]
            return [token.id for part in parts for token in self._backend.model.tokenize(part)]

        ids = self._call("encode this text", run)
        if not any(token in self._controls and token != self._unknown for token in ids):
            return ids
        if len(text) == 1:
            raise DgemmaError(f"{self._where}: {quoted(text)} in a message is a control token; leave it out")
        return [token for character in text for token in self._as_text(character)]

    @cached_property
    def _controls(self) -> dict[int, str]:
        """How control tokens are spelled, by id."""
        written = self._template.source if self._template else ""
        named = {CHANNEL_OPEN, CHANNEL_CLOSE, *self._names.values()}
        return {
            i: token.content
            for i, token in self._added.items()
            if i in self._meant
            or token.special
            or token.content in named
            or (token.content in written and token.content.strip())
        }

    @cached_property
    def _unknown(self) -> int | None:
        """The token for what the tokenizer has no other for, if it has one: anybody's text may hold that."""
        model = self._backend.model
        try:
            found = self._call("encode this text", lambda: model.tokenize(_NOBODYS))
        except DgemmaError:  # as some do that have no such token
            return None
        return found[0].id if len(found) == 1 and found[0].value != _NOBODYS else None

    @cached_property
    def _guarded(self) -> str:
        """Characters of which every control token has at least one."""
        found: set[str] = set()
        for spelled in self._controls.values():
            marks = {c for c in spelled if not (c.isalnum() or c.isspace() or c in _ORDINARY)}
            found |= marks or set(spelled[:1])
        return "".join(sorted(found))

    def _run(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeError as error:
            raise DgemmaError(f"the prompt is not valid text: {first_line(error)}") from None
        if len(text) > LONG and self._context is not None and len(text) > self._context * self._longest:
            raise DgemmaError(
                f"the prompt has {len(text):,} characters, more than the model's context of {self._context:,} tokens "
                "can hold; shorten the prompt"
            )
        return self._call("encode this text", lambda: self._backend.encode(text, add_special_tokens=False))

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _checked(self, ids: list[int]) -> list[int]:
        bad = None if self._complete else next((i for i in ids if i >= self.vocab_size), None)
        if bad is not None:
            name = quoted(self._backend.id_to_token(bad), 40)
            last = self.vocab_size - 1
            raise DgemmaError(
                f"the text holds {name}, token {bad} of the tokenizer; the model has ids from 0 to {last}"
            )
        return ids

    def _call(self, doing: str, function: Callable[[], Any]) -> Any:
        return call(f"{self._where}: cannot {doing}", function)
