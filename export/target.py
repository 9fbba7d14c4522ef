"""The folder that an export goes to: what may be there, what is replaced, and nothing half made.

Everything is written in a fresh folder inside it, which only this user may enter, and moved to its name at the end, the
manifest first: it says what each file has to be, so that what a kill leaves is noticed, and known as an export's. What
no export left is neither followed, written over nor removed; `force` is for what one did, which is known by the
manifest, by the mark that every graph of ours begins with, and of weights by being the very file that was put there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import PACKAGED, Checkpoint, resolve
from ..checkpoints.files import open_file, read_json, why
from ..checkpoints.folder import Folder, fresh_name, is_fresh
from ..core.errors import DgemmaError, quoted, shown
from . import manifest

GRAPHS = ("encode.onnx", "denoise.onnx", "unified.onnx")
_MARK = b"\x12\x06dgemma"
"""How protobuf begins the producer's name, which stands in a graph's first bytes."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder, and how it stands to the checkpoint that is exported."""

    path: Path
    inside: bool
    """Whether it is the checkpoint's own."""


def choose(out: str | Path | None, checkpoint: Checkpoint) -> Target:
    """Find out where an export is to go; nothing is made yet.

    Raises:
        DgemmaError: a link, a file, a folder inside the checkpoint's, one of the package's, or no name for a folder.
    """
    source = checkpoint.path
    if out is None:
        found, path = True, source
    else:
        try:
            path = Path(out)
            found = _look(path)
        except TypeError:
            raise DgemmaError(f"out is {quoted(out)}, expected a path") from None
        except (OSError, ValueError) as error:
            raise DgemmaError(f"{shown(str(out))}: {why(error)}") from None
        if found is not None and not stat.S_ISDIR(found.st_mode):
            kind = {stat.S_IFLNK: "a link", stat.S_IFREG: "a file"}.get(stat.S_IFMT(found.st_mode), "not a folder")
            raise DgemmaError(f"{shown(path)}: is {kind}, and graphs are put into a folder; give another out")
    try:
        real, own = path.resolve(), source.resolve()
        packaged = {resolve(name).resolve() for name in PACKAGED}
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, in Python 3.11 and 3.12
        raise DgemmaError(f"{shown(path)}: {getattr(error, 'strerror', None) or 'links in a circle'}") from None
    inside = found is not None and os.path.samefile(path, source)
    if any(real == one or one in real.parents for one in packaged):
        raise DgemmaError(f"{quoted(source.name)} is a part of the package, whose folder is left alone; give an out")
    if not inside and own in real.parents:
        raise DgemmaError(f"{shown(path)}: lies inside the source; give an out elsewhere, or none")
    return Target(path=path, inside=inside)


@contextmanager
def opened(target: Target, checkpoint: Checkpoint, coming: Collection[str], *, force: bool) -> Iterator[Path]:
    """Yield a fresh folder to write an export in, whose files are moved to the target when the block is left.

    A target that did not exist is made, and removed again where anything fails.

    Args:
        target: where it goes.
        checkpoint: what is exported.
        coming: names of the files that are going to be written, so that one which is in the way is found before.
        force: replace what an earlier export left.

    Raises:
        DgemmaError: it holds anything that is not to be replaced, another export is at work, or it cannot be written.
    """
    folder, made = target.path, False
    try:
        if _look(folder) is None:
            folder.mkdir(parents=True)
            made = True
        with _alone(folder):
            try:
                _replaced(target, checkpoint, coming, force)
                stage = folder / fresh_name()
                stage.mkdir(0o700)
                try:
                    yield stage
                    _move(stage, folder, _replaced(target, checkpoint, coming, force))
                except DgemmaError as error:  # the name it was to have says more than one that is gone
                    raise DgemmaError(str(error).replace(f"{stage.name}{os.sep}", "")) from None
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
            except BaseException:
                if made:
                    with suppress(OSError):
                        folder.rmdir()
                raise
    except OSError as error:
        raise DgemmaError(f"{shown(str(error.filename or folder))}: {why(error)}") from None


def _replaced(target: Target, checkpoint: Checkpoint, coming: Collection[str], force: bool) -> list[str]:
    """Return the names that go when the export comes, the manifest last.

    Raises:
        DgemmaError: something is there that `force` is needed for, or in the way that no export left.
    """
    folder, ours = target.path, (*GRAPHS, manifest.NAME)
    there = [name for name in os.listdir(folder) if not is_fresh(name)]
    if target.inside:
        there = [name for name in there if name in ours]
    if not there:
        return []
    there.sort(key=lambda name: (name == manifest.NAME, name))
    if not force:
        raise DgemmaError(
            f"{shown(folder)}: is not empty ({quoted(there[0], 40)}); give another out, or replace with force what an "
            "earlier export left"
        )
    listed: dict[str, Any] = {}
    if manifest.NAME in there:
        listed = _listed(folder)
    elif not target.inside:
        raise DgemmaError(f"{shown(folder)}: is not empty, and not an export's; give another out, or empty it")
    old = [name for name in there if name in ours or name in listed or name in coming]  # the rest is the user's
    for name in old:
        if name != manifest.NAME and not _is_own(folder / name, listed, checkpoint):
            raise DgemmaError(f"{shown(folder / name)}: is not what an export left there; move it away first")
    return old


def _listed(folder: Path) -> dict[str, Any]:
    """Return the files of an earlier export, by its manifest, of whatever version."""
    where = folder / manifest.NAME
    _regular(where)
    data = read_json(where)
    if data.get("format") != manifest.FORMAT:
        raise DgemmaError(f"{shown(where)}: not a manifest of an export; move it away first")
    files = data.get("files")
    return files if isinstance(files, dict) else {}


def _is_own(path: Path, listed: dict[str, Any], checkpoint: Checkpoint) -> bool:
    found = _regular(path)
    if path.name in GRAPHS:
        with open_file(path) as file:
            return _MARK in file.read(64)
    stamped = listed.get(path.name)
    if not isinstance(stamped, dict):
        return False
    if path.suffix != ".safetensors":
        return manifest.same(path, stamped)
    # What has another name besides is not lost with this one. A copy is ours for as long as nobody has saved over it.
    if found.st_nlink > 1:
        return True
    as_left = (found.st_size, found.st_mtime_ns) == (stamped.get("bytes"), stamped.get("modified"))
    return as_left and not any(os.path.samefile(path, file.path) for file in checkpoint.files)


def left(stage: Path) -> dict[str, Any]:
    """What an export leaves: every file of a folder, and what it is known by."""
    result: dict[str, Any] = {}
    for path in sorted(stage.iterdir()):
        if path.suffix == ".safetensors":
            found = path.stat()
            result[path.name] = {"bytes": found.st_size, "modified": found.st_mtime_ns}
        else:
            result[path.name] = manifest.stamp(path.read_bytes())
    return result


def _move(stage: Path, folder: Path, old: list[str]) -> None:
    names = sorted(os.listdir(stage), key=lambda name: (name != manifest.NAME, name))
    with Folder(folder) as into:
        for name in old:
            into.remove(name)
        for name in names:
            into.rename(f"{stage.name}/{name}", name)


def _look(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _regular(path: Path) -> os.stat_result:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise DgemmaError(f"{shown(path)}: is {kind}, and not what an export left there; move it away first")
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other exports for as long as the block lasts, where the system can."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems lock no folders
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise DgemmaError(f"{shown(folder)}: another export is at work here; wait for it") from None
        yield
    finally:
        os.close(handle)
