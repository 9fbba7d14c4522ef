"""Reads: what a model makes of given choices at a place of a short canvas, in one pass, with nothing committed.

    canvas   template tokens · noise where a place is · the rest of the template · end · filler

A choice of one token is read off that pass. One of several is taken by the chain over positions, p(t₁) · p(t₂ | t₁)
and so on, and each factor is a canvas of its own: the tokens before are in place, those from it on are noise. These
canvases are known before any is looked at, so they share passes. A product over the positions of one canvas would not
do: where "north wind" and "south sea" are as likely, it gives as much to "north sea".

Choices of one length are read with all that follows them in view. Of different lengths they are not: what follows
would tell how long the choice is. It is noise then, and its first token, or the end, closes each choice's chain: so
"no" and "no idea" share nothing, and what all texts have together is one.

Probabilities are the model's own at temperature 1, averaged over as many noises as are asked for. Nothing makes them
calibrated: what is said with 0.9 may be right less often, or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.config import ModelConfig
from ..core.errors import DgemmaError, quoted
from ..core.given import integer
from ..core.passes import Scores
from ..core.row import SHORT, check_tokens
from ..core.sampler import first_canvas
from .places import MARKER, Encode, Layout, Place, Tokens, lay_out
from .reader import Look, Reader

MOST_SAMPLES = 1024


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model makes of choices at one place."""

    probabilities: Mapping[str, float]
    """Of each choice, in the order given; they sum to 1."""
    label_mass: float
    """What the choices have together of all that the model could say there: how far they are what it would say."""
    entropy: float
    """Nats, of `probabilities`."""
    full_entropy: float
    """Nats, of the distribution over the whole vocabulary at the place's first position; the mean over samples."""
    token: int
    """The likeliest token there."""
    argmax_is_label: bool
    """Whether a choice begins with it."""

    @property
    def choice(self) -> str:
        """The likeliest choice; the first of equals."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """How canvases to be read are made.

    Args:
        end: the token that ends an answer.
        fillers: what may stand behind it; of several the model says which it knows.
        length: positions; None is the smallest of 16, 32, 64, 128 and 256 that hold the template and its end.
    """

    vocab_size: int
    end: int
    fillers: Tokens
    length: int | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        integer("samples", self.samples, 1, MOST_SAMPLES)
        integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.length is not None:
            integer("canvas_length", self.length, 1, 1 << 31)

    def positions(self, layout: Layout) -> int:
        """Return how many positions a layout's canvases have.

        Raises:
            DgemmaError: it does not fit, with the numbers.
        """
        if self.length is None:
            needed = layout.size + 1
            found = next((size for size in SHORT if size >= needed), None)
            if found is None:
                raise DgemmaError(
                    f"the template has {needed:,} tokens with its end, and a canvas of {SHORT[-1]} is the longest that "
                    "is taken unasked; shorten it, move some of it into the prompt, or give canvas_length"
                )
            return found
        needed = layout.size + (not layout.places[0].even)
        if self.length < needed:
            raise DgemmaError(
                f"canvas_length is {self.length}, and the template takes {needed:,} tokens; give at least as many"
            )
        return int(self.length)

    def empty(self, layout: Layout, sample: int, filler: int) -> np.ndarray:
        """Return a canvas with noise in all places, int32 [L]."""
        noise = first_canvas(self.seed, sample, self.positions(layout), self.vocab_size)
        canvas, size = np.full_like(noise, filler), len(layout.tokens)
        canvas[:size] = layout.tokens
        canvas[size : size + 1] = self.end
        for place in layout.places:
            stop = place.start + place.longest
            if not place.even:  # what follows would tell the length
                stop = layout.size + 1
                canvas[stop:] = filler
            canvas[place.start : stop] = noise[place.start : stop]
        return canvas


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One place's canvases: which choices' tokens are read where."""

    place: Place
    strings: tuple[Tokens, ...]
    """Each choice's tokens, and what closes it where lengths differ."""

    @property
    def nodes(self) -> list[Tokens]:
        """What may stand before a token that is read: the beginning first."""
        return list(dict.fromkeys(string[:i] for string in self.strings for i in range(len(string))))


