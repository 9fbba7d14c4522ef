"""Where a checkpoint's files may really lie: who follows a link, and how far.

Weights may be anywhere, on another disk say: they are only ever read as numbers, and a file that is not safetensors is
refused. Text is another matter. A template is put before the model and shown to whoever asks, and conversions copy
settings: a folder from elsewhere whose template is a link to a file of the user's would give that file away. So text
lies in the folder, or in a cache of Hugging Face's, where names are hashes and nothing else is kept.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..core.errors import DgemmaError, shown

_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
_SHARED = ".huggingface-shared-blobs"
"""What marks a store that is shared by all repositories of a cache."""


def inside(folder: Path, name: str) -> Path:
    """Return a text file of the folder: settings, tokenizer, template. All that is read or copied comes through here.

    Hugging Face's cache is made of links: `models--o--n/snapshots/<commit>/f` → `models--o--n/blobs/<hash>`, which in
    turn may lead to the shared store, `blobs/` beside them. `blobs` may be a link, and the folder may be one of links
    into a cache.

    Raises:
        DgemmaError: no such file, not a regular one, or a link out of the folder and its cache.
    """
    path, real = _regular(folder, name)
    base = folder.resolve()
    if not (real.is_relative_to(base) or _of_cache(real, base)):
        raise DgemmaError(f"{shown(path)}: a link out of the folder, to {shown(real)}; put the file itself there")
    return path


def weight_file(folder: Path, name: str) -> Path:
    """Return a weight file of the folder; it may be a link, to wherever, that ends in a regular file.

    Raises:
        DgemmaError: no such file, or not a regular one.
    """
    return _regular(folder, name)[0]


def present(path: Path) -> bool:
    """Whether the folder has such an entry, be it a broken link, which is then refused by name."""
    return os.path.lexists(path)


def _regular(folder: Path, name: str) -> tuple[Path, Path]:
    """The path, and where it leads."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        lost = f"a link to {shown(os.readlink(path))}, which is not there" if path.is_symlink() else "no such file"
        raise DgemmaError(f"{shown(path)}: {lost}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.11 and 3.12
        raise DgemmaError(
            f"{shown(path)}: {getattr(error, 'strerror', None) or 'a link that leads back to itself'}"
        ) from None
    if not stat.S_ISREG(mode):
        raise DgemmaError(f"{shown(path)}: not a regular file")
    return path, real


def _of_cache(real: Path, base: Path) -> bool:
    """Whether a file belongs to a cache: the folder's own, or, by its name, any."""
    if any((above / _SHARED).is_file() for above in real.parents[:2]):
        return True
    repository = base.parent.parent
    if base.parent.name == "snapshots" and _is_repository(repository):
        blobs = repository / "blobs"
        if real.is_relative_to(blobs) or (_HASH.fullmatch(real.name) and real.parent == blobs.resolve()):
            return True
    parents = real.parents
    in_blobs = len(parents) > 1 and parents[0].name == "blobs" and _is_repository(parents[1])
    return in_blobs and _HASH.fullmatch(real.name) is not None


def _is_repository(folder: Path) -> bool:
    return folder.name.startswith("models--")
