"""Compiled automata on disk, by content: what was compiled once is read the next time."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from .automaton import TokenAutomaton

LARGEST = 256 << 20
"""Bytes of all files together; the longest unused are deleted."""

_ARRAYS = {"classes": np.int32, "sources": np.int32, "labels": np.int32, "targets": np.int32, "accepting": np.bool_}


def cache_folder() -> Path:
    """Where the platform keeps what programs can make again."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))
    return base / "dgemma" / "constraints"


def load(folder: Path, name: str) -> TokenAutomaton | None:
    """Return a stored automaton; None where there is none, or what is there is damaged or something else."""
    path = folder / f"{name}.npz"
    try:
        data = _bytes(path)
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {key: found[key] for key in _ARRAYS}
            count, states, start = (int(one) for one in found["numbers"])
            key = str(found["key"])
        os.utime(path)
    except Exception:  # whatever zipfile, zlib and NumPy make of damage
        return None
    if any(array.dtype != _ARRAYS[key] or array.ndim != 1 for key, array in arrays.items()):
        return None
    made = TokenAutomaton(**arrays, count=count, states=states, start=start)
    return made if made.key == key else None


def _bytes(path: Path) -> bytes:
    """Return what is in a file; a pipe that somebody has put there is waited for by nobody."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise OSError(f"{path} is no stored automaton")
        return file.read()


def save(folder: Path, name: str, made: TokenAutomaton) -> None:
    """Store an automaton, as a whole or not at all; where that cannot be, it is made again next time."""
    numbers = np.array([made.count, made.states, made.start])
    data = io.BytesIO()
    np.savez_compressed(data, **{key: getattr(made, key) for key in _ARRAYS}, numbers=numbers, key=np.array(made.key))
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(data.getvalue())
        os.replace(temporary, folder / f"{name}.npz")
        temporary = None
        _prune(folder)
    except OSError:
        return
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _prune(folder: Path) -> None:
    """Delete what was not used for longest, down to the limit."""
    found = [(one.stat().st_mtime, one.stat().st_size, one) for one in folder.glob("*.npz")]
    left = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if left <= LARGEST:
            break
        path.unlink(missing_ok=True)
        left -= size
