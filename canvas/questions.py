"""Typed questions about a state: yes or no, one of several, a level on a scale; answered by reading an option's letter.

    question   in the shape of SystemOne, {id: {type, instructions, criteria}}, or of OpenAI's decisions, [{name, type,
               instructions, choices | levels}]; one record for both
    options    A, B, C, …; behind Z letters in pairs, or in as many as it takes, of one length in tokens
    answer     the option's probabilities, and what follows from them

The state comes first and the question behind it, so that all questions about a state begin with the same tokens, which
are read once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_uppercase
from typing import Any, Literal

from ..core.errors import DgemmaError, quoted
from .places import MARKER, Encode, in_common
from .read import Reading

Kind = Literal["predicate", "choice", "score"]
KINDS: Mapping[str, Kind] = {
    "noul": "predicate", "yes_no": "predicate", "predicate": "predicate", "choice": "choice", "score": "score",
}  # fmt: skip
"""What a question's type may be called."""
MOST_OPTIONS: Mapping[Kind, int] = {"predicate": 2, "choice": 255, "score": 10}
MOST_QUESTIONS = 4096
_KEYS = {"type", "instructions", "criteria", "choices", "levels", "name"}

Questions = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, checked."""

    name: str
    type: str
    """As it was called."""
    kind: Kind
    instructions: str
    options: tuple[tuple[str, str], ...]
    """What can be answered, and what is said about it; of a score the levels, from 0 on."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model makes of a question."""

    question: Question
    probabilities: Mapping[str, float]
    """By option, summing to 1: of a predicate `true` and `false`, of a score the level's number."""
    label_mass: float
    """As `Reading.label_mass`: how far the model would answer with the letter of an option at all."""
    entropy: float
    """Nats, of `probabilities`."""
    argmax_is_label: bool
    """Whether an option's letter is the likeliest token of all, at its first position."""

    @property
    def choice(self) -> str:
        """The likeliest option."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def score(self) -> float:
        """The mean level of a score; of a predicate the probability of yes."""
        if self.question.kind == "predicate":
            return self.probabilities["true"]
        return sum(i * p for i, p in enumerate(self.probabilities.values()))

    @property
    def confidence(self) -> float:
        """From 0, as good as no opinion, to 1, sure. It says nothing of `label_mass`, which stands beside it.

        Of n options with the likeliest at p: (n·p − 1) / (n − 1). Of a score: 1 − the mean distance from the likeliest
        level over that of levels all alike, and at least 0.
        """
        shares = list(self.probabilities.values())
        n, top = len(shares), shares.index(max(shares))
        if self.question.kind != "score":
            return (n * shares[top] - 1) / (n - 1)
        spread = sum(abs(i - top) for i in range(n)) / n
        return max(0.0, 1 - sum(p * abs(i - top) for i, p in enumerate(shares)) / spread)

    def as_dict(self) -> dict[str, Any]:
        """Return it in SystemOne's shape, with `label_mass`, `entropy` and `argmax_is_label` beside."""
        beside = {"label_mass": self.label_mass, "entropy": self.entropy, "argmax_is_label": self.argmax_is_label}
        given = {"type": self.question.type}
        if self.question.kind == "predicate":
            return given | {"noul": self.score} | beside
        if self.question.kind == "choice":
            said: dict[str, Any] = {"choice": self.choice}
        else:
            said = {"score": self.score}
        said |= {"confidence": self.confidence, "probabilities": dict(self.probabilities)}
        if self.question.kind == "score":
            said["legend"] = {str(i): level for i, (level, _) in enumerate(self.question.options)}
        return given | said | beside


def answer_of(question: Question, labels: Sequence[str], reading: Reading) -> Answer:
    """Return a question's answer from what was read of its options' labels."""
    names: Sequence[str] = [name for name, _ in question.options]
    if question.kind != "choice":
        names = ["true", "false"] if question.kind == "predicate" else [str(i) for i in range(len(names))]
    return Answer(
        question=question,
        probabilities={name: reading.probabilities[label] for name, label in zip(names, labels, strict=True)},
        label_mass=reading.label_mass,
        entropy=reading.entropy,
        argmax_is_label=reading.argmax_is_label,
    )


# ---- What is asked --------------------------------------------------------------------------------------------


def questions_of(given: Any) -> list[Question]:
    """Check questions, by id or in a list with names.

    Raises:
        DgemmaError: what is wrong with which question.
    """
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list | tuple):
        pairs = [(one.get("name") if isinstance(one, Mapping) else None, one) for one in given]
    else:
        raise DgemmaError(f"questions is {quoted(given, 40)}, expected a table of questions by name, or a list of them")
    if not 1 <= len(pairs) <= MOST_QUESTIONS:
        raise DgemmaError(f"questions: {len(pairs):,} are given, expected from 1 to {MOST_QUESTIONS:,}")
    found: dict[str, Question] = {}
    for i, (name, one) in enumerate(pairs, 1):
        if not isinstance(name, str) or not name:
            raise DgemmaError(f"question {i}: name is {quoted(name, 40)}, expected text")
        if name in found:
            raise DgemmaError(f"question {quoted(name, 40)} is there twice; give each a name of its own")
        found[name] = _question(name, one)
    return list(found.values())


