"""Text of files as it stands: line ends, byte order mark and encoding are kept, and go back as they came."""

from __future__ import annotations

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from ..checkpoints.files import read_bytes
from .options import LARGEST_PROMPT

_MARKS = (  # UTF-32's begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """A file's text, and how it was written."""

    text: str
    data: bytes
    """All of the file."""
    mark: bytes = b""
    encoding: str = "utf-8"

    def encoded(self, text: str) -> bytes:
        """Return text written in the same way."""
        return self.mark + text.encode(self.encoding)


def read_exact(file: Path) -> Exact:
    """Read a file; - is stdin.

    Raises:
        DgemmaError, click.ClickException: not a file, not readable, neither UTF-8 nor of a byte order mark's encoding,
            or more than any model reads.
    """
    if str(file) != "-":
        return decoded(read_bytes(file, LARGEST_PROMPT), str(file))
    if sys.stdin is None:
        return decoded(b"", "stdin")
    try:
        return decoded(sys.stdin.buffer.read(LARGEST_PROMPT + 1), "stdin")
    except OSError as error:
        raise click.ClickException(f"stdin: {error.strerror or error}") from None


def decoded(data: bytes, where: str) -> Exact:
    if len(data) > LARGEST_PROMPT:
        raise click.ClickException(f"{where}: longer than {LARGEST_PROMPT >> 20} MiB; no model reads so much at once")
    mark, encoding = next((one for one in _MARKS if data.startswith(one[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise click.ClickException(f"{where}: not {encoding.upper()} (byte {at} is 0x{data[at]:02x})") from None
    return Exact(text=text, data=data, mark=mark, encoding=encoding)
