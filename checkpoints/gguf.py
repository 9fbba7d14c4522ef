"""The GGUF file format: a strict reader of headers, in bounded time and memory. No weight is read here.

A file is "GGUF", a version, the numbers of tensors and of settings; then the settings, each a name, a type and a value;
then, for each tensor, its name, dimensions (fastest first), type and offset; and after padding the tensors' bytes.

The `gguf` library says how large a block of each type is and, in `convert/gguf_blocks.py`, what it means. Headers it
reads as a trusted file's: counts and lengths are believed, so that a damaged one can make it loop for ever, and the
800,000 strings of this model's tokenizer become as many arrays, a gigabyte of them. So they are read here.
Sources: ggml's docs/gguf.md, and gguf-py.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DgemmaError, quoted, shown
from .files import open_file

SUFFIX = ".gguf"
MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 1 << 29  # bytes; this model's has 15 MB, nearly all of it tokens and merges
_MAX_NAME = 1 << 12
_CHUNK = 1 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_NUMPY = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a file."""

    kind: str
    """GGML's name of its type, such as F32 or Q4_K."""
    shape: tuple[int, ...]
    """Slowest first, as everywhere here."""
    start: int
    """Offset from the beginning of the file, in bytes."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Array:
    """A setting with many values, decoded when it is asked for."""

    kind: int
    count: int
    data: memoryview = field(repr=False)

    def strings(self) -> Iterator[bytes]:
        """Yield the values of an array of strings; nothing where it is of another kind."""
        at = 0
        for _ in range(self.count if self.kind == _STRING else 0):
            (length,) = struct.unpack_from("<Q", self.data, at)
            yield bytes(self.data[at + 8 : at + 8 + length])
            at += 8 + length

    def numbers(self) -> list[Any]:
        """Return the values of an array of numbers or booleans."""
        if self.kind not in _NUMPY:
            return []
        found = np.frombuffer(self.data, _NUMPY[self.kind], self.count)
        return (found != 0).tolist() if self.kind == 7 else found.tolist()


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A checked header."""

    path: Path
    metadata: Mapping[str, Any]
    """Settings: Python's own values, or an `Array`."""
    tensors: Mapping[str, Tensor]
    header: int
    """Bytes before the first tensor."""

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header.

        Raises:
            DgemmaError: not a GGUF file, truncated, or against the format in any way.
        """
        with open_file(path) as file:
            read = _Cursor(file, shown(path))
            try:
                return _read(read, path)
            except OSError as error:
                raise DgemmaError(f"{read.where}: {error.strerror or error}") from None


class _Cursor:
    """Takes values from the front of a file, and reads no further than they need."""

    def __init__(self, file: FileIO, where: str) -> None:
        self.file, self.where = file, where
        self.size = os.fstat(file.fileno()).st_size
        self.data = bytearray()
        self.at = 0

    def refuse(self, why: str) -> DgemmaError:
        return DgemmaError(f"{self.where}: not a sound GGUF file: {why}")

    def need(self, count: int, what: str) -> int:
        """Make the next `count` bytes be there, and return where they begin."""
        end = self.at + count
        if end > self.size:
            raise DgemmaError(f"{self.where}: truncated or damaged: {what} would end at byte {quoted(end, 30)} of "
                              f"{self.size}; download it again")  # fmt: skip
        if end > _MAX_HEADER:
            raise self.refuse(f"its header is longer than {_MAX_HEADER:,} bytes")
        while len(self.data) < end:
            part = self.file.read(max(_CHUNK, end - len(self.data)))
            if not part:
                raise DgemmaError(f"{self.where}: became shorter while it was being read")
            self.data += part
        start, self.at = self.at, end
        return start

    def take(self, code: str, what: str) -> Any:
        return struct.unpack_from(code, self.data, self.need(struct.calcsize(code), what))[0]

    def text(self, what: str, limit: int = _MAX_HEADER) -> bytes:
        length = self.take("<Q", what)
        if length > limit:
            raise self.refuse(f"{what} has {quoted(length, 30)} bytes")
        start = self.need(length, what)
        return bytes(self.data[start : start + length])

    def name(self, what: str) -> str:
        try:
            return self.text(what, _MAX_NAME).decode()
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is not UTF-8") from None


def _read(read: _Cursor, path: Path) -> GgufFile:
    start = read.need(min(8, read.size), "its beginning")
    if bytes(read.data[start : start + 4]) != MAGIC or read.size < 24:
        raise DgemmaError(f"{read.where}: not a GGUF file: it does not begin with GGUF")
    (version,) = struct.unpack_from("<I", read.data, 4)
    if version not in _VERSIONS:
        big = ", and of a big-endian machine" if version & 0xFFFF == 0 else ""
        raise DgemmaError(f"{read.where}: GGUF version {version}{big}; what can be read is 2 and 3, little-endian")
    tensors, settings = read.take("<Q", "the number of tensors"), read.take("<Q", "the number of settings")
    # The shortest setting takes 13 bytes and the shortest tensor 33, so that counts are checked before any loop.
    if settings * 13 + tensors * 33 > read.size:
        counts = f"{quoted(tensors, 24)} tensors and {quoted(settings, 24)} settings"
        raise DgemmaError(f"{read.where}: truncated or damaged: it claims {counts} in {read.size} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(settings):
        key = read.name("the name of a setting")
        if key in metadata:
            raise read.refuse(f"the setting {quoted(key)} stands twice")
        metadata[key] = _value(read, read.take("<I", "the type of a setting"), f"the setting {quoted(key)}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise read.refuse(f"general.alignment is {quoted(alignment, 30)}, expected a power of two")
    found: dict[str, Tensor] = {}
    for _ in range(tensors):
        name = read.name("the name of a tensor")
        if name in found:
            raise read.refuse(f"the tensor {quoted(name)} stands twice")
        found[name] = _tensor(read, name, alignment)
    header = -(-read.at // alignment) * alignment
    placed = {name: _moved(one, header) for name, one in found.items()}
    _check_places(read, placed)
    return GgufFile(path=path, metadata=metadata, tensors=placed, header=header)


def _value(read: _Cursor, kind: int, what: str) -> Any:
    if kind in _SCALARS:
        return read.take(_SCALARS[kind], what)
    if kind == _STRING:
        return read.text(what).decode(errors="replace")
    if kind != _ARRAY:
        raise read.refuse(f"{what} is of the unknown type {kind}")
    inner, count = read.take("<I", what), read.take("<Q", what)
    if inner in _NUMPY:
        size = np.dtype(_NUMPY[inner]).itemsize
        start = read.need(count * size, what)
        return Array(kind=inner, count=count, data=memoryview(bytes(read.data[start : read.at])))
    if inner != _STRING:
        raise read.refuse(f"{what} is an array of type {inner}, which has no use here")
    if 8 * count > read.size:
        read.need(8 * count, what)
    start = read.at
    for _ in range(count):
        read.need(read.take("<Q", what), what)
    return Array(kind=inner, count=count, data=memoryview(bytes(read.data[start : read.at])))


def _tensor(read: _Cursor, name: str, alignment: int) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    what = f"the tensor {quoted(name)}"
    count = read.take("<I", what)
    if not 1 <= count <= 4:
        raise read.refuse(f"{what} has {count} dimensions")
    sizes = [read.take("<Q", what) for _ in range(count)]
    number, offset = read.take("<I", what), read.take("<Q", what)
    try:
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise DgemmaError(f"{read.where}: {what} is of type {number}, which the gguf library installed here does not "
                          "know; a newer one may: pip install -U gguf") from None  # fmt: skip
    total = math.prod(sizes)
    if not all(0 < size < 1 << 48 for size in sizes) or total >= 1 << 48:
        raise read.refuse(f"{what} has the dimensions {quoted(sizes, 60)}")
    if sizes[0] % block:
        raise read.refuse(
            f"{what} has rows of {sizes[0]}, which are no whole blocks of {block} as {kind.name} has them"
        )
    if offset % alignment or offset > read.size:
        raise read.refuse(f"{what} lies at offset {quoted(offset, 30)}")
    return Tensor(kind=kind.name, shape=tuple(reversed(sizes)), start=offset, nbytes=total // block * nbytes)


def _moved(tensor: Tensor, by: int) -> Tensor:
    return Tensor(kind=tensor.kind, shape=tensor.shape, start=tensor.start + by, nbytes=tensor.nbytes)


def _check_places(read: _Cursor, tensors: Mapping[str, Tensor]) -> None:
    end = 0
    for name, one in sorted(tensors.items(), key=lambda item: item[1].start):
        if one.start < end:
            raise read.refuse(f"the tensor {quoted(name)} overlaps the one before it")
        end = one.start + one.nbytes
    if end > read.size:
        raise DgemmaError(f"{read.where}: truncated: {read.size} bytes of {end}; download it again")


def find(path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only model of a folder without safetensors.

    Raises:
        DgemmaError: a folder with several.
    """
    try:
        if path.suffix.lower() == SUFFIX and not path.is_dir():
            return path
        inside = sorted(path.iterdir()) if path.is_dir() else []
        if any(one.suffix == ".safetensors" for one in inside):
            return None
        found = [one for one in inside if one.suffix.lower() == SUFFIX]
    except OSError:
        return None
    models = [one for one in found if not one.name.lower().startswith("mmproj") and not _later(one)]
    if len(models) > 1:
        names = ", ".join(quoted(one.name, 40) for one in models[:3])
        raise DgemmaError(f"{shown(path)}: {len(models)} GGUF models in it ({names}); give one of them")
    return models[0] if models else None


