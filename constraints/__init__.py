"""What an answer must look like: patterns and schemas as automata over the tokens of a canvas."""

from .automaton import TokenAutomaton
from .chars import CharDfa, from_pattern, from_states
from .compiled import compile_constraint
from .stored import cache_folder

__all__ = ["CharDfa", "TokenAutomaton", "cache_folder", "compile_constraint", "from_pattern", "from_states"]
