"""An open folder: what is written in it stays in it, whatever takes its name or its files' names meanwhile."""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import DgemmaError, shown

SUFFIX = ".partial"
"""Of files that are being written."""

# Zero where an operating system lacks them. Not waiting matters for a pipe that took a file's place after the look.
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
ALWAYS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Folder:
    """An open folder, and its files by their plain names: whatever takes the folder's place later is not touched.

    Args:
        path: the folder.
        follow: allow it to be a link itself.
        parent: an open folder that it is in, by its name alone.

    Raises:
        OSError: it cannot be opened; ENOTDIR or ELOOP where it is something else.
    """

    def __init__(self, path: Path, *, follow: bool = True, parent: Folder | None = None) -> None:
        self.path = path
        self._handle: int | None = None
        if os.open in os.supports_dir_fd:
            flags = os.O_RDONLY | os.O_DIRECTORY | ALWAYS | (0 if follow else NO_LINK)
            above = None if parent is None else parent._handle
            self._handle = os.open(path if above is None else path.name, flags, dir_fd=above)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @property
    def identity(self) -> tuple[int, int]:
        """What tells it from every other folder, whatever their names."""
        found = os.stat(self.path if self._handle is None else self._handle)
        return found.st_dev, found.st_ino

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path if self._handle is None else self._handle))

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open a file that is no link; returns its descriptor, which a child process does not inherit."""
        with self._naming(name):
            return os.open(self._at(name), flags | NO_LINK | NO_WAIT | ALWAYS, mode, dir_fd=self._handle)

    def open_own(self, name: str, flags: int) -> int:
        """Open a file under a name that anybody could have guessed, and that ought to be of this user's making.

        Raises:
            DgemmaError: a link, no regular file, one with another name besides, or another user's.
        """
        if (there := self.look(name)) is not None:
            self._check_own(there, name)
        handle = self.open(name, flags)
        try:
            self._check_own(os.fstat(handle), name)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def check_own(self) -> None:
        """Refuse a folder that is another user's, who could exchange what is in it.

        Raises:
            DgemmaError: it is.
        """
        if not self._is_own(os.stat(self.path if self._handle is None else self._handle)):
            raise DgemmaError(f"{shown(self.path)}: belongs to another user; remove it, or choose another name")

    def fresh(self, mode: int = 0o666) -> tuple[str, int]:
        """Make a file under a name that nobody could guess; returns the name, and a descriptor to write to."""
        name = fresh_name()
        return name, self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)

    def make_folder(self, name: str) -> None:
        """Make a folder in it, unless the name is taken."""
        with self._naming(name), suppress(FileExistsError):
            os.mkdir(self._at(name), dir_fd=self._handle)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file whole, in place of what has the name."""
        fresh, handle = self.fresh()
        try:
            with self._naming(name), os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            self.rename(fresh, name)
        except BaseException:
            with suppress(OSError):
                self.remove(fresh)
            raise

    def look(self, name: str) -> os.stat_result | None:
        """Return what stands under a name, not what it links to; None where nothing does."""
        with self._naming(name):
            return look(self._at(name), self._handle)

    def remove(self, name: str) -> None:
        with self._naming(name):
            os.unlink(self._at(name), dir_fd=self._handle)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of what has it."""
        with self._naming(new):
            os.replace(self._at(old), self._at(new), src_dir_fd=self._handle, dst_dir_fd=self._handle)

    def sync(self) -> None:
        """Bring names to the disk, where an operating system asks for that."""
        if self._handle is not None:
            os.fsync(self._handle)

    def _at(self, name: str) -> str:
        return name if self._handle is not None else os.path.join(self.path, name)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    def _check_own(self, found: os.stat_result, name: str) -> None:
        fault = None
        if not stat.S_ISREG(found.st_mode):
            fault = f"is {kind_of(found)}"
        elif found.st_nlink > 1:
            fault = "has another name besides"
        elif not self._is_own(found):
            fault = "belongs to another user"
        if fault is not None:
            raise DgemmaError(f"{shown(self.path / name)}: {fault}, and is not of dgemma's making; remove it")

    def _is_own(self, found: os.stat_result) -> bool:
        if sys.platform == "win32" or found.st_uid == os.geteuid():
            return True
        # Some network and foreign file systems give every file one owner: what a file made here and now has counts.
        name, handle = self.fresh()
        with os.fdopen(handle, "wb"):
            own = os.fstat(handle).st_uid
        self.remove(name)
        return found.st_uid == own


_FRESH = re.compile(r"\.dgemma-[0-9a-f]{16}" + re.escape(SUFFIX), re.ASCII)


def fresh_name() -> str:
    return f".dgemma-{secrets.token_hex(8)}{SUFFIX}"


def is_fresh(name: str) -> bool:
    """Whether a name is of `fresh_name`'s making: what has it, and nobody works at, was left by a kill."""
    return _FRESH.fullmatch(name) is not None


def look(path: str | Path, folder: int | None = None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def kind_of(found: os.stat_result) -> str:
    """Return what something is that is no regular file."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(found.st_mode), "a device")
