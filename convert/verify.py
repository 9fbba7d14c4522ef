"""Read a converted folder back, and compare it with its manifest and with the source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import inside, open_files
from ..checkpoints.files import open_file, read_json
from ..checkpoints.quant import QTensor
from ..core.config import ModelConfig
from ..core.errors import DgemmaError, quoted, shown
from .encode import measured, runs, squares, values
from .job import Job, relative
from .layouts import read_source
from .meter import Meter
from .partial import MANIFEST
from .plan import Item
from .stored import Rows, SourceWeight, source_bytes

SLACK = 3.0
"""A weight's error over all of it, in units of that over the part measured before: more is a part gone wrong."""


def verify_files(folder: Path, *, threads: int, meter: Meter) -> dict[str, Any]:
    """Compare every file with the manifest's hashes; returns the manifest.

    Raises:
        DgemmaError: no manifest, or the file that differs, by name.
    """
    if not (folder / MANIFEST).is_file():
        raise DgemmaError(f"{shown(folder)}: no {MANIFEST} in it; dgemma convert writes one")
    manifest = read_json(inside(folder, MANIFEST))
    files = manifest.get("files")
    if not isinstance(files, Mapping) or not all(isinstance(one, Mapping) for one in files.values()):
        raise DgemmaError(f"{shown(folder / MANIFEST)}: files should be a table of names, sizes and hashes")
    if odd := [name for name in files if Path(name).name != name]:
        raise DgemmaError(f"{shown(folder / MANIFEST)}: {quoted(odd[0])} is not the plain name of a file")
    for name, one in files.items():
        if inside(folder, name).stat().st_size != one.get("size"):
            raise DgemmaError(
                f"{shown(folder / name)}: not of the size that the manifest says; make it anew with --force"
            )
    meter.start("hashing", sum(one["size"] for one in files.values()))
    with ThreadPoolExecutor(threads) as pool:
        for name, digest in pool.map(lambda name: (name, file_hash(folder / name, meter.advance)), files):
            if digest != files[name].get("sha256"):
                raise DgemmaError(
                    f"{shown(folder / name)}: its SHA-256 is not the manifest's: damaged; make it anew with --force"
                )
    return manifest


def file_hash(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Return a file's SHA-256; `advance` is told of the bytes read."""
    digest = hashlib.sha256()
    buffer = bytearray(4 << 20)
    with open_file(path) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def verify_job(job: Job, folder: Path, *, threads: int, meter: Meter) -> None:
    """Compare files with the manifest, and every weight, read and dequantized, with the source.

    Raises:
        DgemmaError: the file or the weight that differs, by name.
    """
    manifest = verify_files(folder, threads=threads, meter=meter)
    data = read_json(inside(folder, "config.json"))
    config = ModelConfig.from_hf(data, where=shown(folder / "config.json"))
    found = read_source(open_files(folder), data, config, folder, hinted=False)
    there = {one.name: one for one in (*found.text, *found.image)}
    meter.start("verifying", sum(source_bytes(item.weight) for item in job.items))

    def compare(work: tuple[Item, SourceWeight, int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
        item, made, start, stop = work
        sums = _compare(item, item.weight.read(start, stop), made.read(start, stop), start)
        meter.advance(source_bytes(item.weight, stop - start))
        return sums

    with ThreadPoolExecutor(threads) as pool:
        for item in job.items:
            work = [(item, there[item.weight.name], start, stop) for start, stop in runs(item)]
            sums = list(pool.map(compare, work))
            said = manifest["tensors"].get(item.weight.name, {}).get("error", 0.0)
            error, again = relative([whole for whole, _ in sums]), relative([part for _, part in sums])
            if float(f"{again:.4g}") != said or error > SLACK * said + 1e-6:
                name = quoted(item.weight.name)
                raise DgemmaError(f"{shown(folder)}: {name} has an error of {error:.4g}, not the manifest's {said:.4g}")


def _compare(item: Item, want: Rows, got: Rows, start: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the squared error and weights of all rows, and of those that conversion measured."""
    if item.how in ("stored", "carried"):
        same = isinstance(want, QTensor) == isinstance(got, QTensor) and all(
            a is b is None or np.array_equal(_bits(a), _bits(b))
            for a, b in zip(_arrays(want), _arrays(got), strict=True)
        )
        return ((0.0, 1.0), (0.0, 1.0)) if same else ((1.0, 1.0), (1.0, 1.0))
    wide, made = values(want, item.weight.dtype), values(got, item.dtype)
    part = [squares(made[a:b], wide[a:b]) for a, b in measured(item, start, len(wide))]
    return squares(made, wide), (sum(one[0] for one in part), sum(one[1] for one in part))


def _arrays(rows: Rows) -> list[Any]:
    if not isinstance(rows, QTensor):
        return [rows]
    return [rows.words, rows.scales, rows.mlx_biases(), rows.global_scale]


def _bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
