"""Committed tokens as text, a canvas at a time: the thinking channel apart, stop strings, halves of characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"

_UNFINISHED = "\ufffd"  # what a cut UTF-8 sequence decodes to


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token spelled in full, or None."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return text, special tokens left out."""
        ...


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

    Keeps the thinking channel apart, cuts at stop strings exactly, to the fewest tokens that say what comes before
    them, and holds back what a later canvas may still change: a character whose bytes are not all there, and text that
    may be the beginning of a stop string.

    `prompt` is what the tokens follow: where it leaves the thinking channel open, they begin inside it.
    """

    def __init__(self, tokenizer: Vocabulary | None, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.released = 0  # how many tokens have been given out
        self._tokens: list[int] = []
        self._text = self._thinking = ""  # what has been given out
        self._open = tokenizer.id_of(CHANNEL_OPEN) if tokenizer else None
        self._close = tokenizer.id_of(CHANNEL_CLOSE) if tokenizer else None
        self.inside, self._named = self._begun(prompt)

    @property
    def channel(self) -> tuple[int, int] | None:
        """The ids that open and close the thinking channel."""
        return None if self._open is None or self._close is None else (self._open, self._close)

    def push(self, tokens: Sequence[int], *, last: bool) -> Piece:
        """Add final tokens; `last` gives out what was held back."""
        self._tokens += [int(token) for token in tokens]
        answer, thinking = self._decode(len(self._tokens))
        count, whole = len(self._tokens), len(answer)
        if not last:  # before the search: half a character is no replacement character, which a stop string may hold
            answer, thinking = answer.rstrip(_UNFINISHED), thinking.rstrip(_UNFINISHED)
        end = cut = min((at for stop in self.stop if (at := answer.find(stop)) >= 0), default=None)
        if cut is None and not last:
            held = self._held(answer)
            # The bytes of a character that is not all there may begin a stop string too.
            if held or (self.stop and len(answer) < whole):
                end = len(answer) - held
        if end is not None:
            # What is thought before the first character that is left out is said before it.
            thinking = self._decode(self._fewest(answer[: end + 1], ""))[1].rstrip(_UNFINISHED)
            answer = answer[:end]
            count = self._fewest(answer, thinking)
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

    def _fewest(self, answer: str, thinking: str) -> int:
        """Return how few tokens, of those given out already at least, say such beginnings of both.

        One by one: what tokens say is not always longer with one more. Where a character is a token for each byte, half
        a character behind a whole one spoils both, and spaces may be cleaned up.
        """
        for count in range(self.released, len(self._tokens)):
            said = self._decode(count)
            if said[0].startswith(answer) and said[1].startswith(thinking):
                return count
        return len(self._tokens)

    def _begun(self, prompt: Sequence[int]) -> tuple[bool, bool]:
        """Return whether a prompt ends inside the channel, and whether that has its name by then."""
        ends = (self._open, self._close)
        last = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in ends), None)
        if self.tokenizer is None or self._open is None or last is None or prompt[last] != self._open:
            return False, False
        return True, "\n" in self.tokenizer.decode(prompt[last + 1 :])

    def _decode(self, count: int) -> tuple[str, str]:
        """Answer and thinking that the first `count` tokens say."""
        if self.tokenizer is None:
            return "", ""
        parts: dict[bool, list[str]] = {False: [], True: []}
        run: list[int] = []
        inside, named = self.inside, self._named

        def close() -> None:
            text = self.tokenizer.decode(run) if self.tokenizer else ""
            # A channel begins with its name on a line of its own.
            parts[inside].append(text.partition("\n")[2] if inside and not named else text)
            run.clear()

        for token in self._tokens[:count]:
            if self._open is not None and token in (self._open, self._close):
                close()
                inside, named = token == self._open, False
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
