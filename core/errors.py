"""The one exception that dgemma raises on purpose."""


class DgemmaError(ValueError):
    """Bad input, said in one line: which file, key or option, what was expected, what to do."""
