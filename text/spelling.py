"""What each token of a vocabulary says, in bytes: a token by itself may be half a character."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..core.errors import DgemmaError, quoted

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bytes:
    """One string of bytes for each token: token i says `flat[ends[i] - sizes[i] : ends[i]]`."""

    flat: np.ndarray
    """uint8"""

    sizes: np.ndarray
    """int32 [V]"""

    @cached_property
    def firsts(self) -> np.ndarray:
        """int64 [V]: where each token's bytes begin."""
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    def of(self, token: int) -> bytes:
        at = int(self.firsts[token])
        return self.flat[at : at + int(self.sizes[token])].tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Spelling:
    """What the tokens of a model say.

    Text is what the bytes of tokens say one after the other. Some decoders leave out a space at the beginning of a
    text: what a token says as the first one is told apart.
    """

    inside: Bytes
    first: Bytes
    known: np.ndarray
    """bool [V]: tokens that say something; not control tokens, nor ids without a token."""

    named: np.ndarray
    """bool [V]: ids that have a token, control tokens included."""

    @cached_property
    def key(self) -> str:
        """Hash of it all, in hexadecimal."""
        found = hashlib.sha256()
        for array in (self.inside.flat, self.inside.sizes, self.first.flat, self.first.sizes, self.known, self.named):
            found.update(np.int64(array.size).tobytes() + array.tobytes())
        return found.hexdigest()


def spelling_of(
    pieces: Mapping[int, str], decoder: dict[str, Any] | None, *, vocab_size: int, controls: frozenset[int], where: str
) -> Spelling:
    """Read a vocabulary.

    Args:
        pieces: how tokens are written in the vocabulary, by id; ids from `vocab_size` on take no part.
        decoder: as `tokenizer.json` writes it.
        controls: ids that say nothing.
        where: the file, for messages.

    Raises:
        DgemmaError: a decoder that makes of a token what other tokens decide, or one that is not known.
    """
    says, as_first = _reader(decoder, where)
    known, named = np.zeros(vocab_size, bool), np.zeros(vocab_size, bool)
    inside, first = [b""] * vocab_size, [b""] * vocab_size
    for token, piece in pieces.items():
        if token < vocab_size:
            named[token] = True
            if token not in controls:
                said = inside[token] = says(piece)
                first[token] = as_first(piece, said)
                known[token] = bool(said)
    return Spelling(inside=_bytes(inside), first=_bytes(first), known=known, named=named)


def _bytes(said: list[bytes]) -> Bytes:
    return Bytes(flat=np.frombuffer(b"".join(said), np.uint8), sizes=np.array([len(one) for one in said], np.int32))


Says = Callable[[str], bytes]
AsFirst = Callable[[str, bytes], bytes]


def _reader(decoder: dict[str, Any] | None, where: str) -> tuple[Says, AsFirst]:
    """Return what says a token's bytes inside a text, and what does at its beginning."""
    if decoder is None:  # tokens are words, with a space between
        return (lambda piece: b" " + piece.encode()), (lambda piece, said: said[1:])
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [one["type"] for one in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), lambda piece, said: said
    if kinds == ["Metaspace"]:
        mark = steps[0].get("replacement", "▁")
        dropped = steps[0].get("prepend_scheme", "always") != "never"
        return (
            lambda piece: piece.replace(mark, " ").encode(),
            lambda piece, said: piece.replace(mark, "").encode() if dropped and mark in piece else said,
        )
    return _sequence(steps, where)


@cache
def alphabet() -> tuple[str, ...]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, others are from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return tuple(chr(byte) if byte in plain else chr(0x100 + others.index(byte)) for byte in range(256))


def _byte_level() -> Says:
    """A character of the alphabet is its byte; a token with other characters is its own text."""
    bytes_of = {ord(character): byte for byte, character in enumerate(alphabet())}
    outside = re.compile(f"[^{re.escape(''.join(map(chr, bytes_of)))}]")

    def says(piece: str) -> bytes:
        return piece.encode() if outside.search(piece) else piece.translate(bytes_of).encode("latin-1")

    return says


def _sequence(steps: list[dict[str, Any]], where: str) -> tuple[Says, AsFirst]:
    """Read a chain of replacements, bytes spelled out, fusing and at its end the loss of one space at the beginning."""
    replaced: list[tuple[str, str]] = []
    spelled, fused, lost = False, False, b""
    for step in steps:
        kind = step["type"]
        text = step.get("pattern", {}).get("String")
        if kind == "Replace" and text and not fused and not spelled:
            replaced.append((text, step["content"]))
        elif kind == "ByteFallback" and not fused:
            spelled = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and not lost and step["start"] <= 1 and not step["stop"]:
            lost = step["content"].encode() * step["start"]
        else:
            raise DgemmaError(
                f"{where}: constraints cannot follow the decoder {quoted(kind, 40)}, here as {quoted(step, 120)}; "
                "expected ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and Strip of one leading space"
            )

    def says(piece: str) -> bytes:
        for old, new in replaced:
            piece = piece.replace(old, new)
        if spelled and len(piece) == 6 and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return piece.encode()

    return says, lambda piece, said: said.removeprefix(lost) if lost else said
