"""What an error must look like: DgemmaError, one printable line, short, and with the words that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dgemma.core.errors import DgemmaError


def check_line(error: BaseException, *words: str) -> None:
    line = str(error)
    assert type(error) is DgemmaError, repr(error)
    assert 0 < len(line) < 300 and line.isprintable(), line
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


@contextmanager
def says(*words: str) -> Iterator[None]:
    """Expect a DgemmaError whose line holds all the words."""
    with pytest.raises(DgemmaError) as caught:
        yield
    check_line(caught.value, *words)
