"""The safetensors file format: a strict reader over a memory map; what is written whole, the library writes.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON that give every tensor's dtype, shape and
place, and then the tensors' bytes end to end. A file that breaks any rule of the format is refused before a byte of
its data is used: weights of unknown origin must not be able to do worse than that.

Why there is a reader beside the library's: its safe_open gives copies to NumPy, knows no bfloat16 there and tells no
offsets. Backends need views of the map itself, in every dtype, and ONNX graphs and the converter need each tensor's
place. The converter writes for itself as well: the library writes a whole file at once, out of memory.
Source: the format's description in huggingface/safetensors, and the rules its Rust reader checks.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..core.errors import DgemmaError, quoted, shown
from . import files

_MAX_HEADER = 100_000_000  # bytes; the format's own cap
_READ = 1 << 26
_MAX_DIMENSIONS = 32  # NumPy 1's limit

# The bytes of float8 scales are codes, not numbers to compute with.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype("u1"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """The format's name: a key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """Offset from the beginning of the file, in bytes."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """An open file: its checked header, and views into a memory map that is made on first use."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header; no tensor is touched.

        Raises:
            DgemmaError: not a regular file, truncated, or against the format in any way.
        """
        where = shown(path)
        try:
            with files.open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                if len(prefix) < 8:
                    raise DgemmaError(f"{where}: {size} bytes are too few for a safetensors file; download it again")
                if prefix == files.LFS_POINTER[:8]:
                    raise DgemmaError(f"{where}: {files.POINTER}")
                length = int.from_bytes(prefix, "little")
                if length > _MAX_HEADER:
                    raise DgemmaError(f"{where}: not a safetensors file (it claims a header of {length} bytes)")
                if length > size - 8:
                    raise DgemmaError(
                        f"{where}: truncated: {size} bytes, but its header alone has {length}; download it again"
                    )
                header = file.read(length)
        except OSError as error:
            raise DgemmaError(f"{where}: {error.strerror or error}") from None
        entries, metadata = _read_header(header, where, 8 + length, size)
        return cls(path=path, entries=entries, metadata=metadata, size=size)

    def tensor(self, name: str) -> np.ndarray:
        """Return a view of the file's bytes, in the width stored; writing to it changes memory, never the file."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        count = entry.nbytes // dtype.itemsize
        flat = np.frombuffer(self._map, dtype, count, entry.start)
        # The format does not promise alignment, and frameworks trust it: such a tensor (rare, small) is copied.
        return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)

    def raw(self, start: int, count: int) -> np.ndarray:
        """Return a view [count] of the file's bytes, uint8, under the same conditions as a tensor."""
        return np.frombuffer(self._map, np.uint8, count, start)

    def hold(self) -> None:
        """Read the file into memory: tensors are views of that, and what becomes of the file is no matter any more.

        Raises:
            DgemmaError: it cannot be read, or is not as long as it was.
        """
        held = mmap.mmap(-1, self.size)  # aligned to pages, as a file's map is
        try:
            with files.open_file(self.path) as file:
                read, view = 0, memoryview(held)
                while count := file.readinto(view[read : read + _READ]):
                    read += count
        except OSError as error:
            raise DgemmaError(f"{shown(self.path)}: {error.strerror or error}") from None
        self._check_size(read)
        self.__dict__["_map"] = held

    def check_unchanged(self) -> None:
        """Refuse a mapped file that was written to since: a page beyond its end kills the process that reads it.

        A file that was replaced by another of its name is no matter: the map is of the old one.

        Raises:
            DgemmaError: its size or its time of change is another.
        """
        if (opened := self.__dict__.get("_opened")) is None:
            return
        file, before = opened
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DgemmaError(f"{shown(self.path)}: the file was changed after it was loaded; load the model again")

    def _check_size(self, found: int) -> None:
        if found != self.size:
            raise DgemmaError(f"{shown(self.path)}: the file changed while it was being read; open it again")

    @cached_property
    def _opened(self) -> tuple[_Kept, os.stat_result]:
        """The mapped file, and what it was when it was mapped."""
        with files.open_file(self.path) as file:
            kept = _Kept(os.dup(file.fileno()))
        return kept, os.fstat(kept.fileno())

    @cached_property
    def _map(self) -> mmap.mmap:
        try:
            file, _ = self._opened
            # Copy-on-write, because torch warns of memory that it may not write; no page is copied by reading.
            try:
                result = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:  # Linux refuses writable maps of files larger than memory and swap
                result = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except DgemmaError:
            raise
        except (OSError, ValueError) as error:
            raise DgemmaError(f"{shown(self.path)}: cannot be mapped into memory: {error}") from None
        self._check_size(len(result))
        return result


class _Kept:
    """A descriptor that is closed when nobody has it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def fileno(self) -> int:
        return self._descriptor


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any little-endian dtype in `DTYPES` to one file, which appears under its name when complete.

    The widest dtypes come first, so that every tensor is aligned to its own width. Nothing is copied but tensors that
    are not contiguous.

    Raises:
        DgemmaError: a dtype that the format lacks, or the file cannot be written.
    """
    import safetensors.numpy

    known = set(DTYPES.values())
    for name, array in tensors.items():
        if array.dtype not in known:
            raise DgemmaError(
                f"{shown(path)}: the tensor {quoted(name)} is {array.dtype}, which safetensors cannot hold"
            )
    whole = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with files.path_when_done(path) as part:
        try:
            safetensors.numpy.save_file(whole, part, metadata=None if metadata is None else dict(metadata))
        except safetensors.SafetensorError as error:
            raise DgemmaError(f"{shown(path)}: cannot be written: {quoted(str(error), 120)}") from None


def _read_header(header: bytes, where: str, begin: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    def refuse(why: str) -> DgemmaError:
        return DgemmaError(f"{where}: not a sound safetensors file: {why}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise refuse(f"the key {quoted(double)} stands twice in its header")
        return result

    def no_constant(text: str) -> None:
        raise refuse(f"{text} in its header")

    if not header.startswith(b"{"):
        raise refuse("its header is not a JSON object")
    try:
        table = json.loads(header.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except DgemmaError:
        raise
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON ({quoted(str(error).splitlines()[0])})") from None

    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("__metadata__ is not a map of strings")
    entries = {}
    for name, info in table.items():
        entries[name] = _read_entry(name, info, begin, refuse)
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise refuse(f"the tensor {quoted(name)} {fault}")
        end += entry.nbytes
    if end > size:
        raise DgemmaError(f"{where}: truncated: {size} bytes of {end}; download it again")
    if end < size:
        raise refuse(f"{size - end} bytes after its last tensor")
    return entries, metadata


def _read_entry(name: str, info: Any, begin: int, refuse: Any) -> Entry:
    which = f"the tensor {quoted(name)}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{which} needs exactly dtype, shape and data_offsets")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise refuse(f"{which} has the unknown dtype {quoted(code)}")

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)

    if not sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refuse(f"{which} has the shape {quoted(shape)}")
    if not sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"{which} has the data_offsets {quoted(offsets)}")
    itemsize = DTYPES[code].itemsize
    # An empty tensor's other dimensions count too: NumPy multiplies them before it meets the zero.
    if math.prod(max(n, 1) for n in shape) * itemsize >= 1 << 62:
        raise refuse(f"{which} has the shape {quoted(shape)}")
    nbytes = math.prod(shape) * itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(f"{which} has {offsets[1] - offsets[0]} bytes where its dtype and shape need {nbytes}")
    return Entry(dtype=code, shape=tuple(shape), start=begin + offsets[0], nbytes=nbytes)