def _question(name: str, given: Any) -> Question:
    where = f"question {quoted(name, 40)}"
    if not isinstance(given, Mapping):
        raise DgemmaError(f"{where} is {quoted(given, 40)}, expected an object with type, instructions and criteria")
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise DgemmaError(f"{where}: {quoted(unknown[0], 40)} is unknown, expected type, instructions and criteria")
    kind = KINDS.get(given.get("type", "")) if isinstance(given.get("type"), str) else None
    if kind is None:
        raise DgemmaError(f"{where}: type is {quoted(given.get('type'), 40)}, expected noul, yes_no, choice or score")
    said = given.get("instructions")
    if said is not None and not isinstance(said, str):
        raise DgemmaError(f"{where}: instructions is {quoted(said, 40)}, expected text")
    keys = [key for key in ("criteria", "choices", "levels") if given.get(key) is not None]
    if len(keys) > 1:
        raise DgemmaError(f"{where}: {keys[0]} and {keys[1]} are given, and they are the same; leave one out")
    key = keys[0] if keys else {"choice": "criteria", "score": "criteria"}.get(kind, "criteria")
    options = _options(f"{where}: {key}", kind, given.get(key))
    if kind == "predicate" and not (said or "").strip() and not any(text for _, text in options):
        raise DgemmaError(f"{where}: instructions are missing: ask something that yes or no answers")
    return Question(name=name, type=given["type"], kind=kind, instructions=(said or "").strip(), options=options)


def _options(where: str, kind: Kind, given: Any) -> tuple[tuple[str, str], ...]:
    """Return a question's options: names, and what is said about each."""
    if kind == "predicate":
        return _both(where, given)
    pairs: list[tuple[Any, Any]]
    if kind == "choice" and isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list | tuple):
        pairs = [
            (one.get("name"), one.get("description")) if isinstance(one, Mapping) else (one, None) for one in given
        ]
    else:
        expected = "names with descriptions" if kind == "choice" else "a list of levels, the lowest first"
        raise DgemmaError(f"{where} is {quoted(given, 40)}, expected {expected}")
    most = MOST_OPTIONS[kind]
    if not 2 <= len(pairs) <= most:
        raise DgemmaError(f"{where} has {len(pairs)}, expected from 2 to {most}")
    for name, text in pairs:
        if not isinstance(name, str) or not name.strip() or not isinstance(text, str | None):
            raise DgemmaError(f"{where} holds {quoted(name, 40)}: {quoted(text, 40)}, expected text")
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DgemmaError(f"{where} holds {quoted(twice, 40)} twice")
    return tuple((str(name), str(text or "").strip()) for name, text in pairs)


def _both(where: str, given: Any) -> tuple[tuple[str, str], ...]:
    if given is None:
        given = {}
    said = {str(key).lower(): text for key, text in given.items()} if isinstance(given, Mapping) else {"": None}
    if said.keys() - {"true", "false"} or not all(isinstance(text, str | None) for text in said.values()):
        raise DgemmaError(f"{where} is {quoted(given, 40)}, expected an object with texts for true and false")
    return ("yes", (said.get("true") or "").strip()), ("no", (said.get("false") or "").strip())


# ---- How it is asked ------------------------------------------------------------------------------------------


def labels_of(count: int, encode: Encode) -> list[str]:
    """Return labels of one length in tokens: letters; of more than 26 options pairs of letters, of one token each where
    the tokenizer has so many.

    Raises:
        DgemmaError: no pairs or triples of one length are enough.
    """
    for width in range(1 if count <= len(ascii_uppercase) else 2, 4):
        by_size: dict[int, list[str]] = {}
        for letters in product(ascii_uppercase, repeat=width):
            by_size.setdefault(len(encode("".join(letters))), []).append("".join(letters))
        enough = [size for size, same in by_size.items() if len(same) >= count]
        if enough:
            return by_size[min(enough)][:count]
    raise DgemmaError(f"the tokenizer has no {count} labels of one length for a question's options")


def asked(question: Question, labels: Sequence[str]) -> str:
    """Return one question as the model reads it."""
    lines = [question.instructions] if question.instructions else []
    lines += [f"{label}: {_option(*option)}" for label, option in zip(labels, question.options, strict=True)]
    return "\n".join(lines)


def _option(name: str, text: str) -> str:
    return f"{name} ({text})" if text else name


def single(question: Question, labels: Sequence[str]) -> tuple[str, str]:
    """Return what one question is asked with, and the template of its answer."""
    return f"{asked(question, labels)}\n\nAnswer with the letter of one option, and nothing else.", MARKER


def joined(questions: Sequence[Question], labels: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Return what several questions are asked with at once, and the template of their answers."""
    blocks = [f"{i}. {asked(one, some)}" for i, (one, some) in enumerate(zip(questions, labels, strict=True), 1)]
    blocks.append("Answer each question on a line of its own: its number, a colon and the letter of one option.")
    return "\n\n".join(blocks), "\n".join(f"{i}: {MARKER}" for i in range(1, len(questions) + 1))


def behind(state: Any, text: str) -> Any:
    """Return a state with a question behind it, as a prompt: text, or a chat's messages with one more.

    Raises:
        DgemmaError: a state that is neither text, messages nor what JSON can write.
    """
    if isinstance(state, str):
        return f"{state}\n\n{text}" if state.strip() else text
    if isinstance(state, list | tuple) and state and all(isinstance(one, Mapping) and "role" in one for one in state):
        return [*state, {"role": "user", "content": text}]
    if isinstance(state, list | tuple) and state and all(isinstance(one, int) for one in state):
        raise DgemmaError("questions stand behind text, messages or a JSON value; the prompt is token ids")
    try:
        return f"{json.dumps(state, ensure_ascii=False, allow_nan=False)}\n\n{text}"
    except (TypeError, ValueError, RecursionError):
        raise DgemmaError(f"the state is {quoted(state, 40)}, expected text, messages or a JSON value") from None


def common(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what all prompts begin with."""
    first, last = min(prompts), max(prompts)  # all others stand between them
    return first[: in_common(first, last)]
