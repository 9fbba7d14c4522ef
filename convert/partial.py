"""A folder under construction: `OUT.partial`, its lock, its journal, and the move that makes it OUT.

The journal says which rows are on the disk, and what they hash to. It is written after the data was synced, so that a
kill, or a power cut, at any point leaves at worst rows that are written once more; so do rows that have changed since,
and lines of the journal that are damaged. What was begun with other settings, or from a source that has changed since,
is refused and not mixed.

    OUT.partial/.dgemma/plan.json       what is being made, from what
    OUT.partial/.dgemma/journal.jsonl   ["block", item, row, squared error, squared weights, hash] and
                                        ["factor", item, value], each behind a hash of the plan and of itself
    OUT.partial/.dgemma/lock            held while a process works here
    OUT.partial/.dgemma/replaced        the name that what OUT was has until this is OUT

Anybody can guess these names, so what is found under them may be a trap: see `Folder.open_own`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checkpoints.files import read_bytes
from ..checkpoints.folder import Folder, is_fresh
from ..core.errors import DgemmaError, quoted, shown
from .plan import Shard

HIDDEN = ".dgemma"
MANIFEST = "dgemma-manifest.json"
PATIENCE = 2.0
"""Seconds to wait for the lock."""
_JOURNAL = "journal.jsonl"
_MAX_JOURNAL = 1 << 26  # bytes; a line has some 150 of them and stands for four million weights
_MAX_PLAN = 1 << 26
_REPLACED = re.compile(r"dgemma-[0-9a-f]{16}\.replaced")
_KINDS = re.compile(
    r".+\.(json|jsonl|jinja|safetensors|onnx|gguf|bin|model)|(LICENSE|NOTICE|README|USE_POLICY|CHAT).*|"
    r"(merges|vocab)\.txt|\.git(attributes|ignore)|\.DS_Store",
    re.IGNORECASE | re.DOTALL,
)
"""Names of what checkpoints consist of: a folder with others has something of the user's in it."""