def chain_of(layout: Layout, place: Place, end: int) -> Chain:
    if place.even:
        return Chain(place=place, strings=place.strings)
    closing = layout.behind[:1] or (end,)
    return Chain(place=place, strings=tuple((*string, *closing) for string in place.strings))


def read(
    reader: Reader, asked: Sequence[tuple[Tokens, Layout]], canvas: Canvas, stem: Tokens = ()
) -> list[list[Reading]]:
    """Read every place of templates, each behind its prompt; `stem` is what all prompts begin with.

    Raises:
        DgemmaError: a prompt and its canvas exceed the model's context, or what `Reader.scores` says.
    """
    _check_room(reader.engine.passes.config, asked, canvas)
    filler = filler_of(reader, canvas)
    looks: dict[_Key, dict[int, None]] = {}  # by prompt and canvas: the positions asked for
    plans = []
    for prompt, layout in asked:
        empties = [canvas.empty(layout, sample, filler) for sample in range(canvas.samples)]
        for place in layout.places:
            chain = chain_of(layout, place, canvas.end)
            spots = [
                {node: _spot(prompt, empty, place.start, node, looks) for node in chain.nodes} for empty in empties
            ]
            plans.append((chain, spots))
    tokens = sorted({token for chain, _ in plans for string in chain.strings for token in string})
    numbers = {token: i for i, token in enumerate(tokens)}
    made = [Look(prompt=key[0], canvas=np.frombuffer(key[1], np.int32), at=tuple(at)) for key, at in looks.items()]
    found = dict(zip(looks, reader.scores(made, tokens, stem), strict=True))
    rows = {(key, position): (found[key], i) for key, at in looks.items() for i, position in enumerate(at)}
    readings = iter([_reading(chain, spots, rows, numbers) for chain, spots in plans])
    return [[next(readings) for _ in layout.places] for _, layout in asked]


def _check_room(config: ModelConfig, asked: Sequence[tuple[Tokens, Layout]], canvas: Canvas) -> None:
    for prompt, layout in asked:
        check_tokens(prompt, config.vocab_size, config.image_token_ids)
        check_tokens(layout.tokens, config.vocab_size, config.image_token_ids, what="the template")
        if len(prompt) + canvas.positions(layout) > config.max_positions:
            raise DgemmaError(
                f"the prompt has {len(prompt):,} tokens and the canvas {canvas.positions(layout)}, more than the "
                f"model's context of {config.max_positions:,}; shorten the prompt"
            )


_Key = tuple[Tokens, bytes]
_Spot = tuple[_Key, int]
_Rows = Mapping[_Spot, tuple[Scores, int]]


def _spot(prompt: Tokens, empty: np.ndarray, start: int, node: Tokens, looks: dict[_Key, dict[int, None]]) -> _Spot:
    """Ask for the position behind a beginning of a place's strings → under what its scores will be found."""
    canvas = empty.copy()
    canvas[start : start + len(node)] = node
    key = (prompt, canvas.tobytes())
    looks.setdefault(key, {})[start + len(node)] = None
    return key, start + len(node)


