"""The constraint that a generation's options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import DgemmaError
from ..core.options import GenerateOptions
from ..core.tokens import Decoder
from ..text.tokens import Tokenizer
from .chars import CharDfa
from .compiled import compile_constraint
from .schema import regex_of_choices, regex_of_schema
from .stored import cache_folder
from .typed import schema_of
from .walk import Constraint


def constraint_of(
    options: GenerateOptions,
    tokenizer: Tokenizer | None,
    *,
    prompt: Sequence[int],
    ends: Sequence[int],
    pad: int | None,
) -> Constraint | None:
    """Return what an answer behind a prompt has to be, or None where anything may be.

    Raises:
        DgemmaError: what is asked for cannot be done, or not together with another option; names the option.
    """
    language = options.language
    if language is None:
        if options.feedback is not None:
            raise DgemmaError("feedback belongs to regex, schema, choices or dfa, none of which is given")
        return None
    if tokenizer is None:
        raise DgemmaError(f"{language}: the checkpoint has no tokenizer, so there is no text to constrain")
    if options.stops:
        raise DgemmaError(f"{language} and stop are both given: a text that is cut is not what was asked for")
    if not ends:
        raise DgemmaError(f"{language} needs an end-of-sequence token, and eos is empty: a text has to end somewhere")
    automaton = compile_constraint(
        _source(language, options), tokenizer, ends=ends, pad=pad, thinking=options.thinking,
        opened=Decoder(tokenizer, (), prompt).inside, cache=cache_folder(),
    )  # fmt: skip
    return Constraint(automaton=automaton, feedback=float(options.feedback or 0.0))


def _source(language: str, options: GenerateOptions) -> str | CharDfa:
    match language:
        case "regex":
            return _typed("regex", options.regex, str)
        case "choices":
            return regex_of_choices(options.alternatives)
        case "schema":
            return regex_of_schema(schema_of(options.schema))
    return _typed("dfa", options.dfa, CharDfa)


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        expected = "a pattern as text" if kind is str else "what dgemma.constraints.from_states returns"
        raise DgemmaError(f"{name} is of type {type(value).__name__}, expected {expected}")
    return value
