"""The folder that a conversion is to make: whether it can be, and whether it is there already."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import product
from pathlib import Path

from ..checkpoints.files import MAX_NAME, read_json
from ..core.errors import DgemmaError, quoted, shown
from ..core.given import check_path
from .job import Job
from .partial import MANIFEST, check_replaceable, place_of


def absolute(out: str | Path) -> Path:
    """Return the target's absolute path.

    Raises:
        DgemmaError: no folder can have that name, or not while it is being made.
    """
    check_path(out, "out")
    refusal = DgemmaError(f"{quoted(str(out))}: not the name of a folder that could be made")
    try:
        path = Path(os.path.abspath(Path(out).expanduser()))
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # said when the source is known
            os.lstat(path)
    except (OSError, ValueError, RuntimeError):  # too long; a NUL, half a character; the home of an unknown user
        raise refusal from None
    if not Path(out).name:
        raise refusal
    if len(os.fsencode(place_of(path).name)) > MAX_NAME:
        raise DgemmaError(f"{quoted(path.name)}: a name too long for a folder; choose a shorter --out")
    return path


def check(out: Path, job: Job, *, force: bool) -> None:
    """Find out before the work whether the folder can be made, and be put in place of what is there.

    Raises:
        DgemmaError: it cannot, or may not without `force`.
    """
    if out.is_symlink():
        raise DgemmaError(f"{shown(out)}: is a link, which is not replaced; give the folder itself as --out")
    if os.path.lexists(out) and not out.is_dir():
        raise DgemmaError(f"{shown(out)}: exists, and is not a folder; choose another --out")
    above = next(one for one in out.parents if os.path.lexists(one))
    if not above.is_dir():
        raise DgemmaError(f"{shown(above)}: is not a folder, so nothing can be made in it; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DgemmaError(f"{shown(above)}: nothing may be written there; choose another --out")
    sources = [file.path.resolve() for file in job.files] if job.gguf else [job.folder.resolve()]
    for target, source in product((out.resolve(), place_of(out).resolve()), sources):
        if target == source or target in source.parents or source in target.parents or _same(target, source):
            raise DgemmaError(f"{shown(out)}: the target may not be the source, nor lie in it or around it")
    if not out.exists() or not any(out.iterdir()) or (not force and finished(out, job)):
        return
    check_replaceable(out, force=force)


def finished(out: Path, job: Job) -> bool:
    """Whether a folder is what this job would make, by its manifest and the sizes of its files."""
    try:
        manifest = read_json(out / MANIFEST)
        same = all((out / name).stat().st_size == one["size"] for name, one in manifest["files"].items())
        said = [one.get("error", 0.0) for one in manifest["tensors"].values()]
        numbers = bool(said) and all(isinstance(one, float) for one in said)
        return same and numbers and manifest["plan"] == job.plan_hash
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a DgemmaError is a ValueError
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one folder, as where names differ in case only."""
    try:
        return one.samefile(other)
    except OSError:
        return False
