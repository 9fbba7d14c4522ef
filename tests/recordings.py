"""Streams that know what they answer, without a model: what recordings are made of in tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import dgemma
from dgemma.core.events import Commit, Done, Draft, Event, Prefill
from dgemma.show.asked import Asked, Stream
from dgemma.show.recording import Recording
from scripted import EOS, STATS, ScriptedModel, Words


class Bytes(Words):
    """A tokenizer whose tokens are bytes; 0 is the end."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return bytes(i for i in ids if i != EOS).decode("utf-8", "replace")


class Told(Stream):
    """Events, and what they answer."""

    def __init__(self, events: Sequence[Event], asked: Asked) -> None:
        self.asked = asked
        self.events = list(events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


def scripted(words: Sequence[str], *, title: str = "", canvas: int = 0, thinking: str = "") -> Told:
    """What a `ScriptedModel` writes."""
    model = ScriptedModel(words, canvas=canvas, thinking=thinking)
    asked = Asked(tokenizer=model.tokenizer, ends=(EOS,), budget=1000, prompt=(1, EOS), title=title, model="scripted")
    return Told(list(model.stream("x")), asked)


def spelled(text: str, *, held: int = 0) -> Told:
    """Two passes over the bytes of a text, the first of which knows half of them; so many of the first are held."""
    tokens = np.asarray([*text.encode(), EOS], np.int32)
    known = np.arange(len(tokens)) < len(tokens) // 2
    marks = np.arange(len(tokens)) < held
    first = Draft(
        canvas=0, step=0, steps=4, tokens=np.where(known, tokens, 65).astype(np.int32), accepted=known,
        entropy=np.where(known, 0.0004, np.log(3)).astype(np.float32), following=tokens[::-1].copy(), held=marks,
        log_accept=-1.23456,
    )  # fmt: skip
    last = replace(first, step=1, tokens=tokens, accepted=np.ones(len(tokens), bool), following=None, log_accept=None)
    commit = Commit(canvas=0, tokens=tuple(tokens[:-1].tolist()), text=text, thinking="")
    events = [Prefill(done=3, total=3), first, last, commit, Done(finish_reason="stop", stats=STATS)]
    return Told(events, Asked(tokenizer=Bytes([]), ends=(EOS,), budget=1000, title=f"$ say {text}"))


def recorded(told: Stream, path: Path) -> Recording:
    list(dgemma.record(told, path))
    return dgemma.replay(path)
