"""Passes over a canvas as HTML: a page that stands by itself, or a part of one, as notebooks show it.

What draws is `canvas.js`; here is made what it draws. Nothing is loaded from anywhere, and text from outside becomes
markup nowhere: it travels as JSON without angle brackets and is put in as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..core.events import Commit, Done, Draft, Event
from .asked import Asked
from .frame import HELD, STATES, Frame, Pieces, Span, printable
from .lines import thousandths
from .recording import Recording

CANVAS, STYLE = "canvas.js", "canvas.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PAGE = """\
:root { color-scheme: light dark; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; }
"""
_HINT = "Point at a token, or go to it with the arrow keys, to see its number and its entropy."


class Drawing:
    """Gathers what `canvas.js` draws of one answer, event by event."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._pieces = Pieces(asked.tokenizer)
        self._frames = asked.frames()
        self._texts: dict[str, int] = {}
        self._passes: list[dict[str, Any]] = []
        self._said: list[tuple[str, str]] = []
        self._figures: str | None = None

    def add(self, event: Event) -> None:
        match event:
            case Draft():
                self._passes.append(self._pass(self._frames.add(event)))
            case Commit():
                self._frames.commit(len(event.tokens))
                self._say("thinking", event.thinking)
                self._say("answer", event.text)
            case Done():
                stats = event.stats
                self._figures = f"{stats.emitted_tokens:,} tokens in {stats.steps:,} passes"

    def _say(self, kind: str, text: str) -> None:
        if text:
            gap = "\n\n" if self._said and self._said[-1][0] != kind else ""
            self._said.append((kind, gap + printable(text, grid=True)))

    def _pass(self, frame: Frame) -> dict[str, Any]:
        draft, spans = frame.draft, frame.spans
        found = {
            "canvas": draft.canvas, "step": draft.step, "steps": draft.steps, "said": len(self._said),
            "accepted": frame.accepted, "free": int(frame.free.sum()), "entropy": thousandths(frame.uncertainty),
            "tokens": [self._number(span.text) for span in spans], "states": [span.state for span in spans],
            "ids": [draft.tokens[span.start : span.stop].tolist() for span in spans],
            "entropies": [_entropy(draft, span) for span in spans],
            "end": -1 if frame.end is None else int(frame.states[frame.end]), "blank": frame.blank,
        }  # fmt: skip
        if draft.log_accept is not None:
            found["log"] = thousandths(draft.log_accept)
        if any(span.stop - span.start > 1 for span in spans):
            found["widths"] = [span.stop - span.start for span in spans]
        if draft.following is not None:
            found["reads"] = [
                self._number(self._pieces.text(int(draft.following[span.start])))
                if draft.accepted[span.start] and span.stop - span.start == 1
                else -1
                for span in spans
            ]
        return found

    def _number(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def data(self, *, live: bool = False) -> dict[str, Any]:
        """Return all passes; of a canvas that is `live`, the newest one, and without a slider."""
        return {
            "title": printable(self._asked.title, grid=True), "texts": [*self._texts], "said": self._said,
            "passes": self._passes[-1:] if live else self._passes, "figures": self._figures, "live": live,
        }  # fmt: skip

    @property
    def held(self) -> bool:
        """Whether anything is held, which the legend then names."""
        return any(HELD in one["states"] for one in self._passes)


def _entropy(draft: Draft, span: Span) -> int | None:
    """The largest of a span, in thousandths of a nat."""
    value = float(draft.entropy[span.start : span.stop].max())
    return round(1000 * value) if np.isfinite(value) else None


def part(drawing: Drawing, *, live: bool = False) -> str:
    """Return markup for the middle of a page; without scripts it shows the text."""
    return _host(drawing, live=live) + _script()


def page(recording: Recording) -> str:
    """Return a whole page, which needs nothing else."""
    title = escape(printable(recording.turns[0].asked.title, grid=True).strip() or "A canvas being denoised")
    parts = "\n".join(_host(_drawn(turn.asked, turn)) for turn in recording.turns)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{_PAGE}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n{_script()}\n</body>\n</html>\n"
    )


def _host(drawing: Drawing, *, live: bool = False) -> str:
    data = drawing.data(live=live)
    text = "".join(said for _, said in data["said"])
    # The last attribute keeps a notebook's own keys away from the slider's.
    return (
        f'<div data-dgemma="new" data-lm-suppress-shortcuts="true"><pre>{escape(text)}</pre>'
        f'<script type="application/json">{_json(data)}</script>'
        f"<template><style>{_file(STYLE)}</style>{_figure(drawing)}</template></div>"
    )


def _script() -> str:
    # Some notebooks show one output twice, and in none of them is it known where a script runs from.
    start = (
        f"{_file(CANVAS)}\nfor (const host of document.querySelectorAll('[data-dgemma=\"new\"]')) {{\n"
        "  host.dataset.dgemma = 'drawn';\n"
        "  dgemmaCanvas(host, JSON.parse(host.querySelector('script').textContent));\n}"
    )
    return f"<script>(() => {{\n{start}\n}})();</script>"


def _drawn(asked: Asked, events: Iterable[Event]) -> Drawing:
    drawing = Drawing(asked)
    for event in events:
        drawing.add(event)
    return drawing


def _figure(drawing: Drawing) -> str:
    names: Sequence[str] = STATES if drawing.held else STATES[:HELD]
    legend = "".join(
        f'<li><span class="{name}">{"░░" if name == "changing" else name}</span>'
        f"{' changing' if name == 'changing' else ''}</li>"
        for name in names
    )
    return (
        '<figure><figcaption part="title"></figcaption>'
        '<pre part="canvas" tabindex="0" role="group" aria-label="Canvas"></pre>'
        '<div part="controls"><button part="play" type="button">Play</button>'
        '<div part="bars" aria-hidden="true"></div>'
        '<input part="slider" type="range" min="0" value="0" aria-label="Pass"></div>'
        f'<p part="count"></p><p part="detail" aria-live="polite" data-hint="{_HINT}"></p>'
        f"<ul>{legend}</ul></figure>"
    )


def _json(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends one, or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
