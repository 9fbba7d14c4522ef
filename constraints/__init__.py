"""What an answer must look like: patterns and schemas as automata over the tokens of a canvas."""