def _reading(
    chain: Chain, samples: Sequence[Mapping[Tokens, _Spot]], rows: _Rows, numbers: Mapping[int, int]
) -> Reading:
    """Put one place's reading together: of each sample, where the scores behind each beginning are."""

    def log_p(at: Mapping[Tokens, _Spot], string: Tokens) -> float:
        found = [rows[at[string[:i]]] for i in range(len(string))]
        return sum(float(one.log_p[row, numbers[token]]) for (one, row), token in zip(found, string, strict=True))

    logs = np.array([[log_p(at, string) for string in chain.strings] for at in samples])  # [samples, choices]
    mean = np.logaddexp.reduce(logs, 0) - math.log(len(samples))
    mass = float(np.logaddexp.reduce(mean))
    shares = np.exp(mean - mass)
    begins = [rows[at[()]] for at in samples]
    tops: dict[int, float] = {}
    for scores, row in begins:
        token = int(scores.token[row])
        tops[token] = tops.get(token, 0.0) + math.exp(float(scores.top[row]))
    token = max(tops, key=tops.__getitem__)
    return Reading(
        probabilities={name: float(share) for name, share in zip(chain.place.choices, shares, strict=True)},
        label_mass=min(math.exp(mass), 1.0),
        entropy=entropy_of(shares),
        full_entropy=float(np.mean([scores.entropy[row] for scores, row in begins])),
        token=token,
        argmax_is_label=any(string[0] == token for string in chain.strings),
    )


def entropy_of(shares: Sequence[float] | np.ndarray) -> float:
    """Return the entropy of probabilities, in nats."""
    return -sum(p * math.log(p) for p in map(float, shares) if p > 0)


# ---- What is asked --------------------------------------------------------------------------------------------


def layout_of(choices: Any, template: str | None, encode: Encode) -> Layout:
    """Check choices and a template, and tokenize them.

    Args:
        choices: texts; with several places a list of texts for all, or a list of lists, one for each.
        template: text with `<read>` where a choice stands; None is nothing but a choice.

    Raises:
        DgemmaError: what is wrong with which.
    """
    if template is not None and not isinstance(template, str):
        raise DgemmaError(f"template is {quoted(template, 40)}, expected text with {MARKER} in it")
    text = MARKER if template is None else template
    places = text.count(MARKER)
    if not places:
        raise DgemmaError(f"the template has no {MARKER}: put it where a choice stands")
    _check_text("template", text)
    several = isinstance(choices, list | tuple) and any(isinstance(one, list | tuple) for one in choices)
    lists = list(choices) if several else [choices] * places
    for i, some in enumerate(lists):
        name = f"choices of place {i + 1}" if several else "choices"
        if not isinstance(some, list | tuple) or len(some) < 2 or not all(isinstance(one, str) and one for one in some):
            raise DgemmaError(f"{name}: {quoted(some, 40)}, expected a list of two texts or more, none of them empty")
        for one in some:
            _check_text(name, one)
        twice = next((one for one in some if some.count(one) > 1), None)
        if twice is not None:
            raise DgemmaError(f"{name}: {quoted(twice)} is there twice")
    return lay_out(text, lists, encode)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DgemmaError(f"{name}: {quoted(text)} is not valid text: half a character (a lone surrogate)") from None


def canvas_of(
    config: ModelConfig, ends: Sequence[int], end: int | None, *, length: int | None, samples: int, seed: int
) -> Canvas:  # fmt: skip
    """Return how canvases are made for a model whose answers may end with `ends`, and are ended with one of them."""
    fillers = tuple(sorted({config.pad_token_id, *ends}))
    return Canvas(
        vocab_size=config.vocab_size, end=config.pad_token_id if end is None else end, fillers=fillers, length=length,
        samples=samples, seed=seed,
    )  # fmt: skip


def filler_of(reader: Reader, canvas: Canvas) -> int:
    """Return what the model was trained to see behind an answer's end: of several candidates it is asked, once.

    Checkpoints do not say: published recipes fill with padding, or with an end of sequence.
    """
    if len(canvas.fillers) == 1:
        return canvas.fillers[0]
    if reader.filler is None:
        config = reader.engine.passes.config
        noise = first_canvas(0, 0, min(SHORT[0], config.max_positions - 1), config.vocab_size)
        noise[0] = canvas.end
        prompt = (canvas.end if config.bos_token_id is None else config.bos_token_id,)
        look = Look(prompt=prompt, canvas=noise, at=tuple(range(1, len(noise))))
        reader.filler = canvas.fillers[int(reader.scores([look], canvas.fillers)[0].log_p.sum(0).argmax())]
    return reader.filler
