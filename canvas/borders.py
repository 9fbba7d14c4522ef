"""Pieces of a text as tokens by themselves, beside holes: each spells its piece exactly, whatever stands next to it.

A tokenizer may put a space before what it takes for the beginning of a text, drop the space that a text begins with,
compose characters, or have no token for some. So a piece is read as if something stood before it, what its tokens spell
there is compared with it, and where that differs it is read in parts, down to single characters and their bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ..core.errors import DgemmaError, quoted
from ..text.spelling import alphabet
from ..text.tokens import Tokenizer

_BEFORE = ("\n", ".", "a")
"""What may stand before a piece: the first that is tokens of its own, whatever follows it."""


class Speller:
    """Spells pieces of text in a model's tokens.

    Args:
        specials: special tokens spelled out in the text become those tokens; else nothing in it does.
    """

    def __init__(self, tokenizer: Tokenizer, *, specials: bool = False) -> None:
        self.tokenizer, self.specials = tokenizer, specials

    def ids(self, piece: str, *, first: bool = False) -> list[int]:
        """Return a piece's tokens; `first` where a text begins with it.

        Raises:
            DgemmaError: the tokenizer cannot write it exactly.
        """
        if not piece:
            return []
        if first:
            ids = self.tokenizer.encode(piece, specials=self.specials)
            if self.tokenizer.decode(ids, special=True) == piece:
                return ids
        whole = self._whole(piece)
        if whole is not None:
            return whole
        if len(piece) == 1:
            return self._bytes(piece)
        middle = piece.rfind("\n", 0, len(piece) // 2) + 1 or len(piece) // 2
        return self.ids(piece[:middle], first=first) + self.ids(piece[middle:])

    def text(self, ids: Sequence[int], *, first: bool = False) -> str:
        """Return what tokens spell behind others, or where a text begins; special tokens are left out."""
        if first or not ids:
            return self.tokenizer.decode(ids)
        anchor, said = self._anchor
        found = self.tokenizer.decode([*anchor, *ids])
        return found[len(said) :] if found.startswith(said) else self.tokenizer.decode(ids)

    def _whole(self, piece: str) -> list[int] | None:
        """Return a piece's tokens behind something else, or None where they spell something else."""
        anchor, said = self._anchor
        for before in ("", *_BEFORE):
            # Behind a character: a tokenizer that puts a space before text puts it before that.
            head = self.tokenizer.encode(before, specials=False) if before else []
            ids = self.tokenizer.encode(before + piece, specials=self.specials)
            if ids[: len(head)] != head:
                continue
            ids = ids[len(head) :]
            if self.tokenizer.decode([*anchor, *ids], special=True) == said + piece:
                return ids
        return None

    def _bytes(self, character: str) -> list[int]:
        """Return a character's bytes as tokens: as byte fallback names them, or a byte-level alphabet."""
        anchor, said = self._anchor
        data = character.encode("utf-8", "surrogatepass")
        for names in ([f"<0x{byte:02X}>" for byte in data], [alphabet()[byte] for byte in data]):
            ids = [self.tokenizer.id_of(name) for name in names]
            known = [i for i in ids if i is not None]
            if len(known) == len(ids) and self.tokenizer.decode([*anchor, *known], special=True) == said + character:
                return known
        ids = self.tokenizer.encode(character, specials=self.specials)
        became = quoted(self.tokenizer.decode(ids, special=True), 40)
        raise DgemmaError(
            f"the text holds {quoted(character, 40)}, which this checkpoint's tokenizer cannot write exactly (it makes "
            f"{became} of it); leave it out"
        )

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Tokens that stand before what is decoded, and what they spell there."""
        for text in ("a", *_BEFORE):
            ids = self.tokenizer.encode(text, specials=False)
            said = self.tokenizer.decode(ids, special=True)
            if ids and said and self.tokenizer.decode([*ids, *ids], special=True).startswith(said):
                return ids, said
        return [], ""
