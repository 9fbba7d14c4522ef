"""A folder under construction: `OUT.partial`, its lock, its journal, and the move that makes it OUT.

The journal says which rows are on the disk. It is written after the data was synced, so that a kill, or a power cut, at
any point leaves at worst rows that are written once more. What was begun with other settings, or from a source that has
changed since, is refused and not mixed.

    OUT.partial/.dgemma/plan.json       what is being made, from what
    OUT.partial/.dgemma/journal.jsonl   ["block", item, row, squared error, squared weights] and ["factor", item, value]
    OUT.partial/.dgemma/lock            held while a process works here
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import DgemmaError, quoted, shown
from .plan import Shard

HIDDEN = ".dgemma"
MANIFEST = "dgemma-manifest.json"
PATIENCE = 2.0
"""Seconds to wait for the lock."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Partial:
    """The work so far. `open_partial` makes one, with the lock held."""

    lock: IO[bytes]
    """Open file that holds the lock; workers hold it as well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: dict[tuple[int, int], tuple[float, float]] = {}
        self.factors: dict[int, float] = {}
        self._journal = folder / HIDDEN / "journal.jsonl"
        self._lines: list[str] = []
        self.touched: set[str] = set()
        """Files written to since the last `sync`; the main thread's, so that none is missed."""

    def begin(self, shards: tuple[Shard, ...]) -> None:
        """Make the files in full size, sparse, with their headers; or take up what the journal says is there."""
        if not all(_is_there(self.folder / one.name, one) for one in shards):
            self._journal.unlink(missing_ok=True)
            for one in shards:
                with (self.folder / one.name).open("wb") as file:
                    file.write(one.header)
                    file.truncate(one.size)
        self._read_journal()

    def write(self, shard: str, offset: int, data: memoryview) -> None:
        """Write bytes into a file; safe from several threads, which write in different places."""
        with (self.folder / shard).open("r+b", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(data):
                done += file.write(data[done:]) or 0

    def note(self, *entry: Any) -> None:
        """Remember an entry of the journal, to be written by the next `sync`."""
        self._lines.append(json.dumps(entry))
        self._take(list(entry))

    def sync(self) -> None:
        """Bring data to the disk, then say so in the journal."""
        for name in sorted(self.touched):
            with (self.folder / name).open("r+b", buffering=0) as file:
                os.fsync(file.fileno())
        self.touched.clear()
        if self._lines:
            text, self._lines = "".join(f"{line}\n" for line in self._lines), []
            with self._journal.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())

    def save(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with (self.folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def allocated(self) -> int:
        """Return the bytes of disk that the files take already."""
        found = [path.stat() for path in self.folder.iterdir() if path.is_file()]
        return sum(getattr(one, "st_blocks", one.st_size // 512) * 512 for one in found)

    def _read_journal(self) -> None:
        if not self._journal.exists():
            return
        data = self._journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last line was cut by a kill, and the next would be appended to its stump
            with self._journal.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, entry: list[Any]) -> None:
        match entry:
            case ["block", int(item), int(row), str(wrong), str(total)]:
                self.blocks[item, row] = float.fromhex(wrong), float.fromhex(total)
            case ["factor", int(item), str(value)]:
                self.factors[item] = float.fromhex(value)
            case _:
                raise DgemmaError(f"{shown(self._journal)}: not a journal of dgemma's; remove {shown(self.folder)}")


@contextmanager
def open_partial(out: Path, plan: Mapping[str, Any], *, force: bool) -> Iterator[Partial]:
    """Make or take up `OUT.partial`, with the lock held until the block is left.

    Args:
        out: where the finished folder is to be.
        plan: what is being made, from what; work begun with another is taken up by nobody.
        force: throw such work away.

    Raises:
        DgemmaError: another process works here, or other work was begun here.
        OSError: the folder cannot be made.
    """
    folder = out.with_name(f"{out.name}.partial")
    if os.path.lexists(folder) and not (folder / HIDDEN).is_dir():
        raise DgemmaError(
            f"{shown(folder)}: is in the way, and not of dgemma's making; remove it, or take another --out"
        )
    (folder / HIDDEN).mkdir(parents=True, exist_ok=True)
    with (folder / HIDDEN / "lock").open("a+b") as lock:
        # A killed conversion's workers finish what they are at, and hold the lock for a moment longer.
        until = time.monotonic() + PATIENCE
        while not (locked := _lock(lock)) and time.monotonic() < until:
            time.sleep(0.05)
        if not locked:
            raise DgemmaError(
                f"{shown(folder)}: another dgemma convert is at work here; wait for it, or take another --out"
            )
        try:
            same = os.fstat(lock.fileno()).st_ino == (folder / HIDDEN / "lock").stat().st_ino
        except FileNotFoundError:
            same = False
        if not same:
            raise DgemmaError(f"{shown(out)}: another dgemma convert has just finished it")
        file = folder / HIDDEN / "plan.json"
        text = json.dumps(plan, indent=1, sort_keys=True).encode()
        if file.exists() and file.read_bytes() != text:
            if not force:
                raise DgemmaError(f"{shown(folder)}: {_difference(file, plan)}; remove it, or start over with --force")
            for path in folder.iterdir():
                if path.name != HIDDEN:
                    path.unlink()
            (folder / HIDDEN / "journal.jsonl").unlink(missing_ok=True)
            file.unlink()
        partial = Partial(folder)
        partial.lock = lock
        if not file.exists():
            partial.save(f"{HIDDEN}/plan.json", text)
        yield partial


def finish(partial: Partial, out: Path, *, force: bool) -> None:
    """Move the folder to its name, in place of what `force` replaces."""
    _sync_folder(partial.folder)
    if out.exists() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        if not force:
            raise DgemmaError(f"{shown(out)}: exists; choose another --out, or replace it with --force")
        _remove_replaced(out)
        out.rename(_replaced(out))
    partial.folder.rename(out)
    _sync_folder(out.parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a kill may have left after the move."""
    shutil.rmtree(out / HIDDEN, ignore_errors=True)
    _remove_replaced(out)


def _replaced(out: Path) -> Path:
    return out.with_name(f"{out.name}.replaced")


def _remove_replaced(out: Path) -> None:
    old = _replaced(out)
    if old.is_dir() and replaceable(old):
        shutil.rmtree(old)


def replaceable(folder: Path) -> bool:
    """Whether a folder is a checkpoint and nothing else, so that --force may take it away."""
    names = {path.name for path in folder.iterdir() if path.name != HIDDEN}
    return "config.json" in names and not any((folder / name).is_dir() for name in names)


def _difference(file: Path, plan: Mapping[str, Any]) -> str:
    try:
        old = json.loads(file.read_bytes())
        keys = [key for key in plan if old.get(key) != plan[key]]
    except (ValueError, AttributeError):
        keys = []
    if "source" in keys or "source_changed" in keys:
        return "was begun from a source that has changed since"
    return f"was begun with another {quoted(keys[0])}" if keys else "holds other work"


def _is_there(path: Path, shard: Shard) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == shard.size and file.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes]) -> bool:
    """Take the lock, which the operating system lets go of when the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
