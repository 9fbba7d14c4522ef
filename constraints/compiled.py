"""From what a user asks of an answer to the automaton over a model's tokens."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ..core.tokens import CHANNEL_CLOSE, CHANNEL_OPEN
from ..text.tokens import Tokenizer
from .automaton import TokenAutomaton
from .chars import CharDfa, from_pattern
from .stored import load, save
from .tokens import Ends, token_automaton
from .utf8 import ByteDfa

VERSION = 1
"""Of what is compiled: stored automata of another version are made anew."""


def compile_constraint(
    source: str | CharDfa,
    tokenizer: Tokenizer,
    *,
    ends: Sequence[int],
    pad: int | None = None,
    thinking: bool = False,
    opened: bool = False,
    cache: Path | None = None,
) -> TokenAutomaton:
    """Compile what an answer must be, over the tokens of a model.

    Args:
        source: a regular expression of Python's, which the whole answer matches as by `re.fullmatch`, or an automaton
            over characters: `chars.from_states`.
        tokenizer: the model's.
        ends: its end-of-sequence ids.
        pad: its padding token.
        thinking: the model may think in its channel before the answer, freely; a tokenizer without a channel has none.
        opened: the prompt ends inside the channel, so that thinking comes first whatever `thinking` says: what the
            constraint is about is the text behind it.
        cache: folder with automata compiled before, by content, such as `stored.cache_folder()`; None keeps none.

    Returns:
        The automaton: equal input gives equal arrays in every process.

    Raises:
        DgemmaError: no pattern, one that no finite automaton can do or that matches nothing, one that is too large,
            no end token, a tokenizer whose decoder cannot be followed, or one that cannot write what is asked.
    """
    opening, closing = tokenizer.id_of(CHANNEL_OPEN), tokenizer.id_of(CHANNEL_CLOSE)
    channel = (opening, closing) if (thinking or opened) and opening is not None and closing is not None else None
    meant = Ends(ends=tuple(sorted({*map(int, ends)})), pad=pad, channel=channel, open=opened and channel is not None)
    spelling = tokenizer.spelling
    name = _name(source, spelling.key, meant)
    found = load(cache, name) if cache is not None else None
    if found is None or len(found.classes) != len(spelling.known):
        dfa = from_pattern(source) if isinstance(source, str) else source
        found = token_automaton(ByteDfa.of(dfa), spelling, meant)
        if cache is not None:
            save(cache, name, found)
    return found


def _name(source: str | CharDfa, vocabulary: str, meant: Ends) -> str:
    found = hashlib.sha256(repr((VERSION, unicodedata.unidata_version, vocabulary, meant)).encode())
    if isinstance(source, str):
        found.update(b"pattern" + source.encode(errors="surrogatepass"))
    else:
        for array in (source.atoms, source.table, source.accepting):
            found.update(repr(array.shape).encode() + array.tobytes())
        found.update(str(source.start).encode())
    return found.hexdigest()[:40]
