"""`dgemma models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..core.errors import DgemmaError, shown

CONTEXT = 4096
"""Tokens that there has to be room for."""


@click.command(short_help="List the models that are here.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object a line; sizes are in bytes.")
def models(as_json: bool) -> None:
    """List the models that are on this machine, and say whether each runs here: what ships with dgemma, and what was
    downloaded from the Hugging Face hub. `dgemma doctor --model NAME` says more of one.
    """
    from ..backends import MODULES, choose
    from . import machine
    from .output import Wait, consoles, put_lines

    out, errors = consoles()
    with Wait(errors, "looking at this machine"):
        backend = choose("auto")
        framework = machine.framework(MODULES[backend])
        rows = [_row(*one, backend, framework) for one in _found()]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    for row in rows:
        put_lines(out, describe(row))


def _found() -> list[tuple[str, str | None, Path]]:
    """Name, commit and folder of each model."""
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..checkpoints.checkpoint import PACKAGED, resolve
    from ..checkpoints.files import read_json

    found: list[tuple[str, str | None, Path]] = [(name, None, resolve(name)) for name in PACKAGED]
    try:
        repositories = sorted(scan_cache_dir().repos, key=lambda one: one.repo_id)
    except CacheNotFound:
        repositories = []
    except (OSError, ValueError):  # ValueError: a file
        raise DgemmaError(f"{shown(HF_HUB_CACHE)}: not a folder of downloads that can be read (HF_HUB_CACHE)") from None
    for repository in repositories:
        if repository.repo_type != "model":
            continue
        for revision in sorted(repository.revisions, key=lambda one: one.last_modified, reverse=True):
            try:
                kind = read_json(revision.snapshot_path / "config.json").get("model_type")
            except DgemmaError:  # other people's models need not have one
                continue
            if kind == "diffusion_gemma":
                found.append((repository.repo_id, revision.commit_hash, revision.snapshot_path))
    return found


def _row(name: str, revision: str | None, folder: Path, backend: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model, and whether it would run on a backend of which `found` is known."""
    from . import machine
    from .fit import describe as look
    from .fit import judge

    row: dict[str, Any] = {"model": name, "revision": revision, "path": str(folder)}
    card = next(iter(found["gpus"]), None)
    try:
        described = look(str(folder))
        if described.file_bytes is None:
            return row | {"bytes": None, "fits": False, "why": "its weights are not here"}
        dtype = described.auto_dtype(backend, found.get("native") if card is None else None)
        free = card["free"] if card else machine.system()["free_memory_bytes"]
        judged = judge(described, dtype=dtype, gpu=card is not None, backend=backend, free=free, context=CONTEXT)
    except DgemmaError as error:
        return row | {"bytes": None, "fits": False, "why": str(error)}
    row |= {name: judged[name] for name in ("parameters", "bits_per_weight", "needed_bytes", "free_bytes", "fits")}
    return row | {"bytes": described.file_bytes, "backend": backend, "device": card["device"] if card else "cpu"}


def describe(row: dict[str, Any]) -> list[str]:
    """Two lines for people: what it is, and whether it runs."""
    from .convert import amount
    from .output import size

    at = f" at {row['revision'][:12]}" if row["revision"] else ""
    if "why" in row:
        return [f"{row['model']}{at}", f"  cannot run: {row['why']}"]
    need, free = size(row["needed_bytes"]), size(row["free_bytes"])
    says = "runs here" if row["fits"] else "DOES NOT FIT"
    count = f"{row['parameters'] / 1e9:.1f} B" if row["parameters"] >= 1e9 else f"{row['parameters'] / 1e6:.1f} M"
    bits = f"{row['bits_per_weight']:.3g} bits each"
    return [
        f"{row['model']}{at}: {count} parameters, {bits}, {amount(row['bytes'])}",
        f"  {says}: {need} of {free} free, {row['backend']} on {row['device']}",
    ]