class Partial:
    """The work so far. `open_partial` makes one, with the lock held.

    Args:
        folder: `OUT.partial`, with what is hidden in it.
        plan: what tells this work from other; a line of a journal holds for one plan only.

    Raises:
        DgemmaError: the folder is another user's.
        OSError: it is no folder, but a link perhaps.
    """

    lock: int
    """Descriptor of the file that holds the lock; workers hold it as well."""

    def __init__(self, folder: Path, plan: bytes = b"") -> None:
        self.folder = folder
        self.blocks: dict[tuple[int, int], tuple[float, float]] = {}
        self.digests: dict[tuple[int, int], str] = {}
        self.factors: dict[int, float] = {}
        self.touched: set[str] = set()
        """Files written to since the last `sync`; the main thread's, so that none is missed."""
        self._plan = plan
        self._lines: list[bytes] = []
        self.files = Folder(folder, follow=False)
        try:
            self.files.check_own()
            self.hidden = Folder(folder / HIDDEN, follow=False, parent=self.files)
        except BaseException:
            self.files.close()
            raise
        try:
            self.hidden.check_own()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.files.close()
        self.hidden.close()

    def begin(self, shards: tuple[Shard, ...]) -> None:
        """Make the files in full size, sparse, with their headers; or take up what the journal says is there."""
        if not all(self._is_there(one) for one in shards):
            if self.hidden.look(_JOURNAL) is not None:
                self.hidden.remove(_JOURNAL)
            for one in shards:
                if self.files.look(one.name) is not None:
                    self.files.remove(one.name)
                with os.fdopen(self.files.open(one.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                    file.write(one.header)
                    file.truncate(one.size)
        self._read_journal()

    def write(self, shard: str, offset: int, data: memoryview) -> None:
        """Write bytes into a file; safe from several threads, which write in different places."""
        handle = self.files.open_own(shard, os.O_WRONLY)
        try:
            os.lseek(handle, offset, os.SEEK_SET)
            done = 0
            while done < len(data):
                done += os.write(handle, data[done:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / shard)) from None
        finally:
            os.close(handle)

    def read(self, shard: str, offset: int, count: int) -> bytes:
        """Return bytes of a file; fewer where it ends."""
        with os.fdopen(self.files.open_own(shard, os.O_RDONLY), "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count)

    def note(self, *entry: Any) -> None:
        """Remember an entry of the journal, to be written by the next `sync`."""
        self._lines.append(self._line(json.dumps(entry).encode()))
        self._take(list(entry))

    def forget(self, block: tuple[int, int]) -> None:
        """Leave a block to be written again."""
        del self.blocks[block], self.digests[block]

    def sync(self) -> None:
        """Bring data to the disk, then say so in the journal."""
        for name in sorted(self.touched):
            handle = self.files.open_own(name, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self.touched.clear()
        if self._lines:
            text, self._lines = b"".join(self._lines), []
            handle = self.hidden.open_own(_JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                with os.fdopen(handle, "ab") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(handle)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.hidden.path / _JOURNAL)) from None

    def save(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        self.files.write(name, data)

    def allocated(self) -> int:
        """Return the bytes of disk that the files take already."""
        found = [one for name in self.files.names() if (one := self.files.look(name)) and stat.S_ISREG(one.st_mode)]
        return sum(getattr(one, "st_blocks", one.st_size // 512) * 512 for one in found)

    def _is_there(self, shard: Shard) -> bool:
        found = self.files.look(shard.name)
        return (
            found is not None
            and found.st_size == shard.size
            and self.read(shard.name, 0, len(shard.header)) == shard.header
        )

    def _line(self, entry: bytes) -> bytes:
        return digest([self._plan, entry]).encode() + b" " + entry + b"\n"

    def _read_journal(self) -> None:
        if (found := self.hidden.look(_JOURNAL)) is None:
            return
        if found.st_size > _MAX_JOURNAL and stat.S_ISREG(found.st_mode):
            where = shown(self.hidden.path / _JOURNAL)
            raise DgemmaError(f"{where}: {found.st_size:,} bytes, expected at most {_MAX_JOURNAL:,}; remove it")
        with os.fdopen(self.hidden.open_own(_JOURNAL, os.O_RDWR), "r+b") as file:
            data = file.read(_MAX_JOURNAL)
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):  # the last line was cut by a kill, and the next would be appended to its stump
                file.truncate(len(whole))
        for line in whole.splitlines(keepends=True):
            entry = line.partition(b" ")[2].rstrip(b"\n")
            if line == self._line(entry):
                try:
                    self._take(json.loads(entry))
                except (ValueError, OverflowError, RecursionError):  # a DgemmaError is a ValueError
                    raise DgemmaError(f"{shown(self.folder)}: begun by another version of dgemma; remove it") from None

    def _take(self, entry: list[Any]) -> None:
        match entry:
            case ["block", int(item), int(row), str(wrong), str(total), str(hashed)]:
                self.blocks[item, row] = float.fromhex(wrong), float.fromhex(total)
                self.digests[item, row] = hashed
            case ["factor", int(item), str(value)]:
                self.factors[item] = float.fromhex(value)
            case _:
                raise ValueError("no entry of a journal")


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return a hash by which damage is noticed: half of a SHA-256, which processors have instructions for."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:32]


@contextmanager
def open_partial(out: Path, plan: Mapping[str, Any], *, force: bool) -> Iterator[Partial]:
    """Make or take up `OUT.partial`, with the lock held until the block is left.

    Args:
        out: where the finished folder is to be.
        plan: what is being made, from what; work begun with another is taken up by nobody.
        force: throw such work away.

    Raises:
        DgemmaError: another process works here, other work was begun here, or what is here is not of dgemma's making.
        OSError: the folder cannot be made.
    """
    folder = place_of(out)
    if os.path.lexists(folder) and not (_is_folder(folder) and _is_folder(folder / HIDDEN)):
        raise DgemmaError(
            f"{shown(folder)}: is in the way, and not of dgemma's making; remove it, or take another --out"
        )
    folder.mkdir(exist_ok=True)
    with Folder(folder, follow=False) as made:
        made.make_folder(HIDDEN)
    text = json.dumps(plan, indent=1, sort_keys=True).encode()
    partial = Partial(folder, text)
    try:
        partial.lock = partial.hidden.open_own("lock", os.O_RDWR | os.O_CREAT)
        try:
            _wait_for(partial, out)
            _take_up(partial, text, plan, force)
            yield partial
        finally:
            os.close(partial.lock)
    finally:
        partial.close()


def _wait_for(partial: Partial, out: Path) -> None:
    # A killed conversion's workers finish what they are at, and hold the lock for a moment longer.
    until = time.monotonic() + PATIENCE
    while not (locked := _lock(partial.lock)) and time.monotonic() < until:
        time.sleep(0.05)
    if not locked:
        raise DgemmaError(
            f"{shown(partial.folder)}: another dgemma convert is at work here; wait for it, or take another --out"
        )
    try:
        found = os.stat(partial.folder / HIDDEN / "lock", follow_symlinks=False)
        same = os.fstat(partial.lock).st_ino == found.st_ino
    except FileNotFoundError:
        same = False
    if not same:
        raise DgemmaError(f"{shown(out)}: another dgemma convert has just finished it")


def _take_up(partial: Partial, text: bytes, plan: Mapping[str, Any], force: bool) -> None:
    """Compare the plan with the one that work was begun with here, if any was."""
    name = "plan.json"
    there = None
    if partial.hidden.look(name) is not None:
        with os.fdopen(partial.hidden.open_own(name, os.O_RDONLY), "rb") as file:
            there = file.read(_MAX_PLAN)
    if there == text:
        return
    if there is not None:
        if not force:
            raise DgemmaError(
                f"{shown(partial.folder)}: {_difference(there, plan)}; remove it, or start over with --force"
            )
        for one in partial.files.names():
            if one != HIDDEN:
                partial.files.remove(one)
        if partial.hidden.look(_JOURNAL) is not None:
            partial.hidden.remove(_JOURNAL)
    partial.hidden.write(name, text)


def place_of(out: Path) -> Path:
    """Return where a folder is made."""
    return out.with_name(f"{out.name}.partial")


def finish(partial: Partial, out: Path, *, force: bool) -> None:
    """Move the folder to its name, in place of what `force` replaces."""
    partial.files.sync()
    found = os.stat(partial.folder, follow_symlinks=False)
    if (found.st_dev, found.st_ino) != partial.files.identity:
        raise DgemmaError(f"{shown(partial.folder)}: another folder has taken its place; start again")
    if os.path.lexists(out) and not _is_folder(out):
        raise DgemmaError(f"{shown(out)}: is no folder; choose another --out")
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        check_replaceable(out, force=force)
        # A name that nobody has, written down before it is given: after a kill, the next run takes the folder away.
        name = f"dgemma-{secrets.token_hex(8)}.replaced"
        _remove_replaced(out, partial.folder)
        partial.hidden.write("replaced", name.encode())
        out.rename(out.with_name(name))
    partial.folder.rename(out)
    with Folder(out.parent) as above:
        above.sync()
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a kill may have left after the move."""
    if not _is_folder(out / HIDDEN):
        return
    _remove_replaced(out, out)
    with suppress(OSError):  # what is not of our making stays, and the folder with it
        with Folder(out / HIDDEN, follow=False) as hidden:
            for name in filter(_is_hidden, hidden.names()):
                hidden.remove(name)
        (out / HIDDEN).rmdir()


def _remove_replaced(out: Path, folder: Path) -> None:
    with suppress(DgemmaError):  # nothing was replaced, or nobody can tell what
        name = read_bytes(folder / HIDDEN / "replaced", 100).decode("ascii", "replace")
        old = out.with_name(name) if _REPLACED.fullmatch(name) else None
        if old is not None and _is_folder(old):
            check_replaceable(old, force=True)
            shutil.rmtree(old)


def check_replaceable(folder: Path, *, force: bool) -> None:
    """See that a folder may be taken away: nothing but leftovers of kills, or, with `force`, a checkpoint.

    Raises:
        DgemmaError: it may not, and why.
    """
    names = sorted(path.name for path in folder.iterdir() if not is_fresh(path.name))
    if _is_folder(folder / HIDDEN) and all(_is_hidden(path.name) for path in (folder / HIDDEN).iterdir()):
        names.remove(HIDDEN)
    if not names:
        return
    if not force:
        raise DgemmaError(f"{shown(folder)}: exists; choose another --out, or replace it with --force")
    odd = [name for name in names if _is_folder(folder / name) or not _KINDS.fullmatch(name)]
    if odd or "config.json" not in names:
        held = f"holds more than a checkpoint ({quoted(odd[0], 40)})" if odd else "holds no checkpoint"
        raise DgemmaError(f"{shown(folder)}: {held}, so --force does not replace it")


def _is_hidden(name: str) -> bool:
    """Whether a file in `.dgemma` is of our making."""
    return name in (_JOURNAL, "plan.json", "lock", "replaced") or is_fresh(name)


def _difference(there: bytes, plan: Mapping[str, Any]) -> str:
    try:
        old = json.loads(there)
        keys = [key for key in plan if old.get(key) != plan[key]]
    except (ValueError, AttributeError, RecursionError):
        keys = []
    if "source" in keys or "source_changed" in keys:
        return "was begun from a source that has changed since"
    return f"was begun with another {quoted(keys[0])}" if keys else "holds other work"


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _lock(file: int) -> bool:
    """Take the lock, which the operating system lets go of when the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
