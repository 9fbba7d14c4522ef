"""How files are opened, here and nowhere else: those that others have written, and those that are written for others.

A folder that comes from elsewhere, or that others may write to, can hold anything under any name: a link to a file of
the user's, a pipe that nobody writes to, a device, ten gigabytes where a page of JSON should be. So nothing is opened
before it was looked at, nothing is read whole that may be longer than its kind ever is, and what is written goes to a
fresh name that nobody could guess, opened exclusively, and takes its own name when it is whole. Nothing is ever written
through a link.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from ..core.errors import DgemmaError, quoted, shown
from .folder import ALWAYS, NO_WAIT, Folder, fresh_name, kind_of, look

FULL = (errno.ENOSPC, errno.EDQUOT)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER = "a git-lfs pointer, which stands for the file; run `git lfs pull` in its folder"
MAX_NAME = 255
"""Bytes of a file's name, on every file system in use."""
MAX_JSON = 1 << 25
"""Bytes of a settings file or of an index; the index of a model with 46,000 tensors has 5 MB."""


# ---- Reading --------------------------------------------------------------------------------------------------


def open_file(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered; links are followed to one.

    Raises:
        DgemmaError: no such file, anything else than a regular file, or not readable.
    """
    where = shown(path)
    try:
        # Asked before opening: opening a pipe would wait for its other end, and opening some devices does things.
        _check_regular(os.stat(path), where)
        handle = os.open(path, os.O_RDONLY | NO_WAIT | ALWAYS)
        try:
            _check_regular(os.fstat(handle), where)
            return FileIO(handle)
        except BaseException:
            os.close(handle)
            raise
    except FileNotFoundError:
        raise DgemmaError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or one that no file system can hold
        raise _refused(error, where) from None


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a file whole that may have at most `limit` bytes.

    Raises:
        DgemmaError: as `open_file`; longer than that, which is found before reading; or changed meanwhile.
    """
    where = shown(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DgemmaError(f"{where}: {size:,} bytes, expected at most {limit:,}")
        parts, got = [], 0
        try:
            while got < size and (part := file.read(size - got)):
                parts.append(part)
                got += len(part)
        except OSError as error:
            raise _refused(error, where) from None
    if parts and parts[0].startswith(LFS_POINTER):
        raise DgemmaError(f"{where}: {POINTER}")
    if got < size:
        raise DgemmaError(f"{where}: became shorter while it was being read; try again when it is at rest")
    return b"".join(parts)


def read_text(path: Path, limit: int) -> str:
    """Read a UTF-8 file whole, under the conditions of `read_bytes`.

    Raises:
        DgemmaError: as `read_bytes`, or not UTF-8.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise DgemmaError(f"{shown(path)}: not UTF-8 text ({byte})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DgemmaError: not readable (see `read_bytes`), longer than `MAX_JSON`, not JSON or no object, or a key that
            stands twice.
    """
    where = shown(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise DgemmaError(f"{where}: the key {quoted(double)} stands twice")
        return result

    found = read_bytes(path, MAX_JSON)
    try:
        data = json.loads(found.decode(), object_pairs_hook=unique)
    except DgemmaError:
        raise
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{where}: not readable as JSON: {quoted(str(error).partition(chr(10))[0])}") from None
    if not isinstance(data, dict):
        raise DgemmaError(f"{where}: expected a JSON object, found {type(data).__name__}")
    return data


# ---- Writing --------------------------------------------------------------------------------------------------


@contextmanager
def replace_when_done(path: str | Path, *, private: bool = False, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the name `path` when the block is left, and is removed where it fails.

    What stands under the name before is replaced in one step if it is a regular file, and never written to: other names
    of it keep their contents. Links, folders, pipes and devices are refused before anything is written.

    Args:
        path: the name that it gets.
        private: for the user's eyes only; else as a file that is there has it, or as the user's umask says.
        sync: bring it to the disk before it gets its name, so that a power cut leaves the old file or the new one.

    Raises:
        DgemmaError: it cannot be written, and why.
    """
    path = Path(path)
    old = check_target(path)
    name = ""
    try:
        with Folder(path.parent) as folder:
            name, handle = folder.fresh(0o600 if private else 0o666)
            try:
                with os.fdopen(handle, "wb") as file:
                    if old is not None and not private and sys.platform != "win32":
                        os.fchmod(handle, stat.S_IMODE(old.st_mode) & 0o777)
                    yield file
                    file.flush()
                    if sync:
                        os.fsync(handle)
                folder.rename(name, path.name)
            except BaseException:
                with suppress(OSError):
                    folder.remove(name)
                raise
    except OSError as error:
        raise _refused(error, _culprit(error, path, name)) from None


@contextmanager
def path_when_done(path: str | Path) -> Iterator[Path]:
    """As `replace_when_done`, for libraries that open the file themselves: yields where it is to be written.

    That is inside a fresh folder which nobody else may enter, so that they cannot be led astray either.

    Raises:
        DgemmaError: it cannot be written, and why.
    """
    path = Path(path)
    old = check_target(path)
    inner = path.with_name(fresh_name())
    try:
        os.mkdir(inner, 0o700)
        try:
            part = inner / "file"
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | ALWAYS, 0o666), "wb") as file:
                mode = stat.S_IMODE((old or os.fstat(file.fileno())).st_mode) & 0o777
            yield part
            part.chmod(mode)  # a library may have made it private
            with part.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            shutil.rmtree(inner, ignore_errors=True)
    except OSError as error:
        raise _refused(error, _culprit(error, path, inner.name)) from None


def write_bytes(path: str | Path, data: bytes, *, private: bool = False, sync: bool = True) -> None:
    """Write a file whole, or not at all, under the conditions of `replace_when_done`."""
    with replace_when_done(path, private=private, sync=sync) as file:
        file.write(data)


def write_text(path: str | Path, text: str, *, private: bool = False, sync: bool = True) -> None:
    """Write text as UTF-8, whole or not at all; bytes that names from a file system brought along go back as they were.

    Raises:
        DgemmaError: as `replace_when_done`, or text that UTF-8 cannot hold.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DgemmaError(f"{shown(path)}: the text for it holds half a character, which UTF-8 cannot write") from None
    write_bytes(path, data, private=private, sync=sync)


def append_bytes(path: str | Path, data: bytes) -> None:
    """Add to the end of a file, which is made if need be; all that was there stays.

    Raises:
        DgemmaError: it cannot be written, or is a link, has another name besides, or is no regular file.
    """
    path = Path(path)
    check_target(path)
    try:
        with Folder(path.parent) as folder:
            handle = folder.open_own(path.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with os.fdopen(handle, "ab") as file:
                file.write(data)
    except OSError as error:
        raise _refused(error, shown(path)) from None


def check_target(path: str | Path) -> os.stat_result | None:
    """Find out, before the work, whether a file can be written under a name; returns what is replaced, if anything.

    Raises:
        DgemmaError: a name that the file system cannot hold or that no folder is there for, a folder that may not be
            written to, or something in its place that is not a regular file.
    """
    where = shown(path)
    try:
        if os.path.basename(os.fspath(path)) in ("", ".", ".."):
            raise DgemmaError(f"{where}: not the name of a file")
        above = os.path.dirname(os.path.abspath(path))
        if not stat.S_ISDIR(os.stat(above).st_mode):
            raise DgemmaError(f"{shown(above)}: is not a folder, so nothing can be written in it")
        if not os.access(above, os.W_OK | os.X_OK):
            raise DgemmaError(f"{shown(above)}: nothing may be written there; choose another folder")
        found = look(path)
    except FileNotFoundError:
        raise DgemmaError(f"{where}: no folder is there to write it in; make it first") from None
    except (OSError, ValueError) as error:
        raise _refused(error, where) from None
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise DgemmaError(f"{where}: is {kind_of(found)}, and is not written over; remove it, or choose another name")
    return found


def why(error: OSError | ValueError) -> str:
    """Say in a few words why a file could not be had."""
    if not isinstance(error, OSError):
        return "not a name that a file can have"
    if error.errno in FULL:
        return "the disk is full; free space"
    if error.errno == errno.EFBIG:
        return "larger than a file may be here (see `ulimit -f`)"
    return error.strerror or str(error)


def _refused(error: OSError | ValueError, where: str) -> DgemmaError:
    return error if isinstance(error, DgemmaError) else DgemmaError(f"{where}: {why(error)}")


def _culprit(error: OSError, path: Path, fresh: str) -> str:
    """Return the file that an error speaks of, by the name that it was to get."""
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else path
    return shown(path if fresh in named.parts or named.name == path.name else named)


def _check_regular(found: os.stat_result, where: str) -> None:
    # The kernel's own files, such as /proc/self/environ, call themselves regular and empty.
    kernels = found.st_size == 0 and (proc := look("/proc")) is not None and found.st_dev == proc.st_dev
    if not stat.S_ISREG(found.st_mode):
        raise DgemmaError(f"{where}: not a regular file, but {kind_of(found)}")
    if kernels:
        raise DgemmaError(f"{where}: not a regular file, but one of the kernel's")
