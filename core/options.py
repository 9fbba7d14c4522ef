"""What a generation can be asked for, declared once: name, type, range, what it does.

`DiffusionGemma.generate` and `stream` take these as keywords; command lines and files of prompts are made of the same
fields. Every default but the seed's and the flags' is None, the checkpoint's own setting.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, cast

from .errors import DgemmaError, quoted

Kind = Literal["integer", "number", "flag", "text", "texts", "ids", "canvas", "schema", "object"]
"""`texts` and `ids` are one or several; `canvas` is an integer or `fit`; a `schema` is a file to a command, and an
`object` is no command's."""
Group = Literal["length", "sampling", "prompt", "canvas"]

MOST = 1 << 31
LANGUAGES = ("regex", "schema", "choices", "dfa")
"""Options that say which answers there are."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """How an option is described to people, and the range of what is a number. What `help` says is one line."""

    kind: Kind
    help: str
    group: Group
    unit: str = "N"
    """What stands for the value in a command's help."""
    least: int = 0
    most: int = MOST
    letter: str = ""
    """Of its short form on a command line."""


def _option(help: str, kind: Kind, group: Group, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"said": Said(kind=kind, help=help, group=group, **more)})


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of one generation, checked as far as no model is needed for that.

    Raises:
        DgemmaError: a value of another kind, or out of range. What the sampler is given is checked by `SamplerConfig`.
    """

    # fmt: off
    max_new_tokens: int | None = _option(
        "Write at most N tokens, thinking included; 256 where the checkpoint does not say.",
        "integer", "length", least=1, letter="n",
    )
    seed: int = _option(
        "Same seed, same text: run to run and, in float32, on every backend.",
        "integer", "length", 0, most=(1 << 64) - 1,
    )
    canvas_length: int | Literal["fit"] | None = _option(
        "Denoise N tokens at once. fit: the checkpoint's number, and in the last canvas no more than are left.",
        "canvas", "length", least=1, unit="N|fit",
    )
    steps: int | None = _option(
        "Cap on the denoising passes of one canvas; most stop long before it.",
        "integer", "sampling", least=1,
    )
    schedule_steps: int | None = _option(
        "Passes over which the temperature falls; apart from --steps, so that a lower cap changes nothing else.",
        "integer", "sampling", least=1,
    )
    temperature: float | None = _option(
        "Multiplies the checkpoint's temperature schedule: 1 is as it stands, 0 is --greedy.",
        "number", "sampling", unit="T", letter="t",
    )
    greedy: bool | None = _option(
        "Accept the most probable token everywhere, instead of one that is drawn.",
        "flag", "sampling",
    )
    t_max: float | None = _option(
        "Temperature that the schedule starts from.",
        "number", "sampling", unit="T",
    )
    t_min: float | None = _option(
        "Temperature that it falls towards. One of the two takes the other with it where they would cross.",
        "number", "sampling", unit="T",
    )
    entropy_bound: float | None = _option(
        "How unsure the tokens accepted in one pass may be, taken together. Higher: fewer passes, more mistakes.",
        "number", "sampling", unit="NATS",
    )
    confidence: float | None = _option(
        "A canvas that no longer changes is finished once its mean entropy is below this; 0 takes every step.",
        "number", "sampling", unit="NATS",
    )
    stability: int | None = _option(
        "How many passes in a row must leave a canvas as it was before it is finished.",
        "integer", "sampling",
    )
    stop: str | Sequence[str] = _option(
        "End the answer where TEXT would begin. May be given several times; in bash $'\\n' is a line break.",
        "texts", "length", (), unit="TEXT",
    )
    eos: int | Sequence[int] | None = _option(
        "Token ids that end the answer.",
        "ids", "length",
    )
    thinking: bool = _option(
        "Let the model think first. What it thinks is shown apart from the answer.",
        "flag", "prompt", False,
    )
    thinking_budget: int | None = _option(
        "Close the thinking channel after N tokens, so that an answer is always left room for.",
        "integer", "length", least=1,
    )
    raw: bool = _option(
        "Give text to the model as it stands, without the chat template, special tokens and all.",
        "flag", "prompt", False,
    )
    specials: bool = _option(
        "Special tokens spelled out in a message are those tokens. Otherwise nobody can type one.",
        "flag", "prompt", False,
    )
    regex: str | None = _option(
        "Write what this regular expression matches, all of it.",
        "text", "canvas", unit="PATTERN",
    )
    schema: Any = _option(  # noqa: RUF009 - a field, of no type that it knows to be immutable
        "Write JSON that this schema allows.",
        "schema", "canvas", unit="FILE",
    )
    choices: str | Sequence[str] | None = _option(
        "Write one of these texts. Given several times.",
        "texts", "canvas", (), unit="TEXT",
    )
    dfa: Any = _option(  # noqa: RUF009 - a field, of no type that it knows to be immutable
        "Write what an automaton of one's own accepts.",
        "object", "canvas",
    )
    feedback: float | None = _option(
        "How much of what a constraint makes of a pass the model is told: 0 nothing, 1 all of it.",
        "number", "canvas", unit="SHARE", most=1,
    )
    init: str | Sequence[int] | None = _option(
        "Start from this draft of the answer instead of noise.",
        "text", "canvas", unit="TEXT",
    )
    strength: float | None = _option(
        "How much of a draft is lost to noise: 0 keeps it, 1 forgets it; 0.5 where nothing else is said.",
        "number", "canvas", unit="SHARE", most=1,
    )
    held: Any = _option(  # noqa: RUF009 - a field, of no type that it knows to be immutable
        "Tokens that positions of the answer keep.",
        "object", "canvas",
    )
    # fmt: on

    def __post_init__(self) -> None:
        from .given import check_flags, integer, number  # which need NumPy, and this module's readers do not

        if self.max_new_tokens is not None:
            integer("max_new_tokens", self.max_new_tokens, 1, MOST)
        integer("seed", self.seed, 0, SAID["seed"].most)
        match self.canvas_length:
            case None | "fit":
                pass
            case str():
                raise DgemmaError(f"canvas_length is {quoted(self.canvas_length)}, expected an integer, or 'fit'")
            case _:
                integer("canvas_length", self.canvas_length, 1, MOST)
        if self.thinking_budget is not None:
            integer("thinking_budget", self.thinking_budget, 1, MOST)
        for name in ("feedback", "strength"):
            if (value := getattr(self, name)) is not None:
                number(name, value, 0, SAID[name].most)
        if self.strength is not None and self.init is None:
            raise DgemmaError("strength says how much of a draft is lost, and there is none: give init")
        check_flags(thinking=self.thinking, raw=self.raw, specials=self.specials)
        if any(not isinstance(one, str) or not one for one in self.stops):
            raise DgemmaError("stop: expected non-empty strings")
        if not isinstance(self.choices, Collection | None) or isinstance(self.choices, Mapping | Set):
            raise DgemmaError(f"choices is {quoted(self.choices, 40)}, expected a text or a list of texts")
        if any(not isinstance(one, str) for one in self.alternatives):
            raise DgemmaError("choices: expected strings")
        if isinstance(self.schema, str):
            object.__setattr__(self, "schema", _loaded(self.schema))
        given = self._languages()
        if len(given) > 1:
            raise DgemmaError(f"{given[0]} and {given[1]} are both given: an answer is of one language")

    @property
    def language(self) -> str | None:
        """Which of `LANGUAGES` is given."""
        return next(iter(self._languages()), None)

    def _languages(self) -> list[str]:
        nothing = self.choices is None or (type(self.choices) is tuple and not self.choices)  # an empty list is a slip
        return [name for name in LANGUAGES if not (nothing if name == "choices" else getattr(self, name) is None)]

    @property
    def alternatives(self) -> tuple[str, ...]:
        """`choices` as a tuple."""
        if isinstance(self.choices, str):
            return (self.choices,)
        return () if self.choices is None else tuple(self.choices)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        several = not isinstance(self.stop, str) and isinstance(self.stop, Sequence)
        return tuple(self.stop) if several else (cast("str", self.stop),)

    @property
    def sampling(self) -> dict[str, Any]:
        """What `core.sampler.settings` takes."""
        return {name: getattr(self, name) for name, said in SAID.items() if said.group == "sampling"}


class Options(TypedDict, total=False):
    """The keywords of `GenerateOptions` but for those that stand by position."""

    canvas_length: int | Literal["fit"] | None
    schedule_steps: int | None
    temperature: float | None
    greedy: bool | None
    t_max: float | None
    t_min: float | None
    entropy_bound: float | None
    confidence: float | None
    stability: int | None
    stop: str | Sequence[str]
    eos: int | Sequence[int] | None
    thinking: bool
    thinking_budget: int | None
    raw: bool
    specials: bool
    regex: str | None
    schema: Any
    choices: str | Sequence[str] | None
    dfa: Any
    feedback: float | None
    init: str | Sequence[int] | None
    strength: float | None
    held: Any


SAID: Mapping[str, Said] = {one.name: one.metadata["said"] for one in fields(GenerateOptions)}
"""Every option, in the order of helps."""
DEFAULTS: Mapping[str, Any] = {one.name: one.default for one in fields(GenerateOptions)}


def _loaded(schema: str) -> Any:
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"schema is no JSON: {quoted(str(error))}") from None
    if found is None:  # which would be no schema
        raise DgemmaError("schema is JSON's null, expected an object, true or false")
    return found


def spread(given: Mapping[str, Any], count: int) -> list[GenerateOptions]:
    """Return the options of `count` prompts: a list or tuple of values is one for each, another value is for all.

    Where an option's own value is a sequence, as of `stop` and `eos`, one of strings or ids is for all, and one of
    sequences is one for each.

    Raises:
        DgemmaError: a list of another length, or a value that an option cannot have.
    """
    columns = {name: _column(name, value, count) for name, value in given.items()}
    return [GenerateOptions(**{name: column[i] for name, column in columns.items()}) for i in range(count)]


def _column(name: str, value: Any, count: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if SAID[name].kind in ("texts", "ids") and not any(isinstance(one, list | tuple) for one in value):
        return [value] * count
    if len(value) != count:
        raise DgemmaError(f"{name} has {len(value)} values for {count} prompts; give one for each, or one for all")
    return value