def _later(path: Path) -> bool:
    match = _SPLIT.fullmatch(path.name)
    return match is not None and int(match[2]) > 1


def open_all(path: Path, opener: Callable[[Path], GgufFile] = GgufFile.open) -> tuple[GgufFile, ...]:
    """Open a GGUF file and, of one that is split (`-00001-of-00003.gguf`), the others.

    Raises:
        DgemmaError: a file that is damaged, missing, of another split, or not the first of its own.
    """
    first = opener(path)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return (first,)
    match = _SPLIT.fullmatch(path.name)
    if match is None or type(count) is not int or int(match[3]) != count:
        raise DgemmaError(f"{shown(path)}: one of {quoted(count, 30)} parts, which should be called "
                          "NAME-00001-of-0000N.gguf; give it its published name back")  # fmt: skip
    if int(match[2]) != 1:
        raise DgemmaError(f"{shown(path)}: part {int(match[2])} of {count}; give the first, which has the settings")
    files = [first]
    for i in range(2, count + 1):
        part = path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf")
        if not os.path.lexists(part):
            raise DgemmaError(f"{shown(part)}: no such file; all {count} parts have to lie in one folder")
        files.append(opener(part))
        if files[-1].metadata.get("split.count") != count or files[-1].metadata.get("split.no") != i - 1:
            raise DgemmaError(f"{shown(part)}: not part {i} of {count} by its own settings; download it again")
    names = [name for file in files for name in file.tensors]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise DgemmaError(f"{shown(path)}: the tensor {quoted(double)} is in two of its parts")
    if (said := first.metadata.get("split.tensors.count", len(names))) != len(names):
        raise DgemmaError(f"{shown(path)}: its parts hold {len(names)} tensors, and it claims {quoted(said, 30)}")
    return tuple(files)
