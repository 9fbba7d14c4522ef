"""What an answer must look like: patterns and schemas as automata over the tokens of a canvas."""

from .automaton import TokenAutomaton
from .chars import CharDfa, from_pattern, from_states
from .compiled import compile_constraint
from .schema import regex_of_choices, regex_of_schema
from .stored import cache_folder
from .typed import parsed, schema_of

__all__ = [
    "CharDfa",
    "TokenAutomaton",
    "cache_folder",
    "compile_constraint",
    "from_pattern",
    "from_states",
    "parsed",
    "regex_of_choices",
    "regex_of_schema",
    "schema_of",
]
